"""What every result stands beside: the commonest answer, regression on functional connectivity, another's scan."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fmrilm.processors.descriptors.networks import NETWORKS, correlation, membership, network_series, standardize

from .data import PreparedScan


PENALTIES = tuple(10.0**power for power in range(-5, 3))
INNER_FOLDS = 5
# correlations of 1, such as those of a network with one ROI, have no Fisher z
LARGEST_CORRELATION = 0.999


def majority(classes: np.ndarray, choices: int, rows: int) -> np.ndarray:
    """Probabilities [rows, choices]: how common each class int [training rows] is, whatever the scan."""
    return np.tile(np.bincount(classes, minlength=choices) / len(classes), (rows, 1))


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
        shared = ~np.isnan([means[0] for means in networks]).any(0)
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
    features: np.ndarray, classes: np.ndarray, subjects: Sequence[str], choices: int, test: np.ndarray
) -> np.ndarray:
    """
    Probabilities [test rows, choices] by L2-penalised logistic regression. The penalty is chosen, and features are
    standardised, on training subjects alone: inside each fold of a cross-validation over them. A class that has no
    training row has probability 0.
    """
    fewest = min(len(set(np.asarray(subjects)[classes == label])) for label in np.unique(classes))
    folds = StratifiedGroupKFold(min(INNER_FOLDS, fewest), shuffle=True, random_state=0) if fewest > 1 else None
    # of weaker penalties that do as well, the first is taken
    grid = {"regress__C": PENALTIES}
    model = _fit(LogisticRegression(max_iter=2000), grid, "neg_log_loss", folds, features, classes, subjects)
    probabilities = np.zeros((len(test), choices))
    probabilities[:, model.classes_] = model.predict_proba(test)
    return probabilities


def ridge_regression(
    features: np.ndarray, values: np.ndarray, subjects: Sequence[str], test: np.ndarray
) -> np.ndarray:
    """Values [test rows] by ridge regression, penalty and standardisation as in `logistic_regression`."""
    people = len(set(subjects))
    folds = GroupKFold(min(INNER_FOLDS, people), shuffle=True, random_state=0) if people > 1 else None
    grid = {"regress__alpha": [1 / penalty for penalty in PENALTIES]}
    return _fit(Ridge(), grid, "neg_mean_absolute_error", folds, features, values, subjects).predict(test)


def _fit(regression, grid, scoring, folds, features, labels, subjects) -> GridSearchCV | Pipeline:
    # An L2 penalty does not see a rotation: as many principal components as there are scans hold all that the
    # regression can use of any number of features, and it takes a hundredth of the time.
    with TemporaryDirectory() as memory:
        pipeline = Pipeline(
            [("reduce", make_pipeline(StandardScaler(), PCA(svd_solver="full"))), ("regress", regression)],
            memory=memory,
        )
        if folds is None:
            # one subject of a class cannot be both trained and tested on: the strongest penalty
            name = next(iter(grid))
            return pipeline.set_params(**{name: grid[name][0]}).fit(features, labels)
        return GridSearchCV(pipeline, grid, scoring=scoring, cv=folds).fit(features, labels, groups=subjects)


def swap_scans(subjects: Sequence[str], groups: Sequence[str], seed: int) -> np.ndarray:
    """
    For each row the index of a row of another subject of the same group (dataset and site), -1 where there is none.
    In a group the subjects give their scans to one another in a random circle, so that everyone's scan is asked
    about as often as it is in the right place: what the swap answers above chance is known from the group alone.
    """
    subjects, groups = np.asarray(subjects), np.asarray(groups)
    rng = np.random.default_rng(seed)
    swapped = np.full(len(subjects), -1)
    for group in np.unique(groups):
        people = rng.permutation(np.unique(subjects[groups == group]))
        if len(people) < 2:
            continue
        for giver, taker in zip(np.roll(people, 1), people, strict=True):
            scans, rows = (np.flatnonzero((subjects == name) & (groups == group)) for name in (giver, taker))
            swapped[rows] = np.resize(scans, len(rows))
    return swapped
