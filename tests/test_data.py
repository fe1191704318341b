"""Windows, splits and mixtures of scans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.training.data.dataset import MixedWindows, PreparedScan, cut_windows, split_subjects
from helpers import atlas, prepared


@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_no_subject_is_on_both_sides(keys: list[tuple[str, int]], count: int, random) -> None:
    of = atlas()
    scans = [PreparedScan(np.zeros((1, 9)), of, dataset, f"s{number}", "1") for dataset, number in keys]
    subjects = {dataset: {number for name, number in keys if name == dataset} for dataset, _ in keys}
    held_out = {dataset: min(count, len(members)) for dataset, members in subjects.items()}
    training, away = split_subjects(scans, held_out)
    sides = [{(scan.dataset, scan.subject) for scan in side} for side in (training, away)]
    assert not sides[0] & sides[1] and len(training) + len(away) == len(scans)
    assert all(sum(name == dataset for name, _ in sides[1]) == held_out[dataset] for dataset in subjects)
    random.shuffle(scans)
    assert {(scan.dataset, scan.subject) for scan in split_subjects(scans, held_out)[1]} == sides[1]


def test_more_subjects_than_there_are_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="at most 2 subjects to hold out of 'study', got 3"):
        split_subjects([prepared("a"), prepared("b")], {"study": 3})


def test_windows_are_cut_at_each_stride() -> None:
    scan = prepared("a", frames=40)
    windows = cut_windows([scan, prepared("b", frames=10)], length=16, stride=8)
    assert [window.start for window in windows] == [0, 8, 16, 24]
    for window in windows:
        assert np.array_equal(window.signal, scan.signal[window.start : window.start + 16])
        assert np.array_equal(window.descriptors, describe(window.signal, scan.atlas, CORE_MEASURES), equal_nan=True)


def mixtures(max_rois: int = 100, seed: int = 0) -> MixedWindows:
    scans = [prepared("a"), prepared("b"), prepared("c", of=atlas("large", 12))]
    descriptors = np.stack([window.descriptors for window in cut_windows(scans, 16, 4)])
    cohort = Cohort.fit("tests", CORE_MEASURES, descriptors, 3, [scan.atlas for scan in scans])
    return MixedWindows(scans, cohort, 16, max_rois, size=20, seed=seed)


def test_mixtures_depend_on_seed_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = mixtures(), mixtures()
    expected = [first[index] for index in range(20)]
    np.random.seed(5)
    for index in reversed(range(20)):
        found = second[index]
        assert all(np.array_equal(expected[index][name], found[name], equal_nan=True) for name in found)
    signals = [item["signal"] for item in [*expected, *(mixtures(seed=1)[index] for index in range(20))]]
    # windows as they are can come twice, mixtures cannot
    assert len({signal.tobytes() for signal in signals}) > 30
    monkeypatch.setattr("fmrilm.training.data.dataset.PLAIN_SHARE", 0.0)
    mixed = [mixtures(seed=seed)[index]["signal"].tobytes() for seed in (0, 1) for index in range(20)]
    assert len(set(mixed)) == 40


def test_mixtures_come_with_their_own_descriptors() -> None:
    dataset = mixtures()
    atlases = {9: atlas(), 12: atlas("large", 12)}
    sizes = set()
    for item in (dataset[index] for index in range(20)):
        of = atlases[item["signal"].shape[1]]
        sizes.add(len(of))
        expected = dataset.cohort.z_scores(dataset.cohort.describe(item["signal"], of))
        assert np.allclose(item["descriptors"], expected, atol=1e-3, equal_nan=True)
        assert np.array_equal(item["coordinates"], of.coordinates)
        assert np.isfinite(item["descriptors"]).any()
    assert sizes == {9, 12}


def test_mixtures_keep_some_rois_and_the_descriptors_of_all() -> None:
    whole, part = mixtures(), mixtures(max_rois=4)
    for index in range(10):
        all_rois, chosen = whole[index], part[index]
        rows = [all_rois["coordinates"].tolist().index(row) for row in chosen["coordinates"].tolist()]
        assert len(rows) == 4 and rows == sorted(rows)
        assert np.array_equal(chosen["signal"], all_rois["signal"][:, rows])
        assert np.array_equal(chosen["descriptors"], all_rois["descriptors"], equal_nan=True)
