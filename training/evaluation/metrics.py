"""
How good answers are, and how sure that is: metrics with bootstrap intervals over subjects.

Every metric takes arrays over rows (one answer each) and `weights` [..., rows], how often each row counts, and gives
[...]: one value for each way of weighting. That is how a bootstrap becomes a few matrix products. A metric is NaN
where the rows that count do not define it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


RESAMPLES = 2000
CALIBRATION_BINS = 10
# cells of weights held at a time
CHUNK = 20_000_000
# weights [..., rows] to values [...], NaN where undefined
Statistic = Callable[[np.ndarray], np.ndarray]


def distributions(
    statistics: Mapping[str, Statistic], subjects: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """
    Values [1 + resamples] of each statistic: of the rows as they are, then when subjects are resampled, each with all
    of its rows. The resamples are the same for all statistics, and for every call about these subjects, so that the
    difference of two is that of their values.

    Args:
        subjects: whose each row is, [rows].
    """
    names, rows = np.unique(np.asarray(subjects), return_inverse=True)
    if not len(names):
        raise ValueError("expected at least one subject to resample, got none")
    rng = np.random.default_rng(seed)
    found = {name: [statistic(np.ones((1, len(rows))))] for name, statistic in statistics.items()}
    chunk = max(1, CHUNK // len(rows))
    for start in range(0, resamples, chunk):
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(chunk, resamples - start))
        weights = counts[:, rows].astype(float)
        for name, statistic in statistics.items():
            found[name].append(statistic(weights))
    return {name: np.concatenate(values) for name, values in found.items()}


def estimate(values: np.ndarray) -> dict:
    """
    {"value", "interval", "resamples", "undefined_resamples"} of values as `distributions` gives them: the 95 %
    percentile interval. value and interval are None where undefined; resamples that leave the statistic undefined are
    not in the interval.
    """
    value, sampled = values[0], values[1:]
    defined = sampled[~np.isnan(sampled)]
    interval = None
    if len(defined) and not np.isnan(value):
        interval = [float(bound) for bound in np.quantile(defined, [0.025, 0.975])]
    return {
        "value": None if np.isnan(value) else float(value),
        "interval": interval,
        "resamples": len(sampled),
        "undefined_resamples": len(sampled) - len(defined),
    }


def bootstrap(statistic: Statistic, subjects: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """The `estimate` of one statistic."""
    return estimate(distributions({"": statistic}, subjects, resamples, seed)[""])


def accuracy(truth: np.ndarray, answers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of right answers; truth, answers: int [rows]."""
    return mean(truth == answers, weights)


def mean_recall(hits: np.ndarray, members: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Mean over the classes that occur of the share answered right, from how much of each class a row holds and how
    much of it was answered right: [rows, classes]. NaN where a class that occurs has no weight: answering one class
    alone would score above chance there.
    """
    occurs = members.any(0)
    return _ratio(weights @ hits[:, occurs], weights @ members[:, occurs]).mean(-1)


def balanced_accuracy(truth: np.ndarray, answers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that occur in `truth`; truth, answers: int [rows]."""
    members = _one_hot(truth)
    return mean_recall(members * (truth == answers)[:, None], members, weights)


def macro_f1(truth: np.ndarray, answers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 score of the classes that occur in `truth`; truth, answers: int [rows]."""
    classes = np.unique(truth)
    members = _one_hot(truth)
    answered = (answers[:, None] == classes).astype(float)
    hits, truths, given = (weights @ table for table in (members * answered, members, answered))
    # a class without truth in a resample leaves it undefined, as in balanced accuracy
    return np.where(truths > 0, _ratio(2 * hits, truths + given), np.nan).mean(-1)


def roc_auc(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Area under the ROC curve, ties counted half: of the two classes, or the mean of one against the rest over the
    classes that occur. truth: int [rows]; probabilities: [rows, classes]. NaN for a single class.
    """
    classes = np.unique(truth)
    if len(classes) < 2:
        return np.full(weights.shape[:-1], np.nan)
    return np.mean([_ratio(*_pairs(truth == k, probabilities[:, k], weights)) for k in classes], 0)


def within_site_auc(
    truth: np.ndarray, probabilities: np.ndarray, sites: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """
    ROC-AUC over pairs of rows of one site alone: what a site's share of each class predicts counts for nothing. sites:
    [rows]. Sites without pairs do not count; NaN without any pair.
    """
    classes = np.unique(truth)
    found = []
    for label in classes[1:] if len(classes) == 2 else classes:
        wins, pairs = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
        for site in np.unique(sites):
            rows = np.flatnonzero(sites == site)
            of_site = _pairs(truth[rows] == label, probabilities[rows, label], weights[..., rows])
            wins, pairs = wins + of_site[0], pairs + of_site[1]
        found.append(_ratio(wins, pairs))
    return np.mean(found, 0)


def _pairs(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs of a positive and a negative row there are with the positive one higher, and in all."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    above, below = (np.add.reduceat((weights * mask)[..., order], starts, axis=-1) for mask in (positive, ~positive))
    wins = (above * (below.cumsum(-1) - below / 2)).sum(-1)
    return wins, above.sum(-1) * below.sum(-1)


def calibration_error(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Expected calibration error (Guo et al. 2017): how far the share of right answers is from the probability of the
    likeliest answer, mean over `CALIBRATION_BINS` bins of that probability by their weight.
    """
    confidence = probabilities.max(-1)
    gap = (probabilities.argmax(-1) == truth) - confidence
    # closed below
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    members = bins[:, None] == np.arange(CALIBRATION_BINS)
    return _ratio(np.abs(weights @ (members * gap[:, None])).sum(-1), weights.sum(-1))


def mean_absolute_error(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """In the unit of the truth."""
    return mean(np.abs(truth - values), weights)


def pearson_r(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of truth and values; NaN where either is constant."""
    # centred once, so that subtracting squares loses nothing
    x, y = truth - truth.mean(), values - values.mean()
    mean_x, mean_y = mean(x, weights), mean(y, weights)
    covariance = mean(x * y, weights) - mean_x * mean_y
    variances = [mean(x * x, weights) - mean_x**2, mean(y * y, weights) - mean_y**2]
    rounding = [1e-12 * (z * z).mean() for z in (x, y)]
    varies = (variances[0] > rounding[0]) & (variances[1] > rounding[1])
    return _ratio(covariance, np.where(varies, np.sqrt(np.abs(variances[0] * variances[1])), 0))


def statistics(
    truth: np.ndarray, answers: Sequence[np.ndarray], sites: np.ndarray | None = None
) -> dict[str, Statistic]:
    """
    All metrics of answers to the same rows, mean over `answers`, one array for each resample of training subjects:
    probabilities [rows, choices] where truth is int [rows], values [rows] where it is float [rows]. sites: [rows].
    """

    def over_resamples(metric: Callable, given: Sequence[np.ndarray] = answers) -> Statistic:
        return lambda weights: np.mean([metric(truth, each, weights) for each in given], 0)

    if truth.dtype.kind == "f":
        return {"mean_absolute_error": over_resamples(mean_absolute_error), "pearson_r": over_resamples(pearson_r)}
    likeliest = [each.argmax(-1) for each in answers]
    found = {
        "accuracy": over_resamples(accuracy, likeliest),
        "balanced_accuracy": over_resamples(balanced_accuracy, likeliest),
        "f1": over_resamples(macro_f1, likeliest),
        "roc_auc": over_resamples(roc_auc),
        "calibration_error": over_resamples(calibration_error),
    }
    if sites is not None:
        found["within_site_auc"] = over_resamples(
            lambda truth, each, weights: within_site_auc(truth, each, sites, weights)
        )
    return found


def among(statistic: Statistic, rows: np.ndarray) -> Statistic:
    """The statistic of some rows alone, bool [rows]."""
    return lambda weights: statistic(weights * rows)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of values [rows]."""
    return _ratio(weights @ values.astype(float), weights.sum(-1))


def _one_hot(truth: np.ndarray) -> np.ndarray:
    """[rows, classes that occur]."""
    return (truth[:, None] == np.unique(truth)).astype(float)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
