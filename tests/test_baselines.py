"""Baselines are fitted on training subjects alone, and equal those of the libraries."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from nilearn.connectome import ConnectivityMeasure
from sklearn.covariance import ShrunkCovariance
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation import baselines
from fmrilm.training.evaluation.baselines import (
    Baselines,
    correlations,
    covariates,
    fisher_z,
    ridge_probabilities,
    ridge_values,
    shuffle_subjects,
    tangent,
)
from fmrilm.training.evaluation.scans import Labelled
from helpers import joined, labelled_atlas, scans_of


def signals(count: int, rois: int = len(labelled_atlas())) -> np.ndarray:
    """[scans, 60 frames, ROIs]"""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((rois, rois))
    return rng.standard_normal((count, 60, rois)) @ mixing


def labelled(rows: int, features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rows of each subject; the first feature holds the class."""
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(rows // 2) % 2, 2)
    values = rng.standard_normal((rows, features))
    values[:, 0] += 3 * classes
    return values, classes, np.array([f"sub-{i // 2}" for i in range(rows)])


def test_features_are_the_fisher_z_of_the_upper_triangle() -> None:
    some = signals(3)
    found = fisher_z(correlations(scans_of(some, labelled_atlas())), np.arange(2))
    expected = np.arctanh(np.corrcoef(some[2].T)[np.triu_indices(some.shape[-1], k=1)])
    np.testing.assert_allclose(found[2], expected, atol=1e-4)


def test_tangent_features_are_those_of_nilearn() -> None:
    some, training = signals(12), np.arange(8)
    series = [(signal - signal.mean(0)) / signal.std(0) for signal in some]
    measure = ConnectivityMeasure(cov_estimator=ShrunkCovariance(shrinkage=baselines.SHRINKAGE), kind="tangent")
    expected = measure.fit(series[:8]).transform(series)
    found = tangent(correlations(scans_of(some, labelled_atlas())), training)
    upper = np.triu_indices(expected.shape[-1])
    scaled = expected[:, *upper] * np.where(upper[0] == upper[1], np.sqrt(0.5), 1)
    np.testing.assert_allclose(found, scaled, atol=1e-4)


def test_missing_rois_are_filled_from_training_scans() -> None:
    some, training = signals(12), np.arange(8)
    whole = correlations(scans_of(some, labelled_atlas()))
    some[[2, 10], :, 3] = np.nan
    holed = correlations(scans_of(some, labelled_atlas()))
    assert np.isnan(holed[10, 3]).all() and np.isnan(holed[10]).sum() == 2 * whole.shape[-1] - 1
    found = fisher_z(holed, training)
    pair = list(zip(*np.triu_indices(whole.shape[-1], k=1), strict=True)).index((3, 4))
    known = np.delete(training, 2)
    assert found[10, pair] == pytest.approx(np.arctanh(whole[known, 3, 4]).mean(), abs=1e-4)
    features = tangent(holed, training)
    assert np.isfinite(features).all()
    # what the others predict is nearer to the truth than nothing: the features of uncorrelated ROIs
    truth = tangent(whole, training)[10]
    unrelated = np.where(np.isnan(holed), np.eye(whole.shape[-1]), holed)
    assert np.abs(features[10] - truth).sum() < np.abs(tangent(unrelated, training)[10] - truth).sum()


def test_scans_of_several_atlases_are_compared_by_the_networks_they_share() -> None:
    few = labelled_atlas({"Vis": 3, "Default": 5, "Cont": 2}, name="few")
    [other], whole = signals(1, len(few)), scans_of(signals(1), labelled_atlas())
    means = [other[:, np.array(few.networks) == name] for name in ("Vis", "Cont", "Default")]
    series = [((part - part.mean(0)) / part.std(0)).mean(1) for part in means]
    found = correlations(joined(whole, scans_of([other], few)))[1]
    np.testing.assert_allclose(found, np.corrcoef(series), atol=1e-5)
    two = scans_of(signals(1, 7), labelled_atlas({"Vis": 3, "Cont": 4}, name="two"))
    with pytest.raises(ValueError, match="atlases .made-up, two.*at least 3 that all scans have, got 2: Vis, Cont"):
        correlations(joined(whole, two))


def test_covariates_leave_out_the_label_and_use_the_training_mean() -> None:
    table = pd.DataFrame({"site": list("xyxy"), "age": [10.0, 20, np.nan, 90], "sex": list("FMFM"), "other": range(4)})
    found = covariates(table, np.arange(3), without=["sex"])
    # zeros, two sites, age
    assert found.shape == (4, 4)
    np.testing.assert_allclose(found[:, 3], [-1, 1, 0, 15])
    assert covariates(table[["other"]], np.arange(3), ["other"]).shape == (4, 1)


ABIDE = pd.DataFrame(
    {"SITE_ID": list("xyxy"), "SEX": list("FMFM"), "AGE_AT_SCAN": [10.0, 20, 30, 90], "func_mean_fd": [0.1, 0.2, 0, 1]}
)


@pytest.mark.parametrize(
    ("without", "left"),
    [
        ("DX_GROUP", ["SITE_ID", "SEX", "AGE_AT_SCAN", "func_mean_fd"]),
        # names of one covariate exclude each other
        ("SEX", ["SITE_ID", "AGE_AT_SCAN", "func_mean_fd"]),
        ("gender", ["SITE_ID", "AGE_AT_SCAN", "func_mean_fd"]),
        ("age", ["SITE_ID", "SEX", "func_mean_fd"]),
        ("mean_fd", ["SITE_ID", "SEX", "AGE_AT_SCAN"]),
        ("site", ["SEX", "AGE_AT_SCAN", "func_mean_fd"]),
    ],
)
def test_covariates_are_found_and_left_out_by_any_of_their_names(without: str, left: list[str]) -> None:
    plain = {"SITE_ID": "site", "SEX": "sex", "AGE_AT_SCAN": "age", "func_mean_fd": "mean_fd"}
    expected = covariates(ABIDE[left].rename(columns=plain), np.arange(3), [])
    assert expected.shape[1] == 1 + len(left) + len({"SITE_ID", "SEX"} & set(left))
    np.testing.assert_array_equal(covariates(ABIDE, np.arange(3), [without]), expected)


def test_a_covariate_is_one_column_however_many_of_its_names_are_there() -> None:
    alone, training = covariates(ABIDE, np.arange(3), []), np.arange(3)
    # the first name goes before the others, unless it is empty
    more = ABIDE.assign(site=list("uuvw"), Gender=list("FFFM"), age=None, mean_framewise_displacement=0.5)
    found = covariates(more, training, [])
    np.testing.assert_array_equal(found[:, 4:], alone[:, 3:])
    np.testing.assert_array_equal(found[:, 1:4], pd.get_dummies(more["site"]))
    # a label of another name than its task's first one
    assert covariates(more, training, ["age", "AGE_AT_SCAN"]).shape[1] == found.shape[1] - 1


@pytest.mark.parametrize("sites", [list("0123"), [0, 1, 2, 3], [0.0, 1, 2, np.nan], [1, 2, "1b", None]])
def test_sites_and_sexes_are_categories_also_where_they_are_written_as_numbers(sites: list) -> None:
    table = pd.DataFrame({"site": sites, "sex": [1, 2, 1, 2], "age": list("1234"), "mean_fd": [0.0, 1, 2, 3]})
    found, known = covariates(table, np.arange(4), []), table["site"].notna().sum()
    # zeros, one column for each site and each sex, two numbers
    assert found.shape == (4, 1 + known + 2 + 2)
    np.testing.assert_array_equal(found[:, 1 : known + 1], np.eye(4)[:, :known])
    np.testing.assert_array_equal(found[:, known + 1 : -2], [[1, 0], [0, 1]] * 2)
    np.testing.assert_allclose(found[:, -2], found[:, -1])


def test_covariates_do_not_hold_a_label_that_stands_under_another_name_of_the_task() -> None:
    ages, rows = np.array([10.0, 90, 30, 20]), np.arange(4)
    scans = scans_of(signals(4), labelled_atlas(), SEX=[1, 2, 1, 2], AGE_AT_SCAN=ages)
    task = replace(load_task("age"), column="years")
    assert task.other_columns == ("AGE_AT_SCAN",)
    found = Baselines(scans, {}).answers("covariates", Labelled.read(task, scans), rows, rows, rows)["values"]
    features = covariates(scans.table[["SEX"]], rows, [])
    np.testing.assert_allclose(found, ridge_values(features @ features.T, rows, rows, ages, scans.table["subject"]))


def test_blocks_of_features_weigh_alike_however_many_they_hold() -> None:
    rows, rng = np.arange(12), np.random.default_rng(0)
    scans = scans_of(signals(12), labelled_atlas(), age=rng.uniform(10, 60, 12))
    first, second = rng.standard_normal((12, 6)), rng.standard_normal((12, 2))
    blocks = {
        "once": [first, second],
        "repeated": [first, np.tile(second, 5)],
        "joined": [np.concatenate([first, second], 1)],
    }
    fitted = Baselines(scans, {name: lambda each=each: each for name, each in blocks.items()})
    known = Labelled.read(load_task("age"), scans)
    found = {name: fitted.answers(name, known, rows, rows[:8], rows[8:])["values"] for name in blocks}
    np.testing.assert_allclose(found["once"], found["repeated"])
    assert not np.allclose(found["once"], found["joined"])


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_regression_in_the_gram_matrix_is_ridge(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PENALTIES", np.array([penalty]))
    features, _, subjects = labelled(30, 50)
    values, training, test = features[:, 0] + 5, np.arange(24), np.arange(24, 30)
    centred = features[training] - features[training].mean(0)
    alpha = penalty * np.trace(centred @ centred.T) / 24
    expected = Ridge(alpha=alpha).fit(features[training], values[training]).predict(features[test])
    found = ridge_values(features @ features.T, training, test, values[training], subjects[training])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ridge_finds_classes_and_values_of_new_subjects() -> None:
    features, classes, subjects = labelled(160, 300)
    gram, training, test = features @ features.T, np.arange(120), np.arange(120, 160)
    found = ridge_probabilities(gram, training, test, classes[training], subjects[training], 2)
    np.testing.assert_allclose(found.sum(1), 1)
    assert roc_auc_score(classes[test], found[:, 1]) > 0.75
    # about as sure as it is right
    assert found.max(1).mean() == pytest.approx((found.argmax(1) == classes[test]).mean(), abs=0.15)
    few = features[:, :20] @ features[:, :20].T
    values = 40 + 10 * features[:, 0]
    assert np.abs(ridge_values(few, training, test, values[training], subjects[training]) - values[test]).mean() < 3


def test_test_rows_change_nothing_about_the_fit() -> None:
    features, classes, subjects = labelled(40, 30)
    training, changed = np.arange(30), features.copy()
    changed[35:] += 100
    first, second = (
        ridge_probabilities(each @ each.T, training, np.array([31]), classes[training], subjects[training], 2)
        for each in (features, changed)
    )
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_few_subjects_are_enough_and_unseen_classes_improbable(count: int) -> None:
    features, classes, subjects = labelled(20, 40)
    rows = np.sort(np.concatenate([np.flatnonzero(classes == label)[: count // 2] for label in (0, 1)]))
    gram = features @ features.T
    found = ridge_probabilities(gram, rows, np.arange(20), 2 * classes[rows], subjects[rows], 4)
    assert found.shape == (20, 4) and np.isfinite(found).all()
    assert (found[:, [1, 3]].max(1) < found[:, [0, 2]].max(1)).all()
    values = ridge_values(gram, rows, np.arange(20), classes[rows] + 0.0, subjects[rows])
    assert np.isfinite(values).all()


def test_a_rare_class_is_told_as_well_as_its_scores_allow() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [100, 100, 12])
    features = rng.standard_normal((212, 40))
    features[:, 0] += 2.0 * (classes == 1)
    features[:, 1] += 3.0 * (classes == 2)
    rows = rng.permutation(212)
    training, test = rows[:140], rows[140:]
    found = ridge_probabilities(features @ features.T, training, test, classes[training], training.astype(str), 4)
    assert np.allclose(found.sum(1), 1) and not found[:, 3].any()
    assert roc_auc_score(classes[test] == 2, found[:, 2]) > 0.9


def test_shuffled_scans_are_of_another_subject_of_the_same_group() -> None:
    subjects = np.array([f"sub-{i}" for i in (0, 0, 1, 2, 2, 3, 4, 5)])
    groups = np.array(["x", "x", "x", "x", "x", "y", "y", "lonely"])
    shuffled = shuffle_subjects(subjects, groups, seed=0)
    assert shuffled[-1] == -1
    for row, other in enumerate(shuffled[:-1]):
        assert groups[other] == groups[row] and subjects[other] != subjects[row]
    # everyone's scan is somebody else's once
    assert sorted(set(subjects[shuffled[:5]])) == ["sub-0", "sub-1", "sub-2"]
    assert any((shuffle_subjects(subjects, groups, seed) != shuffled).any() for seed in range(1, 5))


def test_shuffled_scans_are_of_any_condition_where_all_subjects_have_the_same_ones() -> None:
    subjects, conditions = np.repeat(np.arange(30), 4), np.tile(np.arange(4), 30)
    shuffled = shuffle_subjects(subjects, np.zeros(120), seed=0)
    assert sorted(shuffled) == list(range(120)) and (subjects[shuffled] != subjects).all()
    assert 0.1 < (conditions[shuffled] == conditions).mean() < 0.4
