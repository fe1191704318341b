"""Synthetic cohorts: how much they resemble real sources, and what of their labels is in them."""

import json
import re

import numpy as np
import pytest
import typer
from datasets import load_dataset
from scipy import signal
from scipy.stats import spearmanr

from fmrilm import Atlas, FmriLMFeatureExtractor
from fmrilm.training.data import synthetic
from fmrilm.training.data.dataset import load_scans
from fmrilm.training.data.open_data import open_scans
from fmrilm.training.data.splits import held_out_subjects
from fmrilm.training.data.synthetic import AGES, SyntheticCohort, training_signals, write_synthetic
from fmrilm.training.data.tasks import labels_of, load_task


AAL2 = Atlas.load("aal2-94")


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    return training_signals(AAL2)


def plain(sources, subjects: int, effect: float = 0.0, **options) -> SyntheticCohort:
    """A cohort in which nothing but the group has an effect."""
    return SyntheticCohort(sources, AAL2, subjects, effect, **{"age_effect": 0.0, "site_effect": 0.0, **options})


def drawn(cohort: SyntheticCohort) -> dict[str, np.ndarray]:
    """Columns of the cohort, and functional connectivity [subjects, rois, rois]."""
    rows = list(cohort)
    columns = {name: np.array([row[name] for row in rows]) for name in ("group", "age", "site")}
    return {**columns, "connectivity": np.stack([np.corrcoef(row["signal"].T) for row in rows])}


def pairs(cohort: SyntheticCohort, network: str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the pairs of ROIs within the network, and with at most one ROI in it."""
    member = np.array(cohort.atlas.networks) == network
    upper = np.triu(np.ones((len(member), len(member)), dtype=bool), 1)
    within = np.outer(member, member) & upper
    return within, upper & ~within


def cohens_d(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Of group b against a; values [subjects, ...]."""
    a, b = values[group == "a"], values[group == "b"]
    return (b.mean(0) - a.mean(0)) / np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)


# --- realistic


def test_sources_are_scans_of_subjects_that_nothing_holds_out(sources) -> None:
    subjects = [scan.subject for scan in open_scans() if scan.atlas == "aal2-94"]
    assert len(sources) == sum(subject not in held_out_subjects(subjects) for subject in subjects) > 5


def test_connectivity_resembles_the_source(sources) -> None:
    cohort = SyntheticCohort(sources, AAL2, 100)
    upper = np.triu_indices(len(cohort.atlas), 1)
    real = np.stack([np.corrcoef(series[:160].T)[upper] for series in sources])
    made = drawn(cohort)["connectivity"][:, *upper]
    assert np.corrcoef(real.mean(0), made.mean(0))[0, 1] > 0.95
    # subjects differ as much from one another as real ones do
    spread = [np.arctanh(values).std(0, ddof=1).mean() for values in (real, made)]
    assert 0.85 < spread[1] / spread[0] < 1.15
    alike = [np.corrcoef(values)[np.triu_indices(len(values), 1)].mean() for values in (real, made)]
    assert abs(alike[0] - alike[1]) < 0.08


def test_spectra_resemble_the_source(sources) -> None:
    def spectrum(signals: list[np.ndarray]) -> np.ndarray:
        power = np.stack([signal.welch(values.T, nperseg=64)[1] for values in signals])[..., 1:]
        return (power / power.sum(-1, keepdims=True)).mean(0)

    real = spectrum(sources)
    made = spectrum([row["signal"] for row in SyntheticCohort(sources, AAL2, 60)])
    assert np.corrcoef(np.log(real).ravel(), np.log(made).ravel())[0, 1] > 0.95
    white = np.full_like(real, real.mean())
    assert np.abs(made - real).sum() < 0.2 * np.abs(white - real).sum()


def test_ends_of_a_scan_do_not_meet(sources) -> None:
    rows = list(plain(sources, 40))
    neighbours = np.mean([(row["signal"][:-1] * row["signal"][1:]).mean() for row in rows])
    assert abs(np.mean([(row["signal"][0] * row["signal"][-1]).mean() for row in rows])) < neighbours / 3


# --- the effects


def test_effect_rises_with_its_parameter_and_stays_in_its_network(sources) -> None:
    found, outside = [], []
    for effect in (-2.0, 0.0, 2.0, 4.0):
        cohort = plain(sources, 120, effect)
        within, other = pairs(cohort, "Default")
        subjects = drawn(cohort)
        maps, group = subjects["connectivity"], subjects["group"]
        found.append(cohens_d(maps[:, within].mean(1), group))
        difference = maps[group == "b"].mean(0) - maps[group == "a"].mean(0)
        outside.append(difference[other])
        assert np.isclose(difference[within].mean(), 2 * cohort.group_shift, atol=0.025)
    assert found == sorted(found) and found[0] < -0.8 and abs(found[1]) < 0.3 and found[3] > found[2] > 0.8
    # the subjects are the same ones with every effect
    for with_effect in (outside[0], outside[2], outside[3]):
        assert np.abs(with_effect - outside[1]).mean() < 0.01


def test_other_network_can_be_chosen(sources) -> None:
    cohort = plain(sources, 120, 3.0, network="Limbic")
    subjects = drawn(cohort)
    found = cohens_d(subjects["connectivity"][:, pairs(cohort, "Limbic")[0]].mean(1), subjects["group"])
    assert found > 1


def test_without_effects_labels_say_nothing(sources) -> None:
    cohort = plain(sources, 200)
    assert cohort.group_shift == cohort.age_shift == 0
    subjects = drawn(cohort)
    maps = subjects["connectivity"][:, *np.triu_indices(len(cohort.atlas), 1)]
    # as many pairs of ROIs differ at 5 % as by chance
    assert 0.01 < (np.abs(cohens_d(maps, subjects["group"])) > 1.97 * np.sqrt(4 / 200)).mean() < 0.12


def test_labels_do_not_depend_on_the_effects(sources) -> None:
    without, with_effects = plain(sources, 20), SyntheticCohort(sources, AAL2, 20, 3.0, age_effect=1.0, site_effect=0.3)
    for one, other in zip(without, with_effects, strict=True):
        assert [one[name] for name in ("group", "age", "site")] == [other[name] for name in ("group", "age", "site")]


def test_age_changes_its_network_and_no_other(sources) -> None:
    cohort = plain(sources, 160, age_effect=-1.5)
    subjects = drawn(cohort)
    maps, age = subjects["connectivity"], subjects["age"]
    assert age.min() >= AGES[0] and age.max() <= AGES[1] and age.std() > 15
    assert spearmanr(maps[:, pairs(cohort, "Cont")[0]].mean(1), age).statistic < -0.35
    assert abs(spearmanr(maps[:, pairs(cohort, "Default")[0]].mean(1), age).statistic) < 0.2


def test_site_shows_everywhere_and_goes_with_the_group_as_far_as_asked(sources) -> None:
    subjects = drawn(plain(sources, 200, site_effect=0.2, confounding=0.6))
    group, site = subjects["group"] == "b", subjects["site"] == "synthetic-2"
    assert abs(np.mean(site[group]) - 0.8) < 0.12 and abs(np.mean(site[~group]) - 0.2) < 0.12
    average = subjects["connectivity"].mean((1, 2))
    assert average[site].mean() - average[~site].mean() > 0.08
    # the group is not in the sources, and yet can be told through the site
    assert average[group].mean() - average[~group].mean() > 0.03


def test_site_does_not_go_with_the_group_unless_asked(sources) -> None:
    rows = list(plain(sources, 200, frames=16))
    second = {group: np.mean([row["site"] == "synthetic-2" for row in rows if row["group"] == group]) for group in "ab"}
    assert abs(second["a"] - second["b"]) < 0.2


def test_groups_are_of_equal_size(sources) -> None:
    groups = [row["group"] for row in plain(sources, 60, frames=16)]
    assert all({*pair} == {"a", "b"} for pair in zip(groups[::2], groups[1::2], strict=True))
    assert {*groups[::2]} == {"a", "b"}


# --- any number of subjects


def test_subject_depends_on_the_seed_and_not_on_how_many_there_are(sources) -> None:
    few, many, other = SyntheticCohort(sources, AAL2, 3), SyntheticCohort(sources, AAL2, 1_000_000), SyntheticCohort(sources, AAL2, 3, seed=1)
    for number in range(3):
        assert few[number].keys() == many[number].keys()
        assert all(np.array_equal(few[number][name], many[number][name]) for name in few[number])
        assert not np.allclose(few[number]["signal"], other[number]["signal"])
    assert many[999_999]["subject"] == "synthetic-999999"
    with pytest.raises(IndexError, match="a subject of 0 to 2, got 3"):
        few[3]


def test_prepared_folder_is_read_by_training_and_by_tasks(sources, tmp_path) -> None:
    folder = tmp_path / "synthetic-small"
    cohort = SyntheticCohort(sources, AAL2, 6, frames=48)
    write_synthetic(folder, cohort)
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert list(rows["subject"][:]) == [f"synthetic-{number:05d}" for number in range(6)]
    assert np.array_equal(rows[2]["signal"], cohort[2]["signal"]) and rows[2]["signal"].dtype == np.float32
    assert not rows[0]["censored"].any() and rows[0]["tr"] == 2.0
    extractor = FmriLMFeatureExtractor(atlases=[Atlas.load("aal2-94")])
    loaded = load_scans(folder, extractor)
    assert len(loaded) == 6 and set(loaded.table["dataset"]) <= {"synthetic-1", "synthetic-2"}
    assert np.corrcoef(loaded.signal(1)[:, 0], cohort[1]["signal"][:, 0])[0, 1] > 0.6
    labels = labels_of(load_task("synthetic_group"), rows)
    assert labels == [row["group"] for row in cohort]
    labels_of(load_task("age"), rows)
    card = (folder / "README.md").read_text()
    assert "# A cohort with a synthetic effect: made-up scans" in card and "synthetic_effect 2.0" in card


def test_stopped_cohort_goes_on_and_others_are_refused(sources, tmp_path) -> None:
    folder = tmp_path / "synthetic"
    write_synthetic(folder, SyntheticCohort(sources, AAL2, 3, frames=32))
    first = (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns
    write_synthetic(folder, SyntheticCohort(sources, AAL2, 5, frames=32))
    assert (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns == first
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [key for line in ledger for key in line["keys"]] == [f"synthetic-{number:05d}" for number in range(5)]
    with pytest.raises(ValueError, match="synthetic_effect 2.0 instead of 1.0"):
        write_synthetic(folder, SyntheticCohort(sources, AAL2, 5, 1.0, frames=32))
    with pytest.raises(ValueError, match="synthetic_source_scans \\d+ instead of"):
        write_synthetic(folder, SyntheticCohort(sources[1:], AAL2, 5, frames=32))
    with pytest.raises(ValueError, match="a folder with 'synthetic' in its name, got 'cohort'"):
        write_synthetic(tmp_path / "cohort", SyntheticCohort(sources, AAL2, 5))
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "Motor"}, "at least 2 ROIs of 'aal2-94' (Cont, Default, "),
        ({"network": "Cont"}, "different networks for the effects of group and age, got 'Cont' for both"),
        ({"effect": 40.0}, "an effect that moves correlations of 'Default' by up to"),
        ({"confounding": 1.5}, "a site effect and a confounding of 0 to 1, got 0.1, 1.5"),
        ({"site_effect": -0.1}, "got -0.1, 0.0"),
    ],
)
def test_cohort_that_is_impossible_is_refused(sources, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticCohort(sources, AAL2, 4, **options)


def test_program_refuses_what_is_impossible(tmp_path, capsys) -> None:
    with pytest.raises(typer.Exit) as end:
        synthetic.main(tmp_path / "synthetic", subjects=2, effect=40.0)
    assert end.value.exit_code == 1
    assert "error: expected an effect that moves correlations of 'Default' by up to" in capsys.readouterr().err
    assert not (tmp_path / "synthetic").exists()


def test_atlas_without_open_scans_is_refused() -> None:
    with pytest.raises(ValueError, match="no open scans of training subjects of atlas 'tian-s3'"):
        training_signals(Atlas.load("tian-s3"))
