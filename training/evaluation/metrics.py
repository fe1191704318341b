"""
How good answers are, and how sure that is: metrics with bootstrap intervals over subjects.

Every metric takes arrays over rows (one answer each) and `weights` [..., rows], how often each row counts, and gives
[...]: one value for each way of weighting. That is how a bootstrap becomes a few matrix products. A metric is NaN
where the rows that count do not define it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


BOOTSTRAPS = 2000
CALIBRATION_BINS = 10
# answers that could not be parsed: never right, and no class of their own
UNPARSED = -1
# cells of weights held at a time
CHUNK = 20_000_000
# weights [..., rows] to values [...], NaN where undefined
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Answers:
    """
    Answers to rows of questions: classes int [rows], `UNPARSED` where there is none, and perhaps probabilities
    [rows, classes]; or values float [rows].
    """

    classes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    values: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Answers":
        """The answers in other places: those to `rows` int [rows]."""
        kinds = (self.classes, self.probabilities, self.values)
        return Answers(*(None if kind is None else kind[rows] for kind in kinds))


@dataclass(frozen=True)
class Estimate:
    """
    A metric and its 95 % interval over subjects, None where it is undefined; `undefined` of the `draws` left it
    undefined and are not in the interval.
    """

    value: float | None
    interval: tuple[float, float] | None
    draws: int
    undefined: int

    def to_dict(self) -> dict:
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "draws": self.draws,
            "undefined_draws": self.undefined,
        }


def bootstrap(statistic: Statistic, subjects: np.ndarray, draws: int = BOOTSTRAPS, seed: int = 0) -> Estimate:
    """
    A statistic and its percentile interval when subjects are drawn with replacement, each with all of its rows.

    Args:
        subjects: whose each row is, [rows].
    """
    names, rows = np.unique(np.asarray(subjects), return_inverse=True)
    if not len(names):
        raise ValueError("expected at least one subject to draw from, got none")
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // len(rows))
    sampled = []
    for start in range(0, draws, chunk):
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(chunk, draws - start))
        sampled.append(statistic(counts[:, rows].astype(float)))
    sampled = np.concatenate(sampled)
    defined = sampled[~np.isnan(sampled)]
    value = float(statistic(np.ones(len(rows))))
    interval = None
    if len(defined) and not np.isnan(value):
        low, high = np.quantile(defined, [0.025, 0.975])
        interval = (float(low), float(high))
    return Estimate(None if np.isnan(value) else value, interval, draws, draws - len(defined))


def accuracy(truth: np.ndarray, answers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of right answers; truth, answers: int [rows]."""
    return _mean(truth == answers, weights)


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
    # a class without truth in a draw leaves it undefined, as in balanced accuracy
    return np.where(truths > 0, _ratio(2 * hits, truths + given), np.nan).mean(-1)


def roc_auc(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Area under the ROC curve, ties counted half: of the two classes, or the mean of one against the rest over the
    classes that occur. truth: int [rows]; probabilities: [rows, classes]. NaN for a single class.
    """
    classes = np.unique(truth)
    if len(classes) < 2:
        return np.full(weights.shape[:-1], np.nan)
    return np.mean([_binary_auc(truth == k, probabilities[:, k], weights) for k in classes], 0)


def _binary_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs of a positive and a negative row of which the positive one has the higher score."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    above, below = (np.add.reduceat((weights * mask)[..., order], starts, axis=-1) for mask in (positive, ~positive))
    wins = (above * (below.cumsum(-1) - below / 2)).sum(-1)
    return _ratio(wins, above.sum(-1) * below.sum(-1))


def calibration_error(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Expected calibration error (Guo et al. 2017): how far the share of right answers is from the probability of the
    likeliest answer, mean over `CALIBRATION_BINS` bins of that probability by their weight.
    """
    confidence = probabilities.max(-1)
    gap = (probabilities.argmax(-1) == truth) - confidence
    members = calibration_bins(confidence)[:, None] == np.arange(CALIBRATION_BINS)
    return _ratio(np.abs(weights @ (members * gap[:, None])).sum(-1), weights.sum(-1))


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin int [rows] of each probability; bins are closed below."""
    return np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def mean_absolute_error(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """In the unit of the truth."""
    return _mean(np.abs(truth - values), weights)


def pearson_r(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of truth and values; NaN where either is constant."""
    # centred once, so that subtracting squares loses nothing
    x, y = truth - truth.mean(), values - values.mean()
    mean_x, mean_y = _mean(x, weights), _mean(y, weights)
    covariance = _mean(x * y, weights) - mean_x * mean_y
    variances = [_mean(x * x, weights) - mean_x**2, _mean(y * y, weights) - mean_y**2]
    rounding = [1e-12 * (z * z).mean() for z in (x, y)]
    varies = (variances[0] > rounding[0]) & (variances[1] > rounding[1])
    return _ratio(covariance, np.where(varies, np.sqrt(np.abs(variances[0] * variances[1])), 0))


def statistics(truth: np.ndarray, draws: Sequence[Answers]) -> dict[str, Statistic]:
    """
    All metrics that the answers have; of several draws of training subjects, which answered the same rows, the mean.
    truth: int [rows] class, or float [rows].
    """
    first = draws[0]
    if first.values is not None:
        found = {"mean_absolute_error": ("values", mean_absolute_error), "pearson_r": ("values", pearson_r)}
    else:
        found = {
            "accuracy": ("classes", accuracy),
            "balanced_accuracy": ("classes", balanced_accuracy),
            "f1": ("classes", macro_f1),
        }
    if first.probabilities is not None:
        found |= {
            "roc_auc": ("probabilities", roc_auc),
            "calibration_error": ("probabilities", calibration_error),
        }

    def mean_over_draws(kind: str, metric: Callable) -> Statistic:
        return lambda weights: np.mean([metric(truth, getattr(draw, kind), weights) for draw in draws], 0)

    return {name: mean_over_draws(kind, metric) for name, (kind, metric) in found.items()}


def among(statistic: Statistic, rows: np.ndarray) -> Statistic:
    """The statistic of some rows alone, bool [rows]."""
    return lambda weights: statistic(weights * rows)


def minus(statistic: Statistic, other: Statistic) -> Statistic:
    """The difference of two statistics when the same subjects are drawn for both."""
    return lambda weights: statistic(weights) - other(weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _ratio(weights @ values.astype(float), weights.sum(-1))


def _one_hot(truth: np.ndarray) -> np.ndarray:
    """[rows, classes that occur]."""
    return (truth[:, None] == np.unique(truth)).astype(float)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
