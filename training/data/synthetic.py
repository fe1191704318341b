"""
Cohorts with a synthetic effect: any number of made-up subjects of two groups, whose scans resemble real ones.

The open data come without labels, so that methods are checked offline on these. The scans are Gaussian: what is real
about them are the spectrum of each ROI and the correlations. The effect, and nothing else, relates them to the group.

As a program: `python -m fmrilm.training.data.synthetic FOLDER --subjects 300 --effect 0.5` (all options: `--help`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import fft, signal
from tqdm import tqdm

from fmrilm import Atlas, FmriLMFeatureExtractor

from .card import scans_card
from .open_data import open_scans
from .prepare import Preparation, row_features
from .shards import ShardStore, write_atlases, write_whole
from .splits import held_out_subjects


SITE = "synthetic"
LABEL_TYPES = {"group": "string"}
# s, of the sources as the feature extractor makes them
REPETITION_TIME = 2.0
# variance of a ROI of the affected network that is replaced by a part whose correlation is set
AFFECTED_SHARE = 0.4
# How subjects differ: concentration of the Dirichlet weights by which real scans are mixed into one, and the share and
# degrees of freedom of what is the subject's own. Together they give about the spread between real subjects.
CONCENTRATION, OWN_SHARE, OWN_FREEDOM = 0.3, 0.7, 12
# towards independent ROIs, so that every covariance is positive definite
SHRINKAGE = 0.01
SPECTRUM_FRAMES = 128
# subjects without an effect, to see how much their connectivity varies
REFERENCE_SUBJECTS = 200
SHARD_SIZE = 64
# at which logistic regression on functional connectivity (z-transformed, of AAL2 in 160 frames) reaches a ROC-AUC of
# 0.90 when it learns from 200 subjects; 0.81 at 1.5, 0.86 at 1.75, 0.98 at 3
DEFAULT_EFFECT = 2.0


class SyntheticCohort:
    """
    Subjects of the groups "a" and "b" (of each two in a row one each), scanned once. Subject i depends on the seed and
    i, and not on how many there are.

    Args:
        sources: signals [time, rois] of training subjects alone, `REPETITION_TIME` seconds a frame.
        effect: Cohen's d of group b against a in the mean correlation within `network`, over subjects and without
            sampling error; negative: weaker in b. A scan of finite length shows less of it.
        frames: of a scan.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        atlas: Atlas,
        subjects: int,
        effect: float = DEFAULT_EFFECT,
        network: str = "Default",
        seed: int = 0,
        frames: int = 160,
    ):
        members = np.flatnonzero(np.array(atlas.networks) == network)
        if len(members) < 2:
            known = ", ".join(sorted(set(atlas.networks)))
            raise ValueError(f"expected a network of at least 2 ROIs of {atlas.name!r} ({known}), got {network!r}")
        self.atlas, self.subjects, self.seed, self.frames = atlas, subjects, seed, frames
        settings = {"effect": effect, "network": network, "frames": frames, "seed": seed, "atlas": atlas.name}
        self.settings = {f"synthetic_{name}": value for name, value in {**settings, "scans": len(sources)}.items()}
        # longer than the scan, whose end would otherwise run into its start; declared to return nothing
        self.period: int = fft.next_fast_len(frames + SPECTRUM_FRAMES, real=True)  # pyright: ignore[reportAttributeAccessIssue]
        self.covariances = np.stack([_covariance(series) for series in sources])
        self.amplitudes = np.stack([_amplitudes(series, self.period) for series in sources])
        self.block = np.ix_(members, members)
        self.kept = np.ones(len(atlas))
        self.kept[members] = np.sqrt(1 - AFFECTED_SHARE)
        # without an effect the mean stays what it is
        self.correlation = self.mean_correlation(self.covariances.mean(0))
        rng = np.random.default_rng(0)
        reference = (self._shifted(self._subject(rng)[1], 0.0) for _ in range(REFERENCE_SUBJECTS))
        self.shift = effect / 2 * float(np.std([self.mean_correlation(one) for one in reference]))
        most = AFFECTED_SHARE * min(self.correlation, 1 - self.correlation)
        if abs(self.shift) > most:
            raise ValueError(
                f"expected an effect that moves correlations of {network!r} by up to {most:.3f} to either side, "
                f"got one of {abs(self.shift):.3f}: at most {most / abs(self.shift):.0%} of it is possible"
            )

    def __len__(self) -> int:
        return self.subjects

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(self.subjects))

    def __getitem__(self, subject: int) -> dict[str, Any]:
        """A row as `fmrilm prepare` writes it. signal: float32 [frames, rois], unit variance."""
        rng = np.random.default_rng((self.seed, 1, subject))
        # of two subjects in a row, which one comes first is random
        group = int((subject + np.random.default_rng((self.seed, 0, subject // 2)).integers(2)) % 2)
        weights, covariance = self._subject(rng)
        covariance = self._shifted(covariance, (2 * group - 1) * self.shift)
        return {
            "signal": self._signal(covariance, weights, rng),
            "tr": REPETITION_TIME,
            "censored": np.zeros(self.frames, dtype=bool),
            "missing_rois": 0,
            "atlas": self.atlas.name,
            "subject": f"synthetic-{subject:05d}",
            **dict.fromkeys(("session", "task", "run")),
            "site": SITE,
            "group": "ab"[group],
        }

    def mean_correlation(self, correlations: np.ndarray) -> float:
        """Between two ROIs of the network; correlations [rois, rois]."""
        block = correlations[self.block]
        return float((block.sum() - np.trace(block)) / (len(block) * (len(block) - 1)))

    def _shifted(self, correlations: np.ndarray, shift: float) -> np.ndarray:
        """
        Correlations [rois, rois] in which those within the network are higher by `shift` than without an effect. Those
        between other ROIs stay what they were, those with others fall by the same in all subjects.
        """
        correlation = self.correlation + shift / AFFECTED_SHARE
        changed = correlations * np.outer(self.kept, self.kept)
        changed[self.block] += AFFECTED_SHARE * (correlation + (1 - correlation) * np.eye(len(self.block[0])))
        return changed

    def _subject(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the real scans in a new subject, and its correlations [rois, rois] without an effect."""
        weights = rng.dirichlet([CONCENTRATION] * len(self.covariances))
        mixed = np.tensordot(weights, self.covariances, 1)
        own = np.linalg.cholesky(mixed) @ rng.standard_normal((len(mixed), OWN_FREEDOM))
        covariance = (1 - OWN_SHARE) * mixed + OWN_SHARE / OWN_FREEDOM * (own @ own.T)
        std = np.sqrt(np.diagonal(covariance))
        return weights, covariance / np.outer(std, std)

    def _signal(self, covariance: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gaussian series float32 [frames, rois] of these correlations, with the spectra of the mixed scans."""
        amplitudes = np.tensordot(weights.astype(np.float32), self.amplitudes, 1)
        white = rng.standard_normal((len(covariance), 2 * amplitudes.shape[1]), dtype=np.float32)
        correlated = np.linalg.cholesky(covariance).astype(np.float32) @ white
        series = np.asarray(fft.irfft(amplitudes * correlated.view(np.complex64), self.period))[:, : self.frames]
        series -= series.mean(1, keepdims=True)
        series /= series.std(1, keepdims=True)
        return np.ascontiguousarray(series.T)


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


def training_signals(atlas: Atlas) -> list[np.ndarray]:
    """Standardised signals [time, rois] of the open scans of this atlas, of subjects that no program holds out."""
    scans = [scan for scan in open_scans() if scan.atlas == atlas.name]
    held_out = held_out_subjects(scan.subject for scan in scans)
    extractor = FmriLMFeatureExtractor(atlases=[atlas], repetition_time=REPETITION_TIME)
    found = [extractor.prepare_signal(scan.signal, scan.tr)[0] for scan in scans if scan.subject not in held_out]
    if not found:
        raise ValueError(f"no open scans of training subjects of atlas {atlas.name!r}")
    return found


def write_synthetic(folder: Path, cohort: SyntheticCohort) -> None:
    """
    Write a cohort as `fmrilm prepare` writes scans; a run that was stopped goes on, a cohort of fewer subjects gets
    more. "synthetic" has to be in the folder's name, because it becomes the dataset's.
    """
    if "synthetic" not in folder.name:
        raise ValueError(f"expected a folder with 'synthetic' in its name, got {folder.name!r}")
    settings = {**Preparation().describe(), "labels": LABEL_TYPES, **cohort.settings}
    keys = [f"synthetic-{subject:05d}" for subject in range(len(cohort))]
    store, atlas = ShardStore(folder, settings, set(keys)), cohort.atlas
    write_atlases(folder, [atlas])
    todo = [subject for subject, key in enumerate(keys) if key not in store.keys]
    for start in tqdm(range(0, len(todo), SHARD_SIZE), desc="synthetic scans", unit="shard"):
        rows = [(keys[subject], cohort[subject]) for subject in todo[start : start + SHARD_SIZE]]
        store.add(atlas.name, rows, row_features(atlas, LABEL_TYPES))
    title = "A cohort with a synthetic effect: made-up scans"
    write_whole(folder / "README.md", scans_card(folder, settings, {atlas.name: atlas}, title))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with 'synthetic' in its name; a stopped run goes on.")],
    subjects: Annotated[int, typer.Option(min=2, help="Subjects, one scan each.")] = 300,
    effect: Annotated[float, typer.Option(help="Group b against a, Cohen's d.")] = DEFAULT_EFFECT,
    network: Annotated[str, typer.Option(help="Network whose connectivity differs between the groups.")] = "Default",
    frames: Annotated[int, typer.Option(min=16, help="Frames of a scan.")] = 160,
    atlas: Annotated[str, typer.Option(help="Atlas of the open scans to resemble.")] = "aal2-94",
    seed: Annotated[int, typer.Option(help="Of the subjects.")] = 0,
) -> None:
    """Write a cohort with a synthetic effect as a prepared dataset."""
    try:
        of = Atlas.load(atlas)
        cohort = SyntheticCohort(training_signals(of), of, subjects, effect, network, seed, frames)
        write_synthetic(folder, cohort)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{subjects} subjects: {folder}")


if __name__ == "__main__":
    typer.run(main)
