"""Ridge regression of many targets at once, with penalties chosen, and predictions made, out of fold by subject."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data.splits import subject_folds


PENALTIES = tuple(10.0**power for power in np.arange(-3, 2.1, 0.5))


@dataclass(frozen=True)
class Ridge:
    """
    weight [features, targets] and bias [targets] of all rows; out_of_fold [rows, targets]: predictions for each row,
    with a target or without, by rows of other subjects alone, NaN where these have no two different targets;
    r_squared [targets]: of these, NaN without any.
    """

    weight: np.ndarray
    bias: np.ndarray
    out_of_fold: np.ndarray
    r_squared: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight + self.bias


def cross_fitted_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    subjects: np.ndarray,
    seed: int = 0,
    blocks: Sequence[int] | None = None,
    apart: int = 0,
) -> Ridge:
    """
    Args:
        features: [rows, features], standardised here. targets: [rows, targets], NaN where unknown.
        subjects: [rows]; all rows of a subject are in one fold (see `subject_folds`).
        blocks: sizes of groups of features that follow one another. Features count alike, or groups do, so that a few
            features beside thousands weigh as much: whichever predicts a target better. By default, one group.

    The penalty of each target is the one of `PENALTIES` (of features whose squares sum to one on average) with the
    least out-of-fold error.
    """
    if apart:
        first = cross_fitted_ridge(features[:, :-apart], targets, subjects, seed, blocks)
        return _stacked(first, cross_fitted_ridge(features[:, -apart:], targets, subjects, seed), targets)
    if len(set(subjects)) < 2:
        raise ValueError(f"expected at least 2 subjects to fit scores on, got {len(set(subjects))}")
    folds = subject_folds(subjects, seed)
    mean, std = features.mean(0), features.std(0)
    scale = 1 / (np.where(std > 1e-8 * std.max(initial=1e-12), std, np.inf) * np.sqrt(features.shape[1]))
    sizes = np.array(blocks or [features.shape[1]])
    balance = np.repeat(np.sqrt(sizes.sum() / (len(sizes) * sizes)), sizes)
    scales = [scale] if len(sizes) == 1 else [scale, scale * balance]
    inputs = [((features - mean) * each).astype(np.float64) for each in scales]
    known = np.isfinite(targets)
    weight = np.zeros((features.shape[1], targets.shape[1]))
    bias = np.zeros(targets.shape[1])
    out_of_fold = np.full(targets.shape, np.nan)
    patterns, pattern_of = np.unique(known, axis=1, return_inverse=True)
    # targets that the same rows have are solved for together
    for number, rows in enumerate(patterns.T):
        columns = np.flatnonzero(pattern_of.ravel() == number)
        if rows.sum() < 2:
            continue
        y = targets[:, columns].astype(np.float64)
        # [scales, penalties, rows, columns]
        found = np.full((len(inputs), len(PENALTIES), *y.shape), np.nan)
        for fold in np.unique(folds):
            training, test = rows & (folds != fold), np.flatnonzero(folds == fold)
            if not training.any():
                continue
            # with one target in all folds but one, predictions would differ as that fold's targets do, the other way
            differ = np.flatnonzero(np.ptp(y[training], axis=0))
            for place, each in enumerate(inputs):
                predicted = _path(each[training], y[training][:, differ], each[test])
                found[place][:, test[:, None], differ] = predicted
        found = found.reshape(-1, *y.shape)
        errors = np.nansum((found - y) ** 2, axis=1)
        best = errors.argmin(0)
        out_of_fold[:, columns] = found[best, :, np.arange(len(columns))].T
        y = y[rows]
        for choice in np.unique(best):
            place, penalty = divmod(int(choice), len(PENALTIES))
            chosen = columns[best == choice]
            solved = _solve(inputs[place][rows], y[:, best == choice], PENALTIES[penalty])
            weight[:, chosen] = solved * scales[place][:, None]
        bias[columns] = y.mean(0) - features[rows].mean(0) @ weight[:, columns]
    return Ridge(weight, bias, out_of_fold, _r_squared(targets, out_of_fold))


def _stacked(first: Ridge, second: Ridge, targets: np.ndarray) -> Ridge:
    """
    For each target, the first's predictions, or the sum of both in standard deviations if that is nearer out of fold,
    on the scale of the target (stacked regression, Breiman 1996, with equal weights: those that out-of-fold
    predictions ask for lean on the second, whose features were found in the same rows).
    """
    weight = np.concatenate([first.weight, np.zeros_like(second.weight)])
    bias, out_of_fold = first.bias.copy(), first.out_of_fold.copy()
    for column, y in enumerate(targets.T):
        parts = [ridge.out_of_fold[:, column] for ridge in (first, second)]
        known = np.isfinite(parts[0]) & np.isfinite(y)
        # predictions without any weight are the means of the other folds
        if not known.any() or not all(ridge.weight[:, column].any() for ridge in (first, second)):
            continue
        shares = [1 / part[known].std() for part in parts]
        total = parts[0] * shares[0] + parts[1] * shares[1]
        slope, level = np.polyfit(total[known], y[known], 1)
        if slope <= 0 or ((level + slope * total - y)[known] ** 2).sum() >= ((parts[0] - y)[known] ** 2).sum():
            continue
        shares = [slope * share for share in shares]
        weight[:, column] = np.concatenate([first.weight[:, column] * shares[0], second.weight[:, column] * shares[1]])
        bias[column] = level + first.bias[column] * shares[0] + second.bias[column] * shares[1]
        out_of_fold[:, column] = level + slope * total
    return Ridge(weight, bias, out_of_fold, _r_squared(targets, out_of_fold))


def _r_squared(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """[targets] of [rows, targets], over rows with a target that are predicted."""
    predicted = np.isfinite(predictions) & np.isfinite(targets)
    values = np.where(predicted, targets, 0)
    around_mean = np.where(predicted, values - values.sum(0) / predicted.sum(0).clip(min=1), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        missed = np.where(predicted, targets - predictions, 0)
        return 1 - (missed**2).sum(0) / (around_mean**2).sum(0)


def _path(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Predictions [penalties, new rows, targets]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, new = x - x_mean, new - x_mean
    values, vectors = np.linalg.eigh(x @ x.T if len(x) < x.shape[1] else x.T @ x)
    values = values.clip(min=0)
    if len(x) < x.shape[1]:
        left, right = new @ (x.T @ vectors), vectors.T @ (y - y_mean)
    else:
        left, right = new @ vectors, vectors.T @ (x.T @ (y - y_mean))
    return np.stack([(left / (values + penalty)) @ right for penalty in _penalties(len(x))]) + y_mean


def _solve(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = penalty * len(x) / 1000
    if len(x) < x.shape[1]:
        return x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


def _penalties(rows: int) -> list[float]:
    # as many rows more, as much more evidence against the same penalty
    return [penalty * rows / 1000 for penalty in PENALTIES]
