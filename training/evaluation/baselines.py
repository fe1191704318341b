"""What every result stands beside: the commonest answer, regression on functional connectivity, another's scan."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.networks import NETWORKS, correlation, membership, network_series, standardize

from ..data.dataset import PreparedScan


# strongest first
PENALTIES = tuple(10.0**power for power in range(5, -3, -1))
INNER_FOLDS = 5
# correlations of 1, such as those of a network with one ROI, have no Fisher z
LARGEST_CORRELATION = 0.999

# rows to train and to test on
Fold = tuple[np.ndarray, np.ndarray]


def majority(classes: np.ndarray, choices: int, rows: int) -> np.ndarray:
    """Probabilities [rows, choices]: how common each class int [training rows] is, whatever the scan."""
    return np.tile(np.bincount(classes, minlength=choices) / len(classes), (rows, 1))


def most_frequent(levels: np.ndarray) -> np.ndarray:
    """The commonest level int [descriptors] of each descriptor; levels int [windows, descriptors], -1 unknown."""
    return (levels[..., None] == np.arange(len(LEVELS))).sum(0).argmax(-1)


def connectivity_features(scans: Sequence[PreparedScan]) -> np.ndarray:
    """
    Fisher z of the correlations between ROIs, float32 [scans, pairs]. Scans of several atlases, or with other ROIs
    missing, are compared by the series of the networks that all of them have.
    """
    present = [~np.isnan(scan.signal).any(0) for scan in scans]
    rois = {(scan.atlas.name, mask.tobytes()) for scan, mask in zip(scans, present, strict=True)}
    series = [standardize(scan.signal[:, mask]) for scan, mask in zip(scans, present, strict=True)]
    if len(rois) > 1:
        networks = [
            network_series(signal, membership(scan.atlas)[mask])
            for scan, mask, signal in zip(scans, present, series, strict=True)
        ]
        shared = np.asarray(~np.isnan([means[0] for means in networks]).any(0))
        if shared.sum() < 3:
            names = [name for name, both in zip(NETWORKS, shared, strict=True) if both]
            atlases = sorted({scan.atlas.name for scan in scans})
            raise ValueError(
                f"the scans differ in their ROIs (atlases {', '.join(atlases)}), so that connectivity is compared "
                f"between networks: expected at least 3 that all scans have, got {len(names)}: {', '.join(names)}"
            )
        series = [standardize(means[:, shared]) for means in networks]
    upper = np.triu_indices(series[0].shape[1], k=1)
    values = np.stack([correlation(signal)[upper] for signal in series])
    return np.arctanh(values.clip(-LARGEST_CORRELATION, LARGEST_CORRELATION)).astype(np.float32)


def logistic_regression(
    features: np.ndarray, classes: np.ndarray, subjects: Sequence[str] | np.ndarray, choices: int, test: np.ndarray
) -> np.ndarray:
    """
    Probabilities [test rows, choices] by L2-penalised logistic regression. The penalty is chosen, and features are
    standardised, on training subjects alone: inside each fold of a cross-validation over them, without folds that
    leave no row of a class to train on. A class that has no training row has probability 0.
    """
    known = np.unique(classes)
    fewest = min(len(set(np.asarray(subjects)[classes == label])) for label in known)
    folds: list[Fold] = []
    if fewest > 1:
        splitter = StratifiedGroupKFold(min(INNER_FOLDS, fewest), shuffle=True, random_state=0)
        split = splitter.split(features, classes, subjects)
        folds = [fold for fold in split if np.isin(known, classes[fold[0]]).all()]

    def build(penalty: float) -> LogisticRegression:
        return LogisticRegression(C=1 / penalty, max_iter=2000)

    def loss(model: LogisticRegression, rows: np.ndarray, truth: np.ndarray) -> float:
        chosen = model.predict_proba(rows)[np.arange(len(truth)), np.searchsorted(model.classes_, truth)]
        return -np.log(chosen.clip(1e-12)).sum()

    model = _fit(build, loss, folds, features, classes)
    probabilities = np.zeros((len(test), choices))
    probabilities[:, model[-1].classes_] = model.predict_proba(test)
    return probabilities


def ridge_regression(
    features: np.ndarray, values: np.ndarray, subjects: Sequence[str] | np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Values [test rows] by ridge regression, penalty and standardisation as in `logistic_regression`."""
    people = len(set(subjects))
    folds: list[Fold] = []
    if people > 1:
        splitter = GroupKFold(min(INNER_FOLDS, people), shuffle=True, random_state=0)
        # one row has no spread, and is its own principal component
        folds = [fold for fold in splitter.split(features, values, subjects) if len(fold[0]) > 1]

    def loss(model: Ridge, rows: np.ndarray, truth: np.ndarray) -> float:
        return ((model.predict(rows) - truth) ** 2).sum()

    return _fit(lambda penalty: Ridge(alpha=penalty), loss, folds, features, values).predict(test)


def _fit(
    build: Callable[[float], Any],
    loss: Callable[[Any, np.ndarray, np.ndarray], float],
    folds: Sequence[Fold],
    features: np.ndarray,
    labels: np.ndarray,
) -> Pipeline:
    """
    Fitted with the penalty of the least loss over the folds, of equal ones the strongest; without folds, as for one
    subject of a class, who cannot be both trained and tested on, with the strongest of all.
    """
    losses = np.zeros(len(PENALTIES))
    for training, test in folds:
        reduce = _reduction().fit(features[training])
        known, asked = reduce.transform(features[training]), reduce.transform(features[test])
        for place, penalty in enumerate(PENALTIES):
            losses[place] += loss(build(penalty).fit(known, labels[training]), asked, labels[test])
    return make_pipeline(_reduction(), build(PENALTIES[losses.argmin()])).fit(features, labels)


def _reduction() -> Pipeline:
    """
    Standardised features as their principal components, all of them: an L2 penalty does not see a rotation, and as
    many components as there are scans hold all that a regression can use of any number of features.
    """
    return make_pipeline(StandardScaler(), PCA(svd_solver="full"))


def swap_scans(subjects: Sequence[str] | np.ndarray, groups: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """
    For each row the index of a row of another subject of the same group (dataset and site), -1 where there is none.
    In a group the subjects give their scans to one another in a random circle, so that everyone's scan is asked
    about as often as it is in the right place: what the swap answers above chance is known from the group alone.
    """
    who, where = np.asarray(subjects), np.asarray(groups)
    rng = np.random.default_rng(seed)
    swapped = np.full(len(who), -1)
    for group in np.unique(where):
        people = rng.permutation(np.unique(who[where == group]))
        if len(people) < 2:
            continue
        for giver, taker in zip(np.roll(people, 1), people, strict=True):
            scans, rows = (np.flatnonzero((who == name) & (where == group)) for name in (giver, taker))
            swapped[rows] = np.resize(scans, len(rows))
    return swapped
