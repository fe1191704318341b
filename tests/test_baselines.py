"""Baselines are fitted on training subjects alone, and another's scan is of the same dataset and site."""

import dataclasses
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from fmrilm.training.evaluation import baselines
from fmrilm.training.evaluation.baselines import (
    connectivity_features,
    logistic_regression,
    majority,
    ridge_regression,
    swap_scans,
)
from helpers import labelled_atlas, prepared


def people(rows: int, features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Two scans of each subject; the first feature tells the class."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(rows // 2) % 2, 2)
    values = rng.standard_normal((rows, features))
    values[:, 0] += 3 * classes
    return values, classes, [f"sub-{i // 2}" for i in range(rows)]


def test_majority_says_how_common_the_answers_are() -> None:
    np.testing.assert_allclose(majority(np.array([0, 2, 2, 2]), 3, rows=2), [[0.25, 0, 0.75]] * 2)


def test_features_are_the_fisher_z_of_the_upper_triangle() -> None:
    scans = [prepared("a"), prepared("b")]
    found = connectivity_features(scans)
    expected = np.arctanh(np.corrcoef(scans[1].signal.T)[np.triu_indices(9, k=1)])
    np.testing.assert_allclose(found[1], expected, atol=1e-5)


def test_scans_of_several_atlases_are_compared_by_the_networks_they_share() -> None:
    whole, few = labelled_atlas(), labelled_atlas({"Vis": 3, "Default": 5, "Cont": 2}, name="few")
    scans = [prepared("a", of=whole), prepared("b", of=few)]
    found = connectivity_features(scans)
    assert found.shape == (2, 3)
    means = [scans[1].signal[:, np.array(few.networks) == name] for name in ("Vis", "Cont", "Default")]
    series = [((part - part.mean(0)) / part.std(0)).mean(1) for part in means]
    np.testing.assert_allclose(np.tanh(found[1]), np.corrcoef(series)[np.triu_indices(3, k=1)], atol=1e-5)


def test_a_missing_roi_leaves_the_networks() -> None:
    whole, other = prepared("a", of=labelled_atlas()), prepared("b", of=labelled_atlas())
    holed = dataclasses.replace(other, signal=np.where(np.arange(len(other.atlas)) == 3, np.nan, other.signal))
    found = connectivity_features([whole, holed])
    assert found.shape == (2, 7 * 6 // 2) and np.isfinite(found).all()


def test_atlases_that_share_too_little_are_refused() -> None:
    scans = [prepared("a", of=labelled_atlas()), prepared("b", of=labelled_atlas({"Vis": 3, "Cont": 4}, name="two"))]
    with pytest.raises(ValueError, match="atlases made-up, two.*at least 3 that all scans have, got 2: Vis, Cont"):
        connectivity_features(scans)


def test_logistic_regression_finds_the_class_of_new_subjects() -> None:
    features, classes, subjects = people(80, 300)
    probabilities = logistic_regression(features[:60], classes[:60], subjects[:60], 2, features[60:])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert roc_auc_score(classes[60:], probabilities[:, 1]) > 0.7


@pytest.mark.parametrize("penalty", [1e4, 1.0])
def test_components_change_nothing_about_the_regressions(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PENALTIES", (penalty,))
    features, classes, subjects = people(30, 50)
    scaler = StandardScaler().fit(features[:24])
    training, test = scaler.transform(features[:24]), scaler.transform(features[24:])
    regression = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-8)
    expected = regression.fit(training, classes[:24]).predict_proba(test)
    found = logistic_regression(features[:24], classes[:24], subjects[:24], 2, features[24:])
    np.testing.assert_allclose(found, expected, atol=1e-3)
    values = features[:, 0] + 5
    expected = Ridge(alpha=penalty).fit(training, values[:24]).predict(test)
    np.testing.assert_allclose(
        ridge_regression(features[:24], values[:24], subjects[:24], features[24:]), expected, atol=1e-6
    )


def test_few_training_subjects_are_enough_for_a_baseline() -> None:
    features, classes, subjects = people(20, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (4, 8):
            found = logistic_regression(features[:count], classes[:count], subjects[:count], 2, features[10:])
            assert found.shape == (10, 2) and np.isfinite(found).all()


@pytest.mark.parametrize(("subjects", "classes"), [("aabbc", [0, 0, 1, 0, 1]), ("aaabbc", [0, 1, 0, 0, 0, 1])])
def test_folds_that_leave_no_row_of_a_class_are_left_out(subjects: str, classes: list[int]) -> None:
    features = np.random.default_rng(0).standard_normal((len(subjects), 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic_regression(features, np.array(classes), list(subjects), 2, features)
    np.testing.assert_allclose(found.sum(1), 1)


def test_two_subjects_are_enough_for_ridge_regression() -> None:
    features = np.array([[1.0, 0.0], [3.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ridge_regression(features, np.array([20.0, 40.0]), ["a", "b"], np.array([[2.0, 0.5]]))
    np.testing.assert_allclose(found, [30])


def test_a_class_that_was_never_seen_has_probability_zero() -> None:
    features, classes, subjects = people(16, 5)
    found = logistic_regression(features, 2 * classes, subjects, 4, features)
    np.testing.assert_array_equal(found[:, [1, 3]], 0)


def test_ridge_regression_tells_the_value_of_new_subjects() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((80, 20))
    values = 40 + 10 * features[:, 0]
    found = ridge_regression(features[:60], values[:60], [f"sub-{i}" for i in range(60)], features[60:])
    assert np.abs(found - values[60:]).mean() < 2


def test_swapped_scans_are_of_another_subject_of_the_same_group() -> None:
    subjects = np.array([f"sub-{i}" for i in (0, 0, 1, 2, 2, 3, 4, 5)])
    groups = np.array(["x", "x", "x", "x", "x", "y", "y", "lonely"])
    swapped = swap_scans(subjects, groups, seed=0)
    assert swapped[-1] == -1
    for row, other in enumerate(swapped[:-1]):
        assert groups[other] == groups[row] and subjects[other] != subjects[row]
    # everyone's scan is somebody else's once
    assert sorted(set(subjects[swapped[:5]])) == ["sub-0", "sub-1", "sub-2"]
    assert any((swap_scans(subjects, groups, seed) != swapped).any() for seed in range(1, 5))
