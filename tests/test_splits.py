"""No subject is in two parts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.training.data.splits import Split, check_disjoint, hold_out, hold_out_known, k_fold, k_shot


def cohort(people: int, sessions: int = 2, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    subjects = np.array([f"sub-{i:03d}" for i in range(people)])
    return np.repeat(subjects, sessions), np.repeat(np.arange(people) % classes, sessions)


@given(people=st.integers(4, 30), sessions=st.integers(1, 3), seed=st.integers(0, 1000), folds=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_folds_part_subjects_and_cover_all_rows(people: int, sessions: int, seed: int, folds: int) -> None:
    subjects, labels = cohort(people, sessions)
    splits = list(k_fold(subjects, labels, folds, seed))
    assert len(splits) == folds
    np.testing.assert_array_equal(np.sort(np.concatenate([split.test for split in splits])), np.arange(len(subjects)))
    for split in [*splits, hold_out(subjects, labels, 0.4, seed)]:
        assert not set(subjects[split.training]) & set(subjects[split.test])
        assert len(split.training) + len(split.test) == len(subjects)


def test_splits_are_stratified_where_the_classes_allow_it() -> None:
    subjects, labels = cohort(40, classes=4)
    for split in [*k_fold(subjects, labels, 5, 0), hold_out(subjects, labels, 0.2, 0)]:
        np.testing.assert_array_equal(np.unique(labels[split.test], return_counts=True)[1], [4, 4, 4, 4])
    # a class of one subject cannot be in all folds, numbers have no classes: subjects are parted all the same
    lonely = (np.arange(80) < 2).astype(int)
    assert len(list(k_fold(subjects, lonely, 5, 0))) == len(list(k_fold(subjects, None, 5, 0))) == 5
    assert len(hold_out(subjects, lonely, 0.25, 0).test) == 20


def test_seeds_draw_different_subjects_and_the_same_ones_again() -> None:
    subjects, labels = cohort(20)
    drawn = [hold_out(subjects, labels, 0.5, seed).test.tolist() for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    shots = [k_shot(subjects, labels, 3, seed).tolist() for seed in (0, 1, 0)]
    assert shots[0] == shots[2] != shots[1]


def test_k_shots_are_k_subjects_of_each_class_with_all_their_rows() -> None:
    subjects, labels = cohort(30, sessions=2, classes=3)
    rows = k_shot(subjects, labels, 4, seed=1)
    assert len(rows) == 3 * 4 * 2 and len(set(subjects[rows])) == 12
    np.testing.assert_array_equal(np.unique(labels[rows], return_counts=True)[1], [8, 8, 8])
    with pytest.raises(ValueError, match="at least 11 training subjects of class 0, got 10"):
        k_shot(subjects, labels, 11, seed=1)


def test_a_subject_in_two_parts_is_refused_with_its_rows() -> None:
    subjects = ["a", "b", "b", "c"]
    check_disjoint(subjects, Split(np.array([0, 1, 2]), np.array([3])))
    with pytest.raises(ValueError, match="1 in both: one has row 1 in the training and row 2 in the test part"):
        check_disjoint(subjects, Split(np.array([0, 1]), np.array([2, 3])))


def test_impossible_splits_are_refused() -> None:
    subjects, labels = cohort(4)
    with pytest.raises(ValueError, match="between 2 folds and one for each of the 4 subjects, got 5"):
        list(k_fold(subjects, labels, 5, 0))
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        hold_out(subjects, labels, 1.5, 0)
    with pytest.raises(ValueError, match="to learn from and to test, got 0 to test of 4 with a share of 0"):
        hold_out_known(subjects, 0)
    with pytest.raises(ValueError, match="at least 2 subjects"):
        hold_out(["a", "a"], None, 0.5, 0)
    with pytest.raises(ValueError, match="one label for each subject, got different ones in rows 0 and 1"):
        hold_out(subjects, np.array([0, 1, 1, 1, 0, 0, 1, 1]), 0.5, 0)
