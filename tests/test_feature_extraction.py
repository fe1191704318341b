import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from fmrilm.processors import Atlas, FmriLMFeatureExtractor, Parcels, feature_extraction_fmrilm, scan_io_fmrilm
from fmrilm.processors.cleaning_fmrilm import (
    detrend,
    resample,
    resampled_length,
    robust_zscore,
    sampling_ratio,
    window_bounds,
)
from fmrilm.processors.scan_io_fmrilm import SIDES, Structure, SurfaceSeries
from helpers import bold, in_a_row, labels_in_a_row


ATLASES = [
    Atlas(f"a{n}", tuple(f"a{n}_{i}" for i in range(n)), ("Vis",) * n, np.arange(3.0 * n).reshape(n, 3))
    for n in (2, 3, 5)
]


# five voxels in a row are the ROIs
LABELS = np.arange(1, 6, dtype=np.int16).reshape(5, 1, 1)
LABEL_IMAGE = labels_in_a_row()


ATLAS_WITH_PARCELS = replace(ATLASES[2], parcels=Parcels(LABELS, np.eye(4)))


def sinusoid(frequency: float, tr: float, seconds: float = 600) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(0, seconds, tr))[:, None]


@pytest.mark.parametrize("tr", [0.5, 0.72, 0.735, 1.4, 2.0, 3.0])
def test_resampling_keeps_time(tr: float) -> None:
    signal = sinusoid(0.02, tr)
    out = resample(signal, tr, 2.0)
    assert len(out) == resampled_length(len(signal), tr, 2.0)
    assert 0 <= (len(signal) - 1) * tr - (len(out) - 1) * 2.0 < 2.0
    expected = np.sin(2 * np.pi * 0.02 * 2.0 * np.arange(len(out)))[:, None]
    np.testing.assert_allclose(out, expected, atol=0.1)
    np.testing.assert_allclose(out[5:-5], expected[5:-5], atol=0.02)


@pytest.mark.parametrize("frames, tr", [(1, 3.0), (7, 0.72), (120, 0.735), (60, 2.01), (50, 3.0)])
def test_resampling_is_that_of_scipy_with_mirrored_ends(frames: int, tr: float) -> None:
    signal = np.random.default_rng(frames).normal(size=(frames, 3))
    signal[:, 1] = np.nan
    ratio = sampling_ratio(tr, 2.0)
    expected = resample_poly(signal, ratio.numerator, ratio.denominator, padtype="symmetric")
    found = resample(signal, tr, 2.0)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-12)


def test_equal_repetition_time_changes_nothing() -> None:
    signal = bold(30)
    assert resample(signal, 2.0, 2.0) is signal


@pytest.mark.parametrize("order", [0, 1, 2])
def test_detrending_removes_drift_up_to_its_order(order: int) -> None:
    time = np.arange(50.0)[:, None]
    drift = sum(3.0 * time**power for power in range(order + 1))
    np.testing.assert_allclose(detrend(drift, order), 0, atol=1e-8)
    assert np.abs(detrend(time ** (order + 1), order)).max() > 1


def test_zscore_is_robust_to_spikes_and_clipped() -> None:
    signal = np.random.default_rng(0).normal(50, 3, (2000, 1))
    clean = robust_zscore(signal, clip=6.0)
    assert clean.std() == pytest.approx(1, abs=0.05)
    signal[::100] += 1000
    spiked = robust_zscore(signal, clip=6.0)
    assert spiked.max() == 6.0
    assert np.abs(spiked - clean)[np.arange(2000) % 100 != 0].max() < 0.2


def test_windows_cover_what_they_promise() -> None:
    assert window_bounds(25, "first", 10, 10) == [(0, 10)]
    assert window_bounds(25, "full", 10, 10) == [(0, 25)]
    assert window_bounds(25, "sliding", 10, 10) == [(0, 10), (10, 20)]
    assert window_bounds(25, "sliding", 10, 5) == [(0, 10), (5, 15), (10, 20), (15, 25)]
    for window in ("first", "full", "sliding"):
        assert window_bounds(8, window, 10, 10) == [(0, 8)]


def test_one_scan_becomes_padded_tensors(extractor, tiny_atlas) -> None:
    out = extractor(bold(14), tr=2.0)
    assert list(out) == extractor.model_input_names
    assert out["fmri_values"].shape == out["fmri_mask"].shape == (1, 5, 16)
    assert out["fmri_values"].dtype == torch.float32 and out["fmri_mask"].dtype == torch.bool
    np.testing.assert_array_equal(out["roi_coordinates"][0], tiny_atlas.coordinates)
    assert out["fmri_mask"][0, :, :14].all() and not out["fmri_mask"][0, :, 14:].any()
    assert extractor.num_patches(out["fmri_mask"]) == [4]


def test_values_are_time_first_signals_turned(extractor) -> None:
    signal, atlas = extractor.prepare_signal(bold(40), tr=0.72)
    assert signal.shape == (15, 5) and signal.dtype == np.float32 and atlas.name == "tiny"
    np.testing.assert_array_equal(extractor(bold(40), tr=0.72)["fmri_values"][0, :, :15], signal.T)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(ATLASES), st.integers(8, 40)), min_size=1, max_size=4),
    st.sampled_from(["first", "full"]),
)
def test_batch_mates_never_change_an_item(items: list[tuple[Atlas, int]], window: str) -> None:
    extractor = FmriLMFeatureExtractor(atlases=ATLASES, patch_length=4, window_length=16)
    scans = [
        {"signal": bold(frames, len(atlas), seed=i), "tr": 2.0, "atlas": atlas.name}
        for i, (atlas, frames) in enumerate(items)
    ]
    together = extractor(scans, window=window)
    values, mask = together["fmri_values"], together["fmri_mask"]
    assert values.shape[2] % 4 == 0
    assert not values[~mask].any()
    for i, scan in enumerate(scans):
        alone = extractor(scan, window=window)
        _, rois, time = alone["fmri_values"].shape
        assert torch.equal(values[i, :rois, :time], alone["fmri_values"][0])
        assert torch.equal(together["roi_coordinates"][i, :rois], alone["roi_coordinates"][0])
        assert torch.equal(mask[i, :rois, :time], alone["fmri_mask"][0])
        assert mask[i].sum() == alone["fmri_mask"].sum()
        assert extractor.num_patches(mask)[i] == extractor.num_patches(alone["fmri_mask"])[0]


def test_sliding_windows_tell_their_scan(extractor) -> None:
    out = extractor([bold(40), bold(12), bold(32)], tr=2.0, window="sliding")
    assert out["scan_index"].tolist() == [0, 0, 1, 2, 2]
    assert out["scan_index"].dtype == torch.int64
    assert extractor.num_patches(out["fmri_mask"]) == [4, 4, 3, 4, 4]
    half = extractor(bold(40), tr=2.0, window="sliding", window_stride=8)
    assert torch.equal(half["fmri_values"][0, :, 8:], half["fmri_values"][1, :, :8])


def test_every_form_of_a_scan_gives_the_same(extractor, signal, tiny_atlas, tmp_path) -> None:
    np.save(tmp_path / "s.npy", signal)
    shuffled = [3, 1, 4, 0, 2]
    rows = [[tiny_atlas.rois[i] for i in shuffled] + ["global"]]
    rows += [[repr(float(row[i])) for i in shuffled] + ["0"] for row in signal]
    (tmp_path / "s.csv").write_text("\n".join(",".join(row) for row in rows))
    expected = extractor(signal, tr=2.0)["fmri_values"]
    forms = [
        torch.from_numpy(signal),
        tmp_path / "s.npy",
        str(tmp_path / "s.csv"),
        {"signal": signal.tolist(), "tr": 2.0, "atlas": "tiny", "subject": "01"},
        {"signal": {"signal": signal, "tr": 2.0}},
    ]
    for form in forms:
        assert torch.equal(extractor(form, tr=2.0, atlas=tiny_atlas)["fmri_values"], expected)
    np.testing.assert_array_equal(extractor(signal, tr=2.0, return_tensors="np")["fmri_values"], expected.numpy())


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_batch_of_rows_is_a_list_of_scans(extractor, form: str | None) -> None:
    scans = [{"signal": bold(frames, seed=frames).tolist(), "tr": 2.0, "atlas": "tiny"} for frames in (20, 20, 13)]
    rows = Dataset.from_list([{**scan, "subject": "01"} for scan in scans]).with_format(form)
    for part in (slice(2), slice(3)):
        expected = extractor(scans[part])["fmri_values"]
        assert torch.equal(extractor(rows[part])["fmri_values"], expected)
        signals = rows.select_columns("signal")[part]
        assert torch.equal(extractor(signals, tr=2.0, atlas="tiny")["fmri_values"], expected)
    batched = rows.map(lambda batch: extractor(batch, return_tensors="np"), batched=True, remove_columns=["signal"])
    alone = rows.map(lambda row: {"values": extractor(row, return_tensors="np")["fmri_values"][0]})
    assert np.array_equal(batched.with_format("numpy")[:]["fmri_values"], expected)
    assert np.array_equal(alone.with_format("numpy")[0]["values"], expected[0])


def test_batch_of_rows_in_place_of_one_scan_is_refused(extractor) -> None:
    batch = {"signal": [bold(20).tolist()] * 2, "tr": [2.0, 2.0]}
    with pytest.raises(ValueError, match="expected one scan, got a batch of rows: a dict with the columns signal, tr"):
        extractor([batch])
    with pytest.raises(ValueError, match="columns of one length, got {'signal': 2, 'tr': 2, 'atlas': None}"):
        extractor({**batch, "atlas": "tiny"})


def test_volume_is_parcellated_with_the_labels_of_the_atlas(extractor, tiny_atlas, signal, tmp_path) -> None:
    image, expected = in_a_row(signal), extractor(signal, tr=2.0)["fmri_values"]
    assert torch.equal(extractor(image, label_image=LABEL_IMAGE)["fmri_values"], expected)
    atlas = replace(tiny_atlas, parcels=Parcels(LABELS, np.eye(4)))
    assert torch.equal(extractor(image, atlas=atlas)["fmri_values"], expected)
    table = tmp_path / "mine.tsv"
    table.write_text("index\tname\tnetwork\n" + "".join(f"{i}\troi{i}\tVis\n" for i in range(1, 6)))
    mine = extractor(image, atlas=table, label_image=LABEL_IMAGE)
    assert torch.equal(mine["fmri_values"], expected)
    assert mine["roi_coordinates"][0].tolist() == [[i, 0, 0] for i in range(5)]
    with pytest.raises(ValueError, match="need parcels, and atlas 'tiny' has none.*with parcels: none"):
        extractor(image)
    with pytest.raises(ValueError, match="atlas 'aal2-94' has 94 labels and the label image 5"):
        extractor(image, atlas="aal2-94", label_image=LABEL_IMAGE)


def test_volume_without_an_atlas_takes_the_one_with_parcels(signal, caplog) -> None:
    scan_io_fmrilm.warn_once.cache_clear()
    atlas, image = ATLAS_WITH_PARCELS, in_a_row(bold(20))
    found = FmriLMFeatureExtractor([*ATLASES[:2], atlas]).read_signal(image)
    assert found.atlas == atlas
    assert caplog.messages == ["using the atlas 'a5', whose parcels this model has"]
    surface = replace(ATLASES[0], parcels=Parcels(left=np.ones(4, int), right=np.ones(4, int)))
    more = replace(ATLASES[1], parcels=atlas.parcels)
    # as of the demo's model: the first that has parcels where the scan has values, with a note
    found = FmriLMFeatureExtractor([surface, atlas, more]).read_signal(image)
    assert found.atlas == atlas and caplog.messages[1].endswith("this model has; it also has: a3 (3 ROIs)")
    with pytest.raises(ValueError, match=r"which atlas.*known: a2 .*a3.*; with parcels there: none; well-known"):
        FmriLMFeatureExtractor([surface, ATLASES[1]])(image)


def test_surface_scan_without_an_atlas_takes_the_one_on_its_mesh() -> None:
    structures = [Structure(slice(5 * i, 5 * i + 5), side, np.arange(5), 5) for i, side in enumerate(SIDES)]
    scan = SurfaceSeries("made", bold(20, 10).astype(np.float32), 2.0, tuple(structures))
    halves = {side: np.full(5, number) for number, side in enumerate(SIDES, start=1)}
    coarse = replace(ATLASES[1], parcels=Parcels(left=np.ones(4, int), right=np.ones(4, int)))
    fitting = replace(ATLASES[0], parcels=Parcels(**halves))
    extractor = FmriLMFeatureExtractor([ATLAS_WITH_PARCELS, coarse, fitting])
    assert [known["name"] for known in extractor.atlases if extractor._lies_in(known, scan)] == ["a2"]


def test_well_known_atlas_need_not_be_known_to_the_model(extractor) -> None:
    assert extractor(bold(20, 450), tr=2.0, atlas="schaefer-400-tian-s3")["fmri_values"].shape == (1, 450, 16)


# values throughout, or the columns before those of ROIs in a table that lacks some
DEAD = {"zeros": 0, "a constant": 1000.1, "a drift": 1000 + np.arange(20.0), "NaN": np.nan}
BEFORE = {"no column": [], "no column beside an index": [""], "no column beside times": ["time"]}


def without(lost: str, rois: list[int], signal: np.ndarray, folder: Path) -> list[tuple[object, dict]]:
    """Scans whose ROIs are lost in this way, and options to read them with."""
    if lost == "no voxels":
        # one without a label, others without values
        labels = np.where(rois[0] + 1 == LABELS, 0, LABELS)
        scan = np.where(np.isin(np.arange(5), rois[1:]), 0, signal)
        return [(in_a_row(scan), {"label_image": nib.Nifti1Image(labels, np.eye(4))})]
    if lost in DEAD:
        scan = signal.copy()
        scan[:, rois] = np.broadcast_to(np.reshape(DEAD[lost], (-1, 1)), (20, len(rois)))
        np.savetxt(folder / "a.1D", scan, header="#1 #2 #3 #4 #5", comments="")
        return [(scan, {"tr": 2.0}), (folder / "a.1D", {"tr": 2.0})]
    first, kept = BEFORE[lost], [roi for roi in (4, 0, 3, 2, 1) if roi not in rois]
    values = np.hstack([np.arange(20)[:, None][:, : len(first)], signal[:, kept]])
    header = ",".join([*first, *(f"tiny_{roi}" for roi in kept)])
    np.savetxt(folder / "a.csv", values, delimiter=",", header=header, comments="")
    return [(folder / "a.csv", {"tr": 2.0})]


@pytest.mark.parametrize("lost", ["no voxels", *DEAD, *BEFORE])
def test_lost_rois_are_masked_told_and_at_most_a_share(
    lost: str, extractor, tiny_atlas, signal, tmp_path, caplog
) -> None:
    scan_io_fmrilm.warn_once.cache_clear()
    whole = extractor(signal, tr=2.0)
    there = torch.tensor([True, True, False, True, True])
    for scan, options in without(lost, [2], signal, tmp_path):
        out = extractor(scan, **options, return_windows=True)
        assert torch.equal(out["fmri_mask"][0], whole["fmri_mask"][0] & there[:, None])
        torch.testing.assert_close(out["fmri_values"][0], whole["fmri_values"][0] * there[:, None])
        assert torch.equal(out["roi_coordinates"], whole["roi_coordinates"])
        assert extractor.num_patches(out["fmri_mask"]) == extractor.num_patches(whole["fmri_mask"])
        assert out["windows"][0]["missing_rois"] == ["tiny_2"]
    # once for a folder
    told = "scans lack ROIs of 'tiny' (absent, NaN or constant throughout): they are masked"
    assert caplog.messages.count(told) == 1
    patient = FmriLMFeatureExtractor([tiny_atlas], patch_length=4, window_length=16, max_missing_rois=0.4)
    for scan, options in without(lost, [2, 4], signal, tmp_path):
        with pytest.raises(ValueError, match="2 of the 5 ROIs of 'tiny' are missing, such as tiny_2.*at most 20%"):
            extractor(scan, **options)
        assert patient(scan, **options)["fmri_mask"][0].any(-1).tolist() == [True, True, False, True, False]


def test_scan_without_any_roi_is_refused(extractor) -> None:
    with pytest.raises(ValueError, match="5 of the 5 ROIs of 'tiny' are missing, such as tiny_0"):
        extractor(np.full((20, 5), np.nan), tr=2.0)


def test_what_was_read_is_returned_on_demand(extractor, caplog) -> None:
    scan_io_fmrilm.warn_once.cache_clear()
    out = extractor([bold(40), bold(12)], tr=2.0, return_windows=True)
    first = {"scan": 0, "atlas": "tiny", "start": 0, "stop": 32, "scan_seconds": 80, "frames": 16}
    assert out["windows"][0] == {**first, "rois": 5, "missing_rois": []}
    assert out["windows"][1]["scan_seconds"] == out["windows"][1]["stop"] == 24
    assert caplog.messages == ["of scans of 80 s, the first 32 s are read, window='first'"]
    sliding = extractor(bold(40), tr=2.0, window="sliding", return_windows=True)["windows"]
    assert [(item["start"], item["stop"]) for item in sliding] == [(0, 32), (32, 64)]


def test_columns_with_numbers_are_labels_or_in_the_atlas_order(extractor, tiny_atlas, signal, tmp_path) -> None:
    expected = extractor(signal, tr=2.0)["fmri_values"]
    shuffled = [3, 1, 4, 0, 2]
    tables = {
        "by label.1D": (signal[:, shuffled], [tiny_atlas.labels[roi] for roi in shuffled]),
        "other numbers.1D": (signal, [2001, 2002, 2101, 2102, 2111]),
        "counted.csv": (signal, range(5)),
        "none.csv": (signal, None),
    }
    for name, (values, header) in tables.items():
        join, mark = (",", "") if name.endswith(".csv") else ("\t", "#")
        lines = [] if header is None else [join.join(f"{mark}{number}" for number in header)]
        lines += [join.join(map(str, row)) for row in values.tolist()]
        (tmp_path / name).write_text("\n".join(lines))
        torch.testing.assert_close(extractor(tmp_path / name, tr=2.0)["fmri_values"], expected)
    # as pandas writes it, with its index
    pd.DataFrame(signal).to_csv(tmp_path / "frame.csv")
    torch.testing.assert_close(extractor(tmp_path / "frame.csv", tr=2.0)["fmri_values"], expected)
    np.savetxt(tmp_path / "more.1D", np.hstack([signal, signal]), header="1 2 3 4 5 6 7 8 9 10")
    with pytest.raises(ValueError, match=r"got \(20, 10\): 10 ROIs instead of 5"):
        extractor(tmp_path / "more.1D", tr=2.0)


def test_implausible_repetition_time_of_a_header_is_refused(extractor, signal, tmp_path) -> None:
    for tr, message in ((0, "has none"), (2000, r"has no usable one \(2000 s\)")):
        with pytest.raises(ValueError, match=f"repetition time is not known: its header {message}, and no sidecar"):
            extractor(in_a_row(signal, tr))
    nib.save(in_a_row(signal, 2000), tmp_path / "a.nii")
    (tmp_path / "a.json").write_text('{"RepetitionTime": 2000}')
    with pytest.raises(ValueError, match=r"a.json: RepetitionTime must be in .*got 2000; milliseconds\?"):
        extractor(tmp_path / "a.nii")
    (tmp_path / "a.json").write_text('{"RepetitionTime": 2.0}')
    found = extractor.read_signal(tmp_path / "a.nii", label_image=LABEL_IMAGE)
    assert found.tr == 2.0 and not found.missing.any()


def test_given_repetition_time_goes_before_the_header(extractor, signal) -> None:
    out = extractor(in_a_row(signal, 1.0), tr=2.0, label_image=LABEL_IMAGE)
    assert torch.equal(out["fmri_values"], extractor(signal, tr=2.0)["fmri_values"])


def with_value(value: float) -> np.ndarray:
    signal = bold(20)
    signal[3:5, 2] = value
    return signal


@pytest.mark.parametrize(
    "scan, arguments, message",
    [
        (lambda: bold(20), {}, r"repetition time is not known: give it in seconds \(tr=..., or --tr\)"),
        (lambda: bold(20), {"tr": 2000}, "got 2000; milliseconds?"),
        (lambda: bold(20), {"tr": 0}, "tr must be in .* seconds, got 0$"),
        (lambda: bold(20), {"tr": float("nan")}, "tr must be in"),
        (lambda: bold(20, 4), {"tr": 2.0}, r"\[\*, 5\] for atlas 'tiny', got \(20, 4\): 4 ROIs instead of 5"),
        (lambda: bold(20).T, {"tr": 2.0}, r"\[time, rois\] = \[\*, 5\].*got \(5, 20\): transposed\?"),
        (lambda: bold(20)[0], {"tr": 2.0}, "not two-dimensional"),
        (lambda: bold(20)[:0], {"tr": 2.0}, "no frames"),
        (lambda: bold(20).astype(str), {"tr": 2.0}, "real numbers"),
        (lambda: bold(20), {"tr": 2.0, "atlas": "aal"}, r"no atlas 'aal'; packaged: .*knows: tiny \(5 ROIs\)"),
        (lambda: bold(20), {"tr": 2.0, "atlas": "x.tsv"}, r"no table of an atlas at x.tsv. This .* knows: tiny"),
        (lambda: bold(20), {"tr": 2.0, "window": "last"}, "window must be one of.*'last'"),
        (lambda: bold(20), {"tr": 2.0, "window_stride": 0}, "at least 1 frame, got 0"),
        (lambda: with_value(np.nan), {"tr": 2.0}, r"2 of 100 values.*'tiny_2' \(column 2\)"),
        (lambda: with_value(np.inf), {"tr": 2.0}, "2 of 100 values"),
        (lambda: bold(20, 94), {"tr": 2.0}, "94 ROIs instead of 5; known atlases of that many: aal2-94"),
        (lambda: bold(7), {"tr": 0.8}, r"7 frames at 0.8 s make 3 frames at 2.0 s \(5.6 s\).*4 frames \(8.0 s\)"),
        (lambda: {"tr": 2.0}, {}, "needs 'signal'"),
        (lambda: {"signal": bold(20), "tr": 2.0}, {"tr": 1.0}, "tr given twice and differently: 1.0 and 2.0"),
        (lambda: {"signal": bold(20), "atlas": "x"}, {"tr": 2.0, "atlas": "tiny"}, "atlas given twice"),
        (lambda: [], {"tr": 2.0}, "empty list"),
    ],
)
def test_unfit_scan_is_refused(extractor, scan: Callable, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extractor(scan(), **arguments)


def test_an_atlas_given_twice_alike_is_one(extractor, tiny_atlas) -> None:
    scan = {"signal": bold(20), "tr": 2.0, "atlas": tiny_atlas.to_dict()}
    for atlas in (tiny_atlas, tiny_atlas.to_dict(), "tiny"):
        assert extractor([scan], atlas=atlas)["fmri_values"].shape == (1, 5, 16)


def test_table_with_other_columns_than_rois_is_refused(extractor, tiny_atlas, tmp_path) -> None:
    for columns, message in (
        (["time"], "5 of the 5 ROIs of 'tiny' are not among the 1 columns: tiny_0, .*: none"),
        ([*tiny_atlas.rois[:4], "other"], "tiny_4; columns that the atlas does not have: other"),
        ([*tiny_atlas.rois, "tiny_0"], "expected 6 different column names, got 5"),
    ):
        np.savetxt(tmp_path / "s.tsv", [range(len(columns))], delimiter="\t", header="\t".join(columns), comments="")
        with pytest.raises(ValueError, match=message):
            extractor(tmp_path / "s.tsv", tr=2.0)


def test_atlas_must_be_named_when_several_or_none_are_known() -> None:
    for atlases, known in ((ATLASES, r"a2 \(2 ROIs\), a3"), (None, "none")):
        fitting = "a5" if atlases else "none"
        with pytest.raises(ValueError, match=f"which atlas.*{known}.*that fit the scan: {fitting}"):
            FmriLMFeatureExtractor(atlases=atlases)(bold(20), tr=2.0)
    with pytest.raises(ValueError, match=r"atlas=..., or --atlas.*scan: none; well-known ones that fit: cc200$"):
        FmriLMFeatureExtractor(atlases=ATLASES)(bold(20, 200), tr=2.0)
    out = FmriLMFeatureExtractor()(bold(20), tr=2.0, atlas=ATLASES[2])
    assert out["fmri_values"].shape == (1, 5, 32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": "last"}, "window must be"),
        ({"window_length": 8}, "got 16 and 8"),
        ({"repetition_time": 2000}, "got 2000"),
        ({"clip": 0}, "clip > 0"),
        ({"max_missing_rois": 2}, "max_missing_rois from 0 to 1, got 2"),
        ({"atlases": [ATLASES[0], ATLASES[0]]}, "different names"),
        ({"atlases": [{"name": "x"}]}, "missing rois"),
    ],
)
def test_wrong_configuration_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FmriLMFeatureExtractor(**arguments)


def test_settings_and_atlases_survive_saving(tmp_path) -> None:
    extractor = FmriLMFeatureExtractor(ATLASES, window="full", window_length=48, detrend_order=1, clip=5.0)
    extractor.save_pretrained(tmp_path)
    again = FmriLMFeatureExtractor.from_pretrained(tmp_path)
    saved = {key: value for key, value in again.to_dict().items() if key != "auto_map"}
    assert saved == {key: value for key, value in extractor.to_dict().items() if key != "auto_map"}
    assert json.loads(again.to_json_string())["window"] == "full"
    assert again.atlas("a3") == ATLASES[1]
    scan = {"signal": bold(100), "tr": 0.8, "atlas": "a5"}
    assert torch.equal(again(scan)["fmri_values"], extractor(scan)["fmri_values"])


def test_parcels_are_saved_beside_the_settings(tmp_path) -> None:
    image = in_a_row(bold(20))
    extractor = FmriLMFeatureExtractor([ATLASES[0], ATLAS_WITH_PARCELS], patch_length=4, window_length=16)
    extractor.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "atlases").iterdir()] == ["a5.npz"]
    assert str(tmp_path) not in (tmp_path / "preprocessor_config.json").read_text()
    again = FmriLMFeatureExtractor.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    for loaded in (again, FmriLMFeatureExtractor.from_pretrained(tmp_path / "again"), copy.deepcopy(extractor)):
        assert torch.equal(loaded(image, atlas="a5")["fmri_values"], extractor(bold(20), 2.0, "a5")["fmri_values"])
        assert loaded.atlas("a5").parcels.checksum == ATLAS_WITH_PARCELS.parcels.checksum
        assert loaded.atlas("a2").parcels is None


def test_parcels_are_read_when_a_volume_comes(tmp_path) -> None:
    FmriLMFeatureExtractor([ATLAS_WITH_PARCELS], patch_length=4, window_length=16).save_pretrained(tmp_path)
    Parcels(LABELS[::-1], np.eye(4)).save(tmp_path / "atlases" / "a5.npz")
    extractor = FmriLMFeatureExtractor.from_pretrained(tmp_path)
    extractor(bold(20), tr=2.0)
    with pytest.raises(ValueError, match="expected the parcels saved with 'a5'"):
        extractor(in_a_row(bold(20)))
    (tmp_path / "atlases" / "a5.npz").unlink()
    with pytest.raises(OSError, match="a5.npz"):
        FmriLMFeatureExtractor.from_pretrained(tmp_path)


def test_parcels_are_fetched_like_the_other_files_of_a_checkpoint(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    FmriLMFeatureExtractor([ATLAS_WITH_PARCELS]).save_pretrained(tmp_path)
    fetch = Mock(return_value=str(tmp_path / "atlases" / "a5.npz"))
    monkeypatch.setattr(feature_extraction_fmrilm, "cached_file", fetch)
    FmriLMFeatureExtractor.from_pretrained(str(tmp_path), revision="abc", token="secret")
    fetch.assert_called_once()
    assert fetch.call_args.args == (str(tmp_path), "atlases/a5.npz")
    assert fetch.call_args.kwargs.items() >= {"revision": "abc", "token": "secret"}.items()
