"""One rule holds subjects out, in every program alike, and no subject is in two parts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.training.data.scan_sources import one_name_each
from fmrilm.training.data.splits import (
    SplitArguments,
    held_out_subjects,
    k_fold,
    k_shot,
    split_rows,
    split_scans,
)
from helpers import noise_scans


HELD_OUT_OF_30 = ["sub-0", "sub-10", "sub-12", "sub-13", "sub-2", "sub-20", "sub-23", "sub-7"]
SUBJECTS = st.sets(st.text(min_size=1), max_size=30)


# --- the rule


@given(SUBJECTS, SUBJECTS, st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_subject_is_held_out_whoever_else_is_there(some: set, more: set, share: float, other: float) -> None:
    assert held_out_subjects(some | more, share) & some == held_out_subjects(some, share)
    small, large = sorted((share, other))
    assert held_out_subjects(some, small) <= held_out_subjects(some, large)


def test_as_many_are_held_out_as_asked_for_and_always_the_same() -> None:
    subjects = [f"sub-{number}" for number in range(5000)]
    for share in (0.05, 0.2, 0.5):
        assert len(held_out_subjects(subjects, share)) / len(subjects) == pytest.approx(share, abs=0.02)
    # checkpoints do not hold whom they were trained on: these must never change
    assert sorted(held_out_subjects(subjects[:30])) == HELD_OUT_OF_30
    with pytest.raises(ValueError, match="share of held-out subjects from 0 to below 1, got 1.0"):
        held_out_subjects(subjects, 1.0)


def test_the_same_are_held_out_with_the_prefix_of_bids_and_without() -> None:
    bare = [f"{number:03d}" for number in range(200)]
    held_out = held_out_subjects(bare)
    assert 20 < len(held_out) < 60
    assert held_out_subjects(f"sub-{name}" for name in bare) == {f"sub-{name}" for name in held_out}
    # of the open data, which all results on them were reported for
    open_data = (
        "100206 100307 101309 102311 102816 211619 213522 377451 131217 NAP_001 NAP_002 NAP_007 NAP_009 NAP_013"
    )
    held_out = held_out_subjects([*open_data.split(), "sub-010188"])
    assert held_out == {"100307", "213522", "377451", "NAP_009", "NAP_013"}


def test_scans_are_split_by_subject_and_by_the_hash() -> None:
    scans = noise_scans(*(f"sub-{number}" for number in range(30)), *(f"sub-{number}" for number in range(30)))
    training, test = split_scans(scans, SplitArguments())
    assert sorted(set(test.table["subject"])) == HELD_OUT_OF_30 and len(test) == 2 * len(HELD_OUT_OF_30)
    assert not set(training.table["subject"]) & set(test.table["subject"]) and len(training) + len(test) == 60
    assert len(split_scans(scans, SplitArguments(held_out_share=0))[1]) == 0


TABLE = pd.DataFrame({"subject": ["a", "b", "b", "c", "d"], "site": ["X", "X", "Y", "Y", None]})


def splits_file(folder: Path, text: str, name: str = "splits.csv") -> SplitArguments:
    (folder / name).write_text(text)
    return SplitArguments(splits=str(folder / name))


def test_split_file_goes_before_the_rule(tmp_path: Path) -> None:
    training, test = split_rows(TABLE, splits_file(tmp_path, "subject,split\nb,test\na,train\na,train\nd,train\n"))
    # c is in neither
    assert training.tolist() == [0, 4] and test.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("splits.csv", "split , subject\n test,sub-b\ntrain , a\ntrain,d\n"),
        ("splits.csv", "\ufeffsubject,split\na,train\nb,test\nd,train\n,\n , \n\n"),
        ("splits.tsv", "subject\tsex\tsplit\nsub-a\tF\ttrain\na\tF\ttrain\nb\t\ttest\nd\tM\ttrain\n\t\t\n"),
    ],
)
def test_split_file_is_read_like_a_table_of_labels(name: str, text: str, tmp_path: Path) -> None:
    training, test = split_rows(TABLE, splits_file(tmp_path, text, name))
    assert training.tolist() == [0, 4] and test.tolist() == [1, 2]


def test_split_file_takes_subjects_of_scans_with_the_prefix_and_without(tmp_path: Path) -> None:
    table = pd.DataFrame({"subject": ["sub-1", "1", "sub-2", "3"]})
    training, test = split_rows(table, splits_file(tmp_path, "subject,split\n1,test\n2,train\nsub-3,train\n"))
    assert training.tolist() == [2, 3] and test.tolist() == [0, 1]


def test_left_out_value_is_tested_and_no_scan_of_its_subjects_is_learned_from() -> None:
    training, test = split_rows(TABLE, SplitArguments(leave_out="site=Y"))
    assert training.tolist() == [0, 4] and test.tolist() == [2, 3]
    # pandas makes floats of whole numbers where one is missing
    table = TABLE.assign(scanner=[1, 2, None, 1, 2])
    training, test = split_rows(table, SplitArguments(leave_out="scanner=2"))
    assert training.tolist() == [0, 3] and test.tolist() == [1, 4]


def test_a_model_that_other_subjects_were_held_out_of_is_told_of(tmp_path: Path, caplog) -> None:
    rule, of_file = SplitArguments(), splits_file(tmp_path, "subject,split\na,train\nb,test\n")
    rule.keep(tmp_path)
    rule.compare(tmp_path)
    # a model of elsewhere says nothing
    of_file.compare("someone/model")
    assert not caplog.messages
    of_file.compare(tmp_path)
    assert "may have learned from subjects that are held out here" in caplog.messages[0]
    of_file.keep(tmp_path)
    assert "a,train" not in (tmp_path / "held_out.json").read_text()
    splits_file(tmp_path, "subject,split\na,test\nb,train\n").compare(tmp_path)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,split\na,train\nx,test\n", "splits.csv: expected subjects that have scans, got without: x"),
        ("subject,split\na,train\na,test\n", "splits.csv: expected each subject in one split, got in both: a"),
        ("subject,split\nsub-a,train\na,test\n", "expected each subject in one split, got in both: a"),
        ("subject,split\nsub-a,train\nsub-x,test\n", "expected subjects that have scans, got without: sub-x"),
        ("subject,split\na,train\n,test\n", "expected subjects that have scans, got without: an empty cell"),
        (
            "subject,split\na,train\nb,val\nc,test\nd,dev\n",
            "splits.csv: expected train or test as the split of a subject .those without a row are not used., "
            "got 'dev', 'val' of b, d",
        ),
        ("subject,split\na,train\nb,\n", "expected train or test as the split .*got '' of b"),
        ("subject,split\na,train,x\n", "splits.csv, line 2: expected 2 cells, got 3"),
        ("subject,fold\na,1\n", "splits.csv: expected the columns subject and split, got subject, fold"),
        ("", "splits.csv: expected a header and at least one row, got 0 lines"),
        ("subject,split\n,\n", "expected a header and at least one row, got 1 lines"),
        ("subject,split\na,test\n", "expected subjects to learn from, got 4 subjects, none in training"),
    ],
)
def test_unfit_split_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(TABLE, splits_file(tmp_path, text))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (SplitArguments(leave_out="site=Z"), "a value of 'site' out of X, Y, got 'Z'"),
        (SplitArguments(leave_out="scanner=1"), "a column out of subject, site to leave out values of, got 'scanner'"),
        (SplitArguments(leave_out="site"), "COLUMN=VALUE"),
        (SplitArguments(splits="x.csv", leave_out="site=X"), "expected splits or leave_out, got both"),
        (SplitArguments(splits="none.csv"), "no table at none.csv"),
    ],
)
def test_unfit_splits_are_refused(args: SplitArguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(TABLE, args)


# --- folds of an evaluation


def cohort(count: int, sessions: int = 2, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    subjects = np.array([f"sub-{i:03d}" for i in range(count)])
    return np.repeat(subjects, sessions), np.repeat(np.arange(count) % classes, sessions)


@given(count=st.integers(4, 30), sessions=st.integers(1, 3), seed=st.integers(0, 1000), folds=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_folds_part_subjects_and_cover_all_rows(count: int, sessions: int, seed: int, folds: int) -> None:
    subjects, labels = cohort(count, sessions)
    splits = list(k_fold(subjects, labels, folds, seed))
    assert len(splits) == folds
    np.testing.assert_array_equal(np.sort(np.concatenate([split.test for split in splits])), np.arange(len(subjects)))
    for split in splits:
        assert not set(subjects[split.training]) & set(subjects[split.test])
        assert len(split.training) + len(split.test) == len(subjects)


def test_splits_are_stratified_where_the_classes_allow_it() -> None:
    subjects, labels = cohort(40, classes=4)
    for split in k_fold(subjects, labels, 5, 0):
        np.testing.assert_array_equal(np.unique(labels[split.test], return_counts=True)[1], [4, 4, 4, 4])
    # a class of one subject cannot be in all folds, numbers have no classes: subjects are parted all the same
    lonely = (np.arange(80) < 2).astype(int)
    assert len(list(k_fold(subjects, lonely, 5, 0))) == len(list(k_fold(subjects, None, 5, 0))) == 5


def test_seeds_draw_different_subjects_and_the_same_ones_again() -> None:
    subjects, labels = cohort(20)
    drawn = [next(iter(k_fold(subjects, labels, 2, seed))).test.tolist() for seed in (0, 1, 0)]
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


def test_impossible_splits_are_refused() -> None:
    subjects, labels = cohort(4)
    with pytest.raises(ValueError, match="between 2 folds and one for each of the 4 subjects, got 5"):
        list(k_fold(subjects, labels, 5, 0))
    with pytest.raises(ValueError, match="one label for each subject, got different ones in rows 0 and 1"):
        list(k_fold(subjects, np.array([0, 1, 1, 1, 0, 0, 1, 1]), 2, 0))


def test_name_that_is_also_there_without_the_prefix_is_the_same_subject() -> None:
    assert one_name_each(["sub-1", "1", "sub-2", "3"]) == ["1", "1", "sub-2", "3"]
