"""
What every result stands beside: the most frequent answer, covariates, and ridge regression on connectivity or codes.

Everything is fitted on training rows alone; the penalty of a ridge regression is chosen by cross-validation over their
subjects. Regressions work with the Gram matrix [rows, rows] of the features, however many features there are.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from fmrilm.processors.descriptors.networks import NETWORKS, correlation, membership, network_series, standardize


if TYPE_CHECKING:
    from ..data.dataset import Scans
    from .scans import Labelled


# in units of the mean eigenvalue of the training rows' centred Gram matrix, strongest first
PENALTIES = 10.0 ** np.arange(3, -3.1, -0.5)
# slopes of the log-odds in a score, flattest first, and the one where no subject can be left out to choose
SLOPES = 10.0 ** np.arange(-1, 2.1, 0.1)
# of the subject-shuffled control
SHUFFLES = 5
DEFAULT_SLOPE = 2.0
INNER_FOLDS = 5
# correlations of 1, such as those of a network with one ROI, have no Fisher z
LARGEST_CORRELATION = 0.999
# of a correlation matrix towards the identity, so that it has a logarithm
SHRINKAGE = 0.3
# of the geometric mean, by the norm of its gradient over the number of its cells
MEAN_TOLERANCE = 1e-6
MEAN_ITERATIONS = 10
# names that the column of a covariate may have in any case, the first one that is there counts
COVARIATES = {
    "site": ("site", "site_id"),
    "sex": ("sex", "gender"),
    "age": ("age", "age_at_scan"),
    "mean_fd": ("mean_fd", "func_mean_fd", "mean_framewise_displacement"),
}
CATEGORIES = ("site", "sex")
BASELINES = ("majority", "covariates", "fc_ridge", "tangent_ridge", "codes_ridge")


class Baselines:
    """
    Answers of each baseline about scans. features: of other regressions by their name, such as "codes_ridge", blocks
    of float [scans, features] that weigh alike; standardised by training rows.
    """

    def __init__(self, scans: "Scans", features: Mapping[str, Callable[[], Sequence[np.ndarray]]]):
        self.scans = scans
        self.features = features
        self.subjects = scans.table["subject"].astype(str).to_numpy()
        self._grams: dict[tuple, np.ndarray] = {}

    def answers(
        self, name: str, labelled: "Labelled", fold: np.ndarray, training: np.ndarray, test: np.ndarray
    ) -> dict[str, np.ndarray]:
        """
        {"probabilities": [test rows, choices]} or {"values": [test rows]} by the labels of the training rows; what
        needs no label, such as a mean, is fitted on all training rows of the fold.
        """
        truth, choices = labelled.truth[training], labelled.choices
        if name == "majority":
            if not choices:
                return {"values": np.full(len(test), truth.mean())}
            return {"probabilities": np.tile(np.bincount(truth, minlength=choices) / len(truth), (len(test), 1))}
        gram = self._gram(name, fold, (labelled.task.column, *labelled.task.other_columns))
        if not choices:
            return {"values": ridge_values(gram, training, test, truth, self.subjects[training])}
        return {"probabilities": ridge_probabilities(gram, training, test, truth, self.subjects[training], choices)}

    def _gram(self, name: str, fold: np.ndarray, label: tuple[str, ...]) -> np.ndarray:
        key = (name, fold.tobytes(), label if name == "covariates" else ())
        if key not in self._grams:
            if name == "covariates":
                blocks = [covariates(self.scans.table, fold, label)]
            elif name == "fc_ridge":
                blocks = [fisher_z(self._correlations, fold)]
            elif name == "tangent_ridge":
                blocks = [tangent(self._correlations, fold)]
            else:
                blocks = [standardized(block, fold) for block in self.features[name]()]
            width = blocks[0].shape[1]
            self._grams[key] = np.sum([width / block.shape[1] * (block @ block.T) for block in blocks], axis=0)
        return self._grams[key]

    @cached_property
    def _correlations(self) -> np.ndarray:
        return correlations(self.scans)


def correlations(scans: "Scans") -> np.ndarray:
    """
    Correlations between ROIs, float32 [scans, rois, rois], NaN where a scan lacks one. Scans of several atlases are
    compared by the series of the networks that all of them have.
    """
    atlases = [scans.atlas(row) for row in range(len(scans))]
    names = sorted({atlas.name for atlas in atlases})
    if len(names) == 1:
        found = np.full((len(scans), len(atlases[0]), len(atlases[0])), np.nan, np.float32)
        for row in range(len(scans)):
            signal = scans.signal(row)
            present = np.flatnonzero(~np.isnan(signal).any(0))
            found[row][np.ix_(present, present)] = correlation(standardize(signal[:, present]))
        return found
    series = []
    for row, atlas in enumerate(atlases):
        signal = scans.signal(row)
        present = ~np.isnan(signal).any(0)
        series.append(network_series(standardize(signal[:, present]), membership(atlas)[present]))
    shared = np.asarray(~np.isnan([means[0] for means in series]).any(0))
    if shared.sum() < 3:
        both = [name for name, has in zip(NETWORKS, shared, strict=True) if has]
        raise ValueError(
            f"the scans differ in their atlases ({', '.join(names)}), so that connectivity is compared between "
            f"networks: expected at least 3 that all scans have, got {len(both)}: {', '.join(both)}"
        )
    return np.stack([correlation(standardize(means[:, shared])) for means in series]).astype(np.float32)


def fisher_z(matrices: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Fisher z [scans, pairs] of correlations [scans, rois, rois]; missing pairs have the training rows' mean."""
    upper = np.triu_indices(matrices.shape[-1], k=1)
    values = np.arctanh(matrices[:, *upper].clip(-LARGEST_CORRELATION, LARGEST_CORRELATION))
    mean = np.nan_to_num(_nanmean(values[training]))
    return np.where(np.isnan(values), mean, values)


def tangent(matrices: np.ndarray, training: np.ndarray) -> np.ndarray:
    """
    Tangent-space features float32 [scans, rois * (rois + 1) / 2] at the geometric mean of the training rows, of
    correlations [scans, rois, rois] shrunk towards the identity, as nilearn's ConnectivityMeasure(kind="tangent")
    makes them. ROIs that a scan lacks are what the others predict.
    """
    rois = matrices.shape[-1]
    shrunk = (1 - SHRINKAGE) * matrices.astype(np.float64) + SHRINKAGE * np.eye(rois)
    middle = np.nan_to_num(_nanmean(shrunk[training])) + 1e-6 * np.eye(rois)
    filled = np.stack([_fill(matrix, middle) for matrix in shrunk])
    mean = _spectral(np.log, filled[training]).mean(0)
    mean = _spectral(np.exp, mean)
    for _ in range(MEAN_ITERATIONS):
        root, whitening = _spectral(np.sqrt, mean), _spectral(lambda values: values**-0.5, mean)
        gradient = _spectral(np.log, whitening @ filled[training] @ whitening).mean(0)
        mean = root @ _spectral(np.exp, gradient) @ root
        if np.linalg.norm(gradient) / gradient.size < MEAN_TOLERANCE:
            break
    whitening = _spectral(lambda values: values**-0.5, mean)
    logarithms = _spectral(np.log, whitening @ filled @ whitening)
    upper = np.triu_indices(rois)
    # a value off the diagonal stands twice in a matrix
    return (logarithms[:, *upper] * np.where(upper[0] == upper[1], np.sqrt(0.5), 1)).astype(np.float32)


def _spectral(function: Callable[[np.ndarray], np.ndarray], matrices: np.ndarray) -> np.ndarray:
    """A function of the eigenvalues of symmetric matrices [..., n, n]."""
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * function(values)[..., None, :]) @ vectors.swapaxes(-1, -2)


def _fill(matrix: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A covariance matrix with NaN for missing variables, completed by their regression on the others in `mean`."""
    missing = np.isnan(np.diag(matrix))
    if not missing.any():
        return matrix
    has, lacks = np.flatnonzero(~missing), np.flatnonzero(missing)
    own, known, cross = matrix[np.ix_(has, has)], mean[np.ix_(has, has)], mean[np.ix_(has, lacks)]
    slopes = np.linalg.solve(known, cross)
    filled = matrix.copy()
    filled[np.ix_(has, lacks)], filled[np.ix_(lacks, has)] = own @ slopes, (own @ slopes).T
    filled[np.ix_(lacks, lacks)] = mean[np.ix_(lacks, lacks)] + slopes.T @ (own - known) @ slopes
    return filled


def covariates(table: Any, training: np.ndarray, without: Sequence[str]) -> np.ndarray:
    """
    Features [rows, columns] of those of `COVARIATES` that are in the table, but for one with a name in `without`, the
    label's: site, sex and what holds no number as one column for each value, others standardised by the training rows.
    A column of zeros comes first.
    """
    left_out = {name.casefold() for name in without}
    columns = [np.zeros((len(table), 1))]
    for covariate, names in COVARIATES.items():
        if not left_out.isdisjoint(names) or (name := _column(table, names)) is None:
            continue
        numbers = np.asarray(pd.to_numeric(table[name], errors="coerce"), float)
        if covariate in CATEGORIES or np.isnan(numbers).all():
            columns.append(pd.get_dummies(table[name]).to_numpy(float))
            continue
        mean, std = np.nanmean(numbers[training]), np.nanstd(numbers[training])
        columns.append(np.nan_to_num((numbers - mean) / (std if std > 0 else 1))[:, None])
    return np.concatenate(columns, axis=1)


def _column(table: Any, names: Sequence[str]) -> str | None:
    """The first column by one of these names, in any case, that has a value in some row."""
    there = [column for name in names for column in table if column.casefold() == name]
    return next((column for column in there if table[column].notna().any()), None)


def standardized(features: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Features [rows, features] by the mean and standard deviation of the training rows."""
    std = features[training].std(0)
    return (features - features[training].mean(0)) / np.where(std > 1e-8, std, np.inf)


def ridge_probabilities(
    gram: np.ndarray, training: np.ndarray, test: np.ndarray, classes: np.ndarray, subjects: np.ndarray, choices: int
) -> np.ndarray:
    """
    Probabilities [test rows, choices] by ridge regression on one column a class: of two classes, or of very few
    subjects, a softmax of the scores and the log of the classes' shares, at the slope that fits the training subjects'
    cross-fitted scores best; of more, by logistic regression on these scores, since those of a rare class are small.

    Args:
        gram: inner products [rows, rows] of the features. classes: int [training rows]. subjects: [training rows].
    """
    members = (classes[:, None] == np.arange(choices)).astype(float)
    shares = (members.sum(0) + 1) / (len(classes) + choices)
    fewest = min(len(set(subjects[classes == label])) for label in np.unique(classes))
    folds = []
    if fewest > 1:
        splitter = StratifiedGroupKFold(min(INNER_FOLDS, fewest), shuffle=True, random_state=0)
        folds = [
            fold
            for fold in splitter.split(classes, classes, subjects)
            if len(np.unique(classes[fold[0]])) == len(np.unique(classes))
        ]
    scores, cross_fitted = _ridge(gram, training, test, members, folds)

    def log_odds(values: np.ndarray, slope: np.ndarray | float) -> np.ndarray:
        logits = np.multiply.outer(slope, values - members.mean(0)) + np.log(shares)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    slope = DEFAULT_SLOPE
    known = ~np.isnan(cross_fitted).any(1)
    there = np.unique(classes[known])
    if len(there) > 2:
        columns = standardized(np.concatenate([cross_fitted[known], scores])[:, there], np.arange(known.sum()))
        fitted = LogisticRegression().fit(columns[: known.sum()], classes[known])
        found = np.zeros((len(test), choices))
        found[:, there] = fitted.predict_proba(columns[known.sum() :])
        return found
    if known.any():
        losses = -log_odds(cross_fitted[known], SLOPES)[:, np.arange(known.sum()), classes[known]].sum(-1)
        slope = SLOPES[losses.argmin()]
    return np.exp(log_odds(scores, slope))


def ridge_values(
    gram: np.ndarray, training: np.ndarray, test: np.ndarray, values: np.ndarray, subjects: np.ndarray
) -> np.ndarray:
    """Values [test rows] by ridge regression; arguments as in `ridge_probabilities`, values float [training rows]."""
    names = np.unique(subjects)
    folds = []
    if len(names) > 2:
        splitter = GroupKFold(min(INNER_FOLDS, len(names)), shuffle=True, random_state=0)
        folds = list(splitter.split(values, values, subjects))
    return _ridge(gram, training, test, values[:, None], folds)[0][:, 0]


def _ridge(
    gram: np.ndarray, training: np.ndarray, test: np.ndarray, targets: np.ndarray, folds: Sequence[tuple]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Predictions [test rows, targets] with the penalty of the least squared error over the folds (pairs of places in
    `training`), of equal ones the strongest, without folds the strongest of all; and those for the training rows from
    the folds, NaN where a row is in none.
    """
    cross_fitted = np.full((len(PENALTIES), *targets.shape), np.nan)
    for fitted, left_out in folds:
        cross_fitted[:, left_out] = _path(gram, training[fitted], training[left_out], targets[fitted])
    errors = np.nansum((cross_fitted - targets) ** 2, axis=(1, 2))
    best = int(errors.argmin())
    return _path(gram, training, test, targets)[best], cross_fitted[best]


def _path(gram: np.ndarray, rows: np.ndarray, new: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Ridge predictions [penalties, new rows, targets] from targets [rows, targets]."""
    own, other = gram[np.ix_(rows, rows)].astype(np.float64), gram[np.ix_(new, rows)].astype(np.float64)
    mean = own.mean(0)
    centred = own - mean - mean[:, None] + mean.mean()
    other = other - other.mean(1, keepdims=True) - mean + mean.mean()
    values, vectors = np.linalg.eigh(centred)
    values = values.clip(min=0)
    middle = targets.mean(0)
    left, right = other @ vectors, vectors.T @ (targets - middle)
    scale = max(values.mean(), 1e-12)
    return np.stack([(left / (values + penalty * scale)) @ right for penalty in PENALTIES]) + middle


def shuffles(subjects: Sequence[str] | np.ndarray, groups: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Several of `shuffle_subjects`, int [shuffles, rows]: a single one of small groups says little."""
    return np.stack([shuffle_subjects(subjects, groups, seed + number) for number in range(SHUFFLES)])


def shuffle_subjects(
    subjects: Sequence[str] | np.ndarray, groups: Sequence[str] | np.ndarray, seed: int
) -> np.ndarray:
    """
    For each row the index of a row of another subject of the same group, -1 where there is none. In a group the
    subjects give their scans to one another in a random circle, so that everyone's scan is asked about as often as it
    is in its own place, and in random order, as the scans of all may be of the same conditions in the same order: what
    is answered above chance then is known from the group alone.
    """
    who, where = np.asarray(subjects), np.asarray(groups)
    rng = np.random.default_rng(seed)
    shuffled = np.full(len(who), -1)
    for group in np.unique(where):
        members = rng.permutation(np.unique(who[where == group]))
        if len(members) < 2:
            continue
        for giver, taker in zip(np.roll(members, 1), members, strict=True):
            scans, rows = (np.flatnonzero((who == name) & (where == group)) for name in (giver, taker))
            shuffled[rows] = np.resize(rng.permutation(scans), len(rows))
    return shuffled


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without what is missing, NaN where all is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
