"""Metrics are scikit-learn's, and their intervals are over subjects."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from fmrilm.training.evaluation import metrics
from fmrilm.training.evaluation.metrics import bootstrap, distributions


def answers_of(seed: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, probabilities with ties, and how often each row counts."""
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(classes, size=rows)]
    probabilities = rng.integers(1, 5, size=(len(truth), classes)).astype(float)
    return truth, probabilities / probabilities.sum(1, keepdims=True), rng.integers(1, 4, size=len(truth))


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 40), classes=st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_metrics_of_classes_equal_those_of_scikit_learn(seed: int, rows: int, classes: int) -> None:
    truth, probabilities, counts = answers_of(seed, rows, classes)
    answers = probabilities.argmax(1)
    repeated = np.repeat(truth, counts), np.repeat(answers, counts)
    scores = np.repeat(probabilities[:, 1] if classes == 2 else probabilities, counts, axis=0)
    expected = {
        metrics.accuracy: sklearn.metrics.accuracy_score(*repeated),
        metrics.balanced_accuracy: sklearn.metrics.balanced_accuracy_score(*repeated),
        metrics.macro_f1: sklearn.metrics.f1_score(*repeated, average="macro"),
        metrics.roc_auc: sklearn.metrics.roc_auc_score(repeated[0], scores, multi_class="ovr"),
    }
    for metric, value in expected.items():
        second = probabilities if metric is metrics.roc_auc else answers
        several = metric(truth, second, np.stack([counts, 2 * counts]).astype(float))
        np.testing.assert_allclose(several, value, atol=1e-12, err_msg=metric.__name__)


@given(seed=st.integers(0, 10**6), rows=st.integers(4, 40), shift=st.sampled_from([0.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_metrics_of_numbers_equal_those_of_the_libraries(seed: int, rows: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    truth, values = rng.normal(shift, 3, rows), rng.normal(0, 1, rows)
    counts = rng.integers(1, 4, rows)
    repeated = np.repeat(truth, counts), np.repeat(values, counts)
    weights = counts.astype(float)
    error = metrics.mean_absolute_error(truth, values, weights)
    assert error == pytest.approx(sklearn.metrics.mean_absolute_error(*repeated))
    assert metrics.pearson_r(truth, values, weights) == pytest.approx(pearsonr(*repeated).statistic, abs=1e-9)


def test_correlation_with_a_constant_is_undefined() -> None:
    assert np.isnan(metrics.pearson_r(np.arange(4.0), np.full(4, 0.1), np.ones(4)))


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    # 2 answers of probability 0.9, one right: gap 0.4; 2 of 0.6, both right: gap 0.4; the last one counts thrice
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    truth = np.array([0, 0, 0, 1])
    assert metrics.calibration_error(truth, probabilities, np.ones(4)) == pytest.approx(0.4)
    weights = np.array([1.0, 1, 1, 3])
    assert metrics.calibration_error(truth, probabilities, weights) == pytest.approx((2 * 0.4 + 4 * 0.4) / 6)
    certain = np.eye(2)[truth]
    assert metrics.calibration_error(truth, certain, np.ones(4)) == 0


def test_interval_is_that_of_resampled_subjects() -> None:
    rng = np.random.default_rng(0)
    subjects = np.repeat([f"sub-{i}" for i in range(30)], 3)
    truth = np.repeat(rng.integers(2, size=30), 3)
    answers = np.where(np.repeat(rng.uniform(size=30) < 0.7, 3), truth, 1 - truth)
    estimate = bootstrap(lambda weights: metrics.accuracy(truth, answers, weights), subjects, 4000)
    slow = []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(subjects == name) for name in rng.choice(np.unique(subjects), 30)])
        slow.append(np.mean(truth[rows] == answers[rows]))
    assert estimate["value"] == pytest.approx(np.mean(truth == answers))
    np.testing.assert_allclose(estimate["interval"], np.quantile(slow, [0.025, 0.975]), atol=0.03)
    # scans of one subject say the same thing: as many independent ones would make a narrower interval
    rows = bootstrap(lambda weights: metrics.accuracy(truth, answers, weights), np.arange(90), 4000)
    assert np.ptp(rows["interval"]) < 0.8 * np.ptp(estimate["interval"])


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    truth, answers = np.array([0, 1, 1, 1]), np.array([1, 1, 1, 1])
    estimate = bootstrap(lambda weights: metrics.balanced_accuracy(truth, answers, weights), np.arange(4), 500)
    assert estimate["value"] == 0.5 and estimate["interval"] == [0.5, 0.5]
    # a resample of four misses the only subject of class 0 with probability 0.316
    assert 0.24 < estimate["undefined_resamples"] / estimate["resamples"] < 0.40


def test_a_metric_that_is_never_defined_has_neither_value_nor_interval() -> None:
    found = metrics.statistics(np.zeros(3, int), [np.full((3, 2), 0.5)])
    estimate = bootstrap(found["roc_auc"], np.arange(3), 20)
    assert estimate == {"value": None, "interval": None, "resamples": 20, "undefined_resamples": 20}
    assert bootstrap(found["accuracy"], np.arange(3), 20)["value"] == 1


def test_statistics_are_means_over_the_resamples_of_training_subjects() -> None:
    truth = np.array([0, 1, 0, 1])
    found = metrics.statistics(truth, [np.eye(2)[truth], np.eye(2)[1 - truth], np.eye(2)[[0, 0, 0, 0]]])
    assert found["accuracy"](np.ones(4)) == pytest.approx(0.5) and "within_site_auc" not in found
    numbers = metrics.statistics(truth.astype(float), [truth + 2.0, truth + 4.0])
    assert numbers["mean_absolute_error"](np.ones(4)) == 3


def test_auc_within_sites_counts_pairs_of_one_site() -> None:
    truth, sites = np.array([0, 1, 0, 1, 1]), np.array(["x", "x", "y", "y", "z"])
    scores = np.array([0.6, 0.5, 0.1, 0.2, 0.9])
    probabilities = np.stack([1 - scores, scores], 1)
    # one of the two pairs is in order; the site of one class has none
    assert metrics.within_site_auc(truth, probabilities, sites, np.ones(5)) == 0.5
    assert metrics.within_site_auc(truth, probabilities, sites, np.array([1.0, 3, 1, 1, 1])) == 0.25
    assert np.isnan(metrics.within_site_auc(truth, probabilities, np.arange(5), np.ones(5)))
    one = metrics.within_site_auc(truth, probabilities, np.zeros(5), np.ones((2, 5)))
    np.testing.assert_allclose(one, sklearn.metrics.roc_auc_score(truth, scores))


def test_differences_are_of_the_same_resamples() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=60)
    answers = np.where(rng.uniform(size=60) < 0.6, truth, 1 - truth)
    # wrong on the same subjects and on one more: they differ by one row in each resample that has it
    worse = answers.copy()
    worse[0] = 1 - truth[0]
    answers[0] = truth[0]
    own, other = (metrics.statistics(truth, [np.eye(2)[classes]])["accuracy"] for classes in (answers, worse))
    values = distributions({"own": own, "other": other}, np.arange(60))
    np.testing.assert_array_equal(distributions({"other": other}, np.arange(60))["other"], values["other"])
    difference = metrics.estimate(values["own"] - values["other"])
    low, high = difference["interval"]
    assert difference["value"] == pytest.approx(1 / 60) and 0 <= low < high <= 4 / 60
    rows = np.arange(60) < 20
    assert metrics.among(own, rows)(np.ones(60)) == np.mean(answers[:20] == truth[:20])


def test_large_tables_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole, parts = [], []
    for found, chunk in ((whole, metrics.CHUNK), (parts, 50 * 7)):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        found.append(bootstrap(lambda weights: metrics.mean(values, weights), np.arange(50), 300))
    assert parts[0]["interval"] == pytest.approx(whole[0]["interval"]) and parts[0]["resamples"] == 300


def test_no_subject_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one subject"):
        bootstrap(lambda weights: weights.sum(-1), np.array([]))
