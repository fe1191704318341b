"""Planted cohorts: how much they resemble real scans, and what of their labels is in them."""

import json
import re

import numpy as np
import pytest
import typer
from datasets import load_dataset
from scipy import signal
from scipy.stats import spearmanr

from fmrilm import Atlas, FmriLMFeatureExtractor
from fmrilm.training.data import synthetic as planted
from fmrilm.training.data.dataset import load_prepared
from fmrilm.training.data.synthetic import AGES, PlantedCohort, training_scans, write_planted
from fmrilm.training.data.tasks import labels_of, load_task
from helpers import prepared


@pytest.fixture(scope="module")
def scans():
    return training_scans("aal2-94")


def plain(scans, subjects: int, effect: float = 0.0, **options) -> PlantedCohort:
    """A cohort in which nothing but the group has an effect."""
    return PlantedCohort(scans, subjects, effect, **{"age_effect": 0.0, "site_effect": 0.0, **options})


def drawn(cohort: PlantedCohort) -> dict[str, np.ndarray]:
    """Columns of the cohort, and functional connectivity [subjects, rois, rois]."""
    rows = list(cohort)
    columns = {name: np.array([row[name] for row in rows]) for name in ("group", "age", "site")}
    return {**columns, "connectivity": np.stack([np.corrcoef(row["signal"].T) for row in rows])}


def pairs(cohort: PlantedCohort, network: str) -> tuple[np.ndarray, np.ndarray]:
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


def test_source_are_the_subjects_that_the_demo_trains_on(scans) -> None:
    assert {scan.dataset for scan in scans} == {"hcp", "greifswald"} and len(scans) == 8


def test_connectivity_resembles_the_source(scans) -> None:
    cohort = PlantedCohort(scans, 100)
    upper = np.triu_indices(len(cohort.atlas), 1)
    real = np.stack([np.corrcoef(scan.signal[:160].T)[upper] for scan in scans])
    made = drawn(cohort)["connectivity"][:, *upper]
    assert np.corrcoef(real.mean(0), made.mean(0))[0, 1] > 0.95
    # people differ as much from one another as real ones do
    spread = [np.arctanh(values).std(0, ddof=1).mean() for values in (real, made)]
    assert 0.85 < spread[1] / spread[0] < 1.15
    alike = [np.corrcoef(values)[np.triu_indices(len(values), 1)].mean() for values in (real, made)]
    assert abs(alike[0] - alike[1]) < 0.08


def test_spectra_resemble_the_source(scans) -> None:
    def spectrum(signals: list[np.ndarray]) -> np.ndarray:
        power = np.stack([signal.welch(values.T, nperseg=64)[1] for values in signals])[..., 1:]
        return (power / power.sum(-1, keepdims=True)).mean(0)

    real = spectrum([scan.signal for scan in scans])
    made = spectrum([row["signal"] for row in PlantedCohort(scans, 60)])
    assert np.corrcoef(np.log(real).ravel(), np.log(made).ravel())[0, 1] > 0.95
    white = np.full_like(real, real.mean())
    assert np.abs(made - real).sum() < 0.2 * np.abs(white - real).sum()


def test_ends_of_a_scan_do_not_meet(scans) -> None:
    rows = list(plain(scans, 40))
    neighbours = np.mean([(row["signal"][:-1] * row["signal"][1:]).mean() for row in rows])
    assert abs(np.mean([(row["signal"][0] * row["signal"][-1]).mean() for row in rows])) < neighbours / 3


# --- what is planted


def test_effect_rises_with_its_parameter_and_stays_in_its_network(scans) -> None:
    found, outside = [], []
    for effect in (-2.0, 0.0, 2.0, 4.0):
        cohort = plain(scans, 120, effect)
        within, other = pairs(cohort, "Default")
        people = drawn(cohort)
        maps, group = people["connectivity"], people["group"]
        found.append(cohens_d(maps[:, within].mean(1), group))
        difference = maps[group == "b"].mean(0) - maps[group == "a"].mean(0)
        outside.append(difference[other])
        assert np.isclose(difference[within].mean(), 2 * cohort.group_shift, atol=0.025)
    assert found == sorted(found) and found[0] < -0.8 and abs(found[1]) < 0.3 and found[3] > found[2] > 0.8
    # the people are the same ones with every effect: what differs between effects is what was planted
    for with_effect in (outside[0], outside[2], outside[3]):
        assert np.abs(with_effect - outside[1]).mean() < 0.01


def test_other_network_can_be_chosen(scans) -> None:
    cohort = plain(scans, 120, 3.0, network="Limbic")
    people = drawn(cohort)
    found = cohens_d(people["connectivity"][:, pairs(cohort, "Limbic")[0]].mean(1), people["group"])
    assert found > 1


def test_without_effects_labels_say_nothing(scans) -> None:
    cohort = plain(scans, 200)
    assert cohort.group_shift == cohort.age_shift == 0
    people = drawn(cohort)
    maps = people["connectivity"][:, *np.triu_indices(len(cohort.atlas), 1)]
    # as many pairs of ROIs differ at 5 % as by chance
    assert 0.01 < (np.abs(cohens_d(maps, people["group"])) > 1.97 * np.sqrt(4 / 200)).mean() < 0.12


def test_labels_do_not_depend_on_the_effects(scans) -> None:
    without, with_effects = plain(scans, 20), PlantedCohort(scans, 20, 3.0, age_effect=1.0, site_effect=0.3)
    for one, other in zip(without, with_effects, strict=True):
        assert [one[name] for name in ("group", "age", "site")] == [other[name] for name in ("group", "age", "site")]


def test_age_changes_its_network_and_no_other(scans) -> None:
    cohort = plain(scans, 160, age_effect=-1.5)
    people = drawn(cohort)
    maps, age = people["connectivity"], people["age"]
    assert age.min() >= AGES[0] and age.max() <= AGES[1] and age.std() > 15
    assert spearmanr(maps[:, pairs(cohort, "Cont")[0]].mean(1), age).statistic < -0.35
    assert abs(spearmanr(maps[:, pairs(cohort, "Default")[0]].mean(1), age).statistic) < 0.2


def test_site_shows_everywhere_and_goes_with_the_group_as_far_as_asked(scans) -> None:
    people = drawn(plain(scans, 200, site_effect=0.2, confounding=0.6))
    group, site = people["group"] == "b", people["site"] == "planted-2"
    assert abs(np.mean(site[group]) - 0.8) < 0.12 and abs(np.mean(site[~group]) - 0.2) < 0.12
    average = people["connectivity"].mean((1, 2))
    assert average[site].mean() - average[~site].mean() > 0.08
    # the group is not in the scans, and yet can be told through the site
    assert average[group].mean() - average[~group].mean() > 0.03


def test_site_does_not_go_with_the_group_unless_asked(scans) -> None:
    rows = list(plain(scans, 200, frames=16))
    second = {group: np.mean([row["site"] == "planted-2" for row in rows if row["group"] == group]) for group in "ab"}
    assert abs(second["a"] - second["b"]) < 0.2


def test_groups_are_of_equal_size(scans) -> None:
    groups = [row["group"] for row in plain(scans, 60, frames=16)]
    assert all({*pair} == {"a", "b"} for pair in zip(groups[::2], groups[1::2], strict=True))
    assert {*groups[::2]} == {"a", "b"}


# --- any number of people


def test_person_depends_on_the_seed_and_not_on_how_many_there_are(scans) -> None:
    few, many, other = PlantedCohort(scans, 3), PlantedCohort(scans, 1_000_000), PlantedCohort(scans, 3, seed=1)
    for number in range(3):
        assert few[number].keys() == many[number].keys()
        assert all(np.array_equal(few[number][name], many[number][name]) for name in few[number])
        assert not np.allclose(few[number]["signal"], other[number]["signal"])
    assert many[999_999]["subject"] == "planted-999999"
    with pytest.raises(IndexError, match="a person of 0 to 2, got 3"):
        few[3]


def test_prepared_folder_is_read_by_training_and_by_tasks(scans, tmp_path) -> None:
    folder = tmp_path / "planted-small"
    cohort = PlantedCohort(scans, 6, frames=48)
    write_planted(folder, cohort)
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert list(rows["subject"][:]) == [f"planted-{number:05d}" for number in range(6)]
    assert np.array_equal(rows[2]["signal"], cohort[2]["signal"]) and rows[2]["signal"].dtype == np.float32
    assert not rows[0]["censored"].any() and rows[0]["tr"] == 2.0
    extractor = FmriLMFeatureExtractor(atlases=[Atlas.load("aal2-94")])
    loaded = load_prepared(folder, extractor)
    assert len(loaded) == 6 and {scan.dataset for scan in loaded} <= {"planted-1", "planted-2"}
    assert np.corrcoef(loaded[1].signal[:, 0], cohort[1]["signal"][:, 0])[0, 1] > 0.6
    labels = labels_of(load_task("planted_group"), rows)
    assert labels == [row["group"] for row in cohort]
    labels_of(load_task("age"), rows)
    card = (folder / "README.md").read_text()
    assert "# A planted cohort: made-up scans" in card and "planted_effect 2.0" in card


def test_stopped_cohort_goes_on_and_others_are_refused(scans, tmp_path) -> None:
    folder = tmp_path / "planted"
    write_planted(folder, PlantedCohort(scans, 3, frames=32))
    first = (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns
    write_planted(folder, PlantedCohort(scans, 5, frames=32))
    assert (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns == first
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [key for line in ledger for key in line["keys"]] == [f"planted-{number:05d}" for number in range(5)]
    with pytest.raises(ValueError, match="planted_effect 2.0 instead of 1.0"):
        write_planted(folder, PlantedCohort(scans, 5, 1.0, frames=32))
    with pytest.raises(ValueError, match="planted_source_scans 8 instead of 7"):
        write_planted(folder, PlantedCohort(scans[1:], 5, frames=32))
    with pytest.raises(ValueError, match="a folder with 'planted' in its name, got 'cohort'"):
        write_planted(tmp_path / "cohort", PlantedCohort(scans, 5))
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
def test_cohort_that_cannot_be_planted_is_refused(scans, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PlantedCohort(scans, 4, **options)


def test_program_says_what_cannot_be_planted(tmp_path, capsys) -> None:
    with pytest.raises(typer.Exit) as end:
        planted.main(tmp_path / "planted", subjects=2, effect=40.0)
    assert end.value.exit_code == 1
    assert "error: expected an effect that moves correlations of 'Default' by up to" in capsys.readouterr().err
    assert not (tmp_path / "planted").exists()


def test_scans_of_two_atlases_are_refused(scans) -> None:
    with pytest.raises(ValueError, match="scans of one atlas, got \\['aal2-94', 'small'\\]"):
        PlantedCohort([*scans, prepared("a")], 4)
    with pytest.raises(ValueError, match="no open scans of atlas 'glasser-360'"):
        training_scans("glasser-360")
