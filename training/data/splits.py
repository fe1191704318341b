"""Training and test sets that share no subject, drawn with a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit

from .held_out import held_out_people


@dataclass(frozen=True)
class Split:
    """Indices of rows, in order."""

    training: np.ndarray
    test: np.ndarray


def hold_out(subjects: Sequence[str] | np.ndarray, labels: np.ndarray | None, share: float, seed: int) -> Split:
    """
    A `share` of the subjects for the test, all rows of a subject on one side. labels: class int [rows] by which the
    two are stratified where each class has two subjects; None for numbers.
    """
    if not 0 < share < 1:
        raise ValueError(f"expected a share of test subjects between 0 and 1, got {share}")
    names, classes = _by_subject(subjects, labels)
    if len(names) < 2:
        raise ValueError(f"expected at least 2 subjects to split, got {len(names)}")
    stratified = classes is not None and _fewest(classes) >= 2
    splitter = (StratifiedShuffleSplit if stratified else ShuffleSplit)(1, test_size=share, random_state=seed)
    training, test = next(splitter.split(names, classes if stratified else None))
    return _split(subjects, names[training], names[test])


def hold_out_known(subjects: Sequence[str], share: float) -> Split:
    """The people of `held_out_people` for the test."""
    names = set(subjects)
    test = held_out_people(names, share)
    if not test or test == names:
        raise ValueError(
            f"expected subjects to learn from and to test, got {len(test)} to test of {len(names)} with a share of "
            f"{share}"
        )
    return _split(subjects, np.array(sorted(names - test)), np.array(sorted(test)))


def k_fold(subjects: Sequence[str] | np.ndarray, labels: np.ndarray | None, folds: int, seed: int) -> Iterator[Split]:
    """
    Each subject is in the test set of one of the folds, with all its rows. Stratified by labels, class int [rows],
    where each class has at least one subject for every fold.
    """
    names, classes = _by_subject(subjects, labels)
    if not 2 <= folds <= len(names):
        raise ValueError(f"expected between 2 folds and one for each of the {len(names)} subjects, got {folds}")
    stratified = classes is not None and _fewest(classes) >= folds
    splitter = (StratifiedKFold if stratified else KFold)(folds, shuffle=True, random_state=seed)
    for training, test in splitter.split(names, classes if stratified else None):
        yield _split(subjects, names[training], names[test])


def k_shot(subjects: Sequence[str] | np.ndarray, labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` subjects of each class, drawn at random; labels: class int [rows]."""
    names, classes = _by_subject(subjects, labels)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(np.asarray(classes)):
        members = names[classes == label]
        if len(members) < shots:
            raise ValueError(f"expected at least {shots} training subjects of class {label}, got {len(members)}")
        chosen.extend(rng.choice(members, shots, replace=False))
    return np.flatnonzero(np.isin(subjects, chosen))


def check_disjoint(subjects: Sequence[str] | np.ndarray, split: Split) -> None:
    """ValueError naming rows of a subject that is in both parts."""
    names = np.asarray(subjects)
    both, training, test = np.intersect1d(names[split.training], names[split.test], return_indices=True)
    if len(both):
        raise ValueError(
            f"expected each subject in one part of a split, got {len(both)} in both: one has row "
            f"{split.training[training[0]]} in the training and row {split.test[test[0]]} in the test part"
        )


def _split(subjects: Sequence[str] | np.ndarray, training: np.ndarray, test: np.ndarray) -> Split:
    split = Split(*(np.flatnonzero(np.isin(subjects, names)) for names in (training, test)))
    check_disjoint(subjects, split)
    return split


def _by_subject(
    subjects: Sequence[str] | np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Each subject's name and class; ValueError where the rows of a subject are of several classes."""
    names, first, whose = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    if labels is None:
        return names, None
    classes = np.asarray(labels)[first]
    if (differ := classes[whose] != labels).any():
        row = int(differ.argmax())
        other = first[whose[row]]
        raise ValueError(f"expected one label for each subject, got different ones in rows {other} and {row}")
    return names, classes


def _fewest(classes: np.ndarray) -> int:
    return int(np.unique(classes, return_counts=True)[1].min())
