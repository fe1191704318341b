"""
Cohorts with a planted effect: any number of made-up people whose scans resemble real ones, and differ by their labels.

The open data come without labels of people, so tasks about people are measured offline on these. The scans are
Gaussian: what is real about them are the spectrum of each ROI and the correlations; movement, artefacts and states
that come and go are not in them. What is planted, and nothing else, relates them to their labels.

As a program: `python -m fmrilm.training.data.synthetic FOLDER --subjects 300 --effect 0.5` (all options: `--help`).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import fft, signal
from tqdm import tqdm

from fmrilm import Atlas, FmriLMFeatureExtractor

from .dataset import PreparedScan, prepare_scans, split_subjects
from .open_data import open_scans
from .prepare import ATLASES, Preparation, row_features
from .prepared_card import card
from .shards import ShardStore, write_whole


SITES = ("planted-1", "planted-2")
LABEL_TYPES = {"age": "float64", "group": "string"}
AGES = (20.0, 80.0)
# variance of a ROI of a planted network that is replaced by a part whose correlation is set
PLANTED_SHARE = 0.4
# How people differ: concentration of the Dirichlet weights by which real scans are mixed into a person, and the share
# and degrees of freedom of what is the person's own. Together they give about the spread between real people.
CONCENTRATION, OWN_SHARE, OWN_FREEDOM = 0.3, 0.7, 12
# towards independent ROIs, so that every covariance is positive definite
SHRINKAGE = 0.01
SPECTRUM_FRAMES = 128
# people without an effect, to see how much their connectivity varies
REFERENCE_PEOPLE = 200
SHARD_SIZE = 64
# at which logistic regression on functional connectivity (z-transformed, of AAL2 in 160 frames) reaches a ROC-AUC of
# 0.90 when it learns from 200 people; 0.81 at 1.5, 0.86 at 1.75, 0.98 at 3
DEFAULT_EFFECT = 2.0


class PlantedCohort:
    """
    People of the groups "a" and "b" (of each two in a row one each), scanned once, at one of two sites. Person i
    depends on the seed and i, and not on how many there are.

    Args:
        training_scans: of one atlas, and of training subjects alone.
        effect: Cohen's d of group b against a in the mean correlation within `network`, over people of a site and
            without sampling error; negative: weaker in b. A scan of finite length shows less of it.
        age_effect: of the mean correlation within `age_network`, standard deviations per standard deviation of age.
        site_effect: share of its variance that every ROI has in common with all others at the second site.
        confounding: how far the site depends on the group, 0 to 1: group b is at the second site with a probability
            of (1 + confounding) / 2, group a with (1 - confounding) / 2.
        frames: of a scan, `repetition_time` seconds apart, as they are in the training scans.
    """

    def __init__(
        self,
        training_scans: Sequence[PreparedScan],
        subjects: int,
        effect: float = DEFAULT_EFFECT,
        network: str = "Default",
        seed: int = 0,
        *,
        age_effect: float = -0.5,
        age_network: str = "Cont",
        site_effect: float = 0.1,
        confounding: float = 0.0,
        frames: int = 160,
        repetition_time: float = 2.0,
    ):
        atlases = {scan.atlas.checksum: scan.atlas for scan in training_scans}
        if len(atlases) != 1:
            raise ValueError(f"expected scans of one atlas, got {[atlas.name for atlas in atlases.values()]}")
        if network == age_network:
            raise ValueError(f"expected different networks for the effects of group and age, got {network!r} for both")
        if not (0 <= site_effect < 1 and 0 <= confounding <= 1):
            raise ValueError(f"expected a site effect and a confounding of 0 to 1, got {site_effect}, {confounding}")
        (self.atlas,) = atlases.values()
        self.settings = {
            "planted_atlas": self.atlas.name,
            "planted_source_scans": len(training_scans),
            "planted_effect": effect,
            "planted_network": network,
            "planted_age_effect": age_effect,
            "planted_age_network": age_network,
            "planted_site_effect": site_effect,
            "planted_confounding": confounding,
            "planted_frames": frames,
            "planted_tr": repetition_time,
            "planted_seed": seed,
        }
        self.subjects = subjects
        self.seed = seed
        self.site_effect = site_effect
        self.confounding = confounding
        self.frames = frames
        self.repetition_time = repetition_time
        # longer than the scan, whose end would otherwise run into its start; declared to return nothing
        self.period: int = fft.next_fast_len(frames + SPECTRUM_FRAMES, real=True)  # pyright: ignore[reportAttributeAccessIssue]
        self.covariances = np.stack([_covariance(scan.signal) for scan in training_scans])
        self.amplitudes = np.stack([_amplitudes(scan.signal, self.period) for scan in training_scans])
        self.group_network = PlantedNetwork(network, self.atlas, self.covariances.mean(0))
        self.age_network = PlantedNetwork(age_network, self.atlas, self.covariances.mean(0))
        networks = (self.group_network, self.age_network)
        rng = np.random.default_rng(0)
        people = (self._person(rng)[1] for _ in range(REFERENCE_PEOPLE))
        means = [[network.mean(network.plant(person, 0.0)) for network in networks] for person in people]
        deviations = np.std(means, axis=0)
        # the farthest shift of correlation to either side; an even distribution ends at sqrt(3) deviations
        self.group_shift = effect / 2 * deviations[0]
        self.age_shift = age_effect * np.sqrt(3) * deviations[1]
        self.group_network.check(self.group_shift)
        self.age_network.check(self.age_shift)

    def __len__(self) -> int:
        return self.subjects

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(self.subjects))

    def __getitem__(self, person: int) -> dict[str, Any]:
        """A row as `fmrilm prepare` writes it. signal: float32 [frames, rois], unit variance."""
        if not 0 <= person < self.subjects:
            raise IndexError(f"expected a person of 0 to {self.subjects - 1}, got {person}")
        rng = np.random.default_rng((self.seed, 1, person))
        # of two people in a row, chance says who comes first
        group = int((person + np.random.default_rng((self.seed, 0, person // 2)).integers(2)) % 2)
        site = int(rng.uniform() < (1 + (self.confounding if group else -self.confounding)) / 2)
        age = round(rng.uniform(*AGES), 1)
        place = 2 * (age - AGES[0]) / (AGES[1] - AGES[0]) - 1
        weights, covariance = self._person(rng)
        covariance = self.group_network.plant(covariance, (2 * group - 1) * self.group_shift)
        covariance = self.age_network.plant(covariance, place * self.age_shift)
        if site:
            covariance = (1 - self.site_effect) * covariance + self.site_effect
        return {
            "signal": self._signal(covariance, weights, rng),
            "tr": self.repetition_time,
            "censored": np.zeros(self.frames, dtype=bool),
            "atlas": self.atlas.name,
            "subject": f"planted-{person:05d}",
            "session": None,
            "task": None,
            "run": None,
            "site": SITES[site],
            "age": age,
            "group": "ab"[group],
        }

    def _person(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the real scans in a new person, and the person's correlations [rois, rois] without an effect."""
        weights = rng.dirichlet([CONCENTRATION] * len(self.covariances))
        mixed = np.tensordot(weights, self.covariances, 1)
        own = np.linalg.cholesky(mixed) @ rng.standard_normal((len(mixed), OWN_FREEDOM))
        covariance = (1 - OWN_SHARE) * mixed + OWN_SHARE / OWN_FREEDOM * (own @ own.T)
        deviation = np.sqrt(np.diagonal(covariance))
        return weights, covariance / np.outer(deviation, deviation)

    def _signal(self, covariance: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gaussian series float32 [frames, rois] of these correlations, with the spectra of the mixed scans."""
        amplitudes = np.tensordot(weights.astype(np.float32), self.amplitudes, 1)
        white = rng.standard_normal((len(covariance), 2 * amplitudes.shape[1]), dtype=np.float32)
        correlated = np.linalg.cholesky(covariance).astype(np.float32) @ white
        series = np.asarray(fft.irfft(amplitudes * correlated.view(np.complex64), self.period))[:, : self.frames]
        series -= series.mean(1, keepdims=True)
        series /= series.std(1, keepdims=True)
        return np.ascontiguousarray(series.T)


class PlantedNetwork:
    """
    A network of whose ROIs' variance a share is replaced by one with a chosen correlation. Correlations between other
    ROIs stay what they were, those with others fall by the same in everybody.
    """

    def __init__(self, name: str, atlas: Atlas, correlations: np.ndarray):
        members = np.flatnonzero(np.array(atlas.networks) == name)
        if len(members) < 2:
            known = ", ".join(sorted(set(atlas.networks)))
            raise ValueError(f"expected a network of at least 2 ROIs of {atlas.name!r} ({known}), got {name!r}")
        self.name = name
        self.block = np.ix_(members, members)
        self.kept = np.ones(len(atlas))
        self.kept[members] = np.sqrt(1 - PLANTED_SHARE)
        # without an effect the mean stays what it is
        self.correlation = self.mean(correlations)

    def mean(self, correlations: np.ndarray) -> float:
        """Mean correlation between two ROIs of the network."""
        block = correlations[self.block]
        return float((block.sum() - np.trace(block)) / (len(block) * (len(block) - 1)))

    def plant(self, correlations: np.ndarray, shift: float) -> np.ndarray:
        """Correlations [rois, rois] in which those within the network are higher by `shift` than without an effect."""
        correlation = self.correlation + shift / PLANTED_SHARE
        planted = correlations * np.outer(self.kept, self.kept)
        planted[self.block] += PLANTED_SHARE * (correlation + (1 - correlation) * np.eye(len(self.block[0])))
        return planted

    def check(self, shift: float) -> None:
        most = PLANTED_SHARE * min(self.correlation, 1 - self.correlation)
        if abs(shift) > most:
            raise ValueError(
                f"expected an effect that moves correlations of {self.name!r} by up to {most:.3f} to either side, "
                f"got one of {abs(shift):.3f}: at most {most / abs(shift):.0%} of it can be planted"
            )


def _covariance(series: np.ndarray) -> np.ndarray:
    """Correlations float64 [rois, rois], a little nearer to independence."""
    correlations = np.corrcoef(series.T.astype(np.float64))
    return (1 - SHRINKAGE) * correlations + SHRINKAGE * np.eye(series.shape[1])


def _amplitudes(series: np.ndarray, period: int) -> np.ndarray:
    """Root of the spectrum, float32 [rois, frequencies], at the frequencies of a series of `period` frames."""
    length = min(SPECTRUM_FRAMES, len(series))
    frequencies, power = signal.welch(series.T.astype(np.float64), nperseg=length)
    wanted = fft.rfftfreq(period)
    power = np.stack([np.interp(wanted, frequencies, row) for row in power])
    # no mean
    power[:, 0] = 0
    return np.sqrt(power / power.sum(1, keepdims=True)).astype(np.float32)


def training_scans(atlas: str) -> list[PreparedScan]:
    """The open scans of this atlas of the subjects that the demo trains on."""
    from ..demo import HELD_OUT

    scans = [scan for scan in open_scans() if scan.atlas == atlas]
    if not scans:
        raise ValueError(f"no open scans of atlas {atlas!r}")
    prepared = prepare_scans(scans, FmriLMFeatureExtractor(atlases=[Atlas.load(atlas)]))
    return split_subjects(prepared, HELD_OUT)[0]


def write_planted(folder: Path, cohort: PlantedCohort) -> None:
    """
    Write a cohort as `fmrilm prepare` writes scans; a run that was stopped goes on, one of fewer people gets more. The
    folder's name has to say what it holds, because it becomes the dataset's.
    """
    if "planted" not in folder.name:
        raise ValueError(f"expected a folder with 'planted' in its name, got {folder.name!r}")
    settings = {**Preparation().describe(), "labels": LABEL_TYPES, **cohort.settings}
    keys = [f"planted-{person:05d}" for person in range(len(cohort))]
    store = ShardStore(folder, settings, set(keys))
    atlas = cohort.atlas
    write_whole(folder / ATLASES / f"{atlas.name}.json", json.dumps(atlas.to_dict(), ensure_ascii=False) + "\n")
    features, done = row_features(atlas, LABEL_TYPES), store.keys
    todo = [person for person, key in enumerate(keys) if key not in done]
    with tqdm(desc="planting", unit="scan", total=len(todo)) as progress:
        for start in range(0, len(todo), SHARD_SIZE):
            people = todo[start : start + SHARD_SIZE]
            store.add(atlas.name, [(keys[person], cohort[person]) for person in people], features)
            progress.update(len(people))
    write_whole(folder / "README.md", card(folder, settings, {atlas.name: atlas}, "A planted cohort: made-up scans"))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write, with 'planted' in its name; goes on where it was.")],
    subjects: Annotated[int, typer.Option(min=2, help="People, one scan each.")] = 300,
    effect: Annotated[float, typer.Option(help="Group b against a, Cohen's d.")] = DEFAULT_EFFECT,
    network: Annotated[str, typer.Option(help="Network whose connectivity differs between the groups.")] = "Default",
    age_effect: Annotated[float, typer.Option(help="Of age: deviations per deviation of age.")] = -0.5,
    age_network: Annotated[str, typer.Option(help="Network whose connectivity changes with age.")] = "Cont",
    site_effect: Annotated[float, typer.Option(help="Variance that all ROIs share at the second site.")] = 0.1,
    confounding: Annotated[float, typer.Option(help="How far the site goes with the group, 0 to 1.")] = 0.0,
    frames: Annotated[int, typer.Option(min=16, help="Frames of a scan.")] = 160,
    atlas: Annotated[str, typer.Option(help="Atlas of the open scans to resemble.")] = "aal2-94",
    seed: Annotated[int, typer.Option(help="Of the people.")] = 0,
) -> None:
    """Write a cohort with a planted effect as a prepared dataset."""
    try:
        cohort = PlantedCohort(
            training_scans(atlas),
            subjects,
            effect,
            network,
            seed,
            age_effect=age_effect,
            age_network=age_network,
            site_effect=site_effect,
            confounding=confounding,
            frames=frames,
        )
        write_planted(folder, cohort)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{subjects} people: {folder}")


if __name__ == "__main__":
    typer.run(main)
