"""Scans from Parquet, standardised once; windows, mixtures, and codes that are computed once."""

import shutil
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest

from fmrilm import FmriLMFeatureExtractor
from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.training.data import dataset
from fmrilm.training.data.dataset import (
    MixedWindows,
    Scans,
    codec_fingerprint,
    collate_signals,
    cut_windows,
    encode_items,
    encode_windows,
    load_scans,
)
from helpers import atlas, joined, noise_scans, noise_signal, scans_of, write_prepared


def prepared(folder: Path, signals: list[np.ndarray], of: Atlas) -> Path:
    """Of subjects p0, p1, ... at two sites, two to a shard."""
    rows = [
        {"subject": f"p{row}", "site": f"site{row % 2}", "age": 20 + row, "missing_rois": 0}
        | {"signal": signal, "censored": [False] * len(signal)}
        for row, signal in enumerate(signals)
    ]
    return write_prepared(folder, of, rows, per_shard=2, age="int64")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    of = atlas()
    signals = [100 + 7 * noise_signal(f"p{row}", 40, of) for row in range(5)]
    # a ROI outside the field of view
    signals[3][:, 2] = np.nan
    return prepared(tmp_path / "study", signals, of)


def test_scans_shorter_than_a_patch_of_the_codec_are_left_out(tmp_path: Path, caplog) -> None:
    signals = [100 + 7 * noise_signal(f"p{row}", frames, atlas()) for row, frames in enumerate((40, 20, 64))]
    folder, extractor = prepared(tmp_path / "study", signals, atlas()), FmriLMFeatureExtractor(patch_length=32)
    scans = load_scans(folder, extractor)
    assert scans.table["subject"].tolist() == ["p0", "p2"] and scans.signal(1).shape[0] == 64
    assert "1 scans of less than a patch, 32 frames, are left out" in caplog.text
    with pytest.raises(ValueError, match="scans of at least a patch, 128 frames, got none"):
        load_scans(folder, FmriLMFeatureExtractor(patch_length=128, window_length=128))


def test_scans_are_standardised_once_and_stay_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, prepare_signal = FmriLMFeatureExtractor(), FmriLMFeatureExtractor.prepare_signal
    counted = create_autospec(prepare_signal, side_effect=prepare_signal)
    monkeypatch.setattr(FmriLMFeatureExtractor, "prepare_signal", counted)
    scans = load_scans(folder, extractor)
    assert len(scans) == counted.call_count == 5
    assert scans.table["subject"].tolist() == [f"p{row}" for row in range(5)]
    assert scans.table["age"].tolist() == [20, 21, 22, 23, 24] and "signal" not in scans.table
    assert scans.table["dataset"].tolist() == [f"site{row % 2}" for row in range(5)]
    # of the memory map: nothing is held
    assert scans.parts["small"].cache_files
    again = load_scans(folder, extractor)
    assert counted.call_count == 5 and again.fingerprint == scans.fingerprint
    for row in range(5):
        raw = 100 + 7 * noise_signal(f"p{row}", 40)
        expected, _ = prepare_signal(extractor, raw, tr=2.0, atlas=atlas())
        if row == 3:
            expected[:, 2] = np.nan
        assert again.signal(row).dtype == np.float32
        np.testing.assert_array_equal(again.signal(row), expected)
    # other settings are other signals
    load_scans(folder, FmriLMFeatureExtractor(detrend_order=1))
    assert counted.call_count == 10


def test_selected_scans_keep_their_signals(folder: Path) -> None:
    scans = load_scans(folder, FmriLMFeatureExtractor())
    some = scans.select([4, 1])
    assert some.table["subject"].tolist() == ["p4", "p1"] and some.fingerprint != scans.fingerprint
    np.testing.assert_array_equal(some.signal(0), scans.signal(4))
    assert some.atlas(0) == atlas()


def test_folders_of_several_atlases_are_one_dataset(folder: Path, tmp_path: Path) -> None:
    large = atlas("large", 12)
    other = prepared(tmp_path / "other", [noise_signal("q", 48, large)], large)
    more = prepared(tmp_path / "more", [noise_signal("r", 40)], atlas())
    scans = load_scans([folder, other, more], FmriLMFeatureExtractor())
    assert len(scans) == 7 and set(scans.atlases) == {"small", "large"}
    assert scans.table["frames"].tolist() == [40] * 5 + [48, 40]
    assert scans.signal(5).shape == (48, 12) and scans.atlas(5) == large
    np.testing.assert_array_equal(scans.signal(6), load_scans(more, FmriLMFeatureExtractor()).signal(0))
    another = atlas("small", 12)
    third = prepared(tmp_path / "third", [noise_signal("q", 48, another)], another)
    with pytest.raises(ValueError, match="expected one atlas 'small', got another one of that name in third"):
        load_scans([folder, third], FmriLMFeatureExtractor())


def test_scans_of_a_folder_written_anew_are_not_taken_from_the_cache(folder: Path) -> None:
    before = load_scans(folder, FmriLMFeatureExtractor()).fingerprint
    shutil.rmtree(folder)
    prepared(folder, [noise_signal(f"q{row}", 40) for row in range(5)], atlas())
    scans = load_scans(folder, FmriLMFeatureExtractor())
    assert scans.fingerprint != before
    expected, _ = FmriLMFeatureExtractor().prepare_signal(noise_signal("q0", 40), tr=2.0, atlas=atlas())
    np.testing.assert_array_equal(scans.signal(0), expected)


DAMAGES = {
    "cut short": lambda content: content[:-100],
    "empty": lambda content: b"",
    # among the values of the signal
    "one bit": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1])
    + content[len(content) // 2 + 1 :],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named(damage: str, folder: Path) -> None:
    path = folder / "small" / "part-00001.parquet"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match="small/part-00001.parquet is damaged"):
        load_scans(folder, FmriLMFeatureExtractor())


def test_folder_without_scans_is_refused(tmp_path: Path) -> None:
    for folders in (tmp_path, []):
        with pytest.raises(ValueError, match="expected a folder that `fmrilm prepare` or `fmrilm describe` wrote"):
            load_scans(folders, FmriLMFeatureExtractor())


def test_scan_that_is_too_short_is_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "study", [noise_signal("a", 40), noise_signal("b", 10)], atlas())
    with pytest.raises(ValueError, match="scan of subject p1: scan too short"):
        load_scans(folder, FmriLMFeatureExtractor())


def test_windows_are_cut_at_each_stride_and_short_scans_are_one() -> None:
    scans = joined(noise_scans("a"), noise_scans("b", frames=10, of=atlas("large", 12)))
    windows = cut_windows(scans, length=16, stride=8)
    assert [(window.scan, window.start, window.length) for window in windows] == [
        (0, 0, 16), (0, 8, 16), (0, 16, 16), (0, 24, 16), (1, 0, 8),
    ]  # fmt: skip
    for row, window in enumerate(windows):
        expected = scans.signal(window.scan)[window.start : window.start + window.length]
        item = windows.item(row)
        np.testing.assert_array_equal(item["signal"], expected)
        np.testing.assert_array_equal(item["coordinates"], scans.atlas(window.scan).coordinates)
        found = describe(expected, scans.atlas(window.scan), CORE_MEASURES)
        np.testing.assert_array_equal(windows.descriptors()[row], found)
    with pytest.raises(ValueError, match="at least one patch of 4 frames, got none"):
        cut_windows(noise_scans("a", frames=3), 16, 8)


def test_missing_rois_are_left_out_of_windows() -> None:
    signal = noise_signal("a")
    signal[:, [1, 5]] = np.nan
    windows = cut_windows(scans_of([signal], atlas()), 16, 16)
    item, present = windows.item(0), [0, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(item["signal"], signal[:16, present])
    np.testing.assert_array_equal(item["coordinates"], atlas().coordinates[present])
    assert np.isfinite(windows.descriptors()[0]).any()
    batch = collate_signals([item, {**item, "signal": item["signal"][:, :3], "coordinates": item["coordinates"][:3]}])
    assert batch["fmri_values"].shape == (2, 7, 16) and batch["fmri_mask"].sum().item() == 10 * 16
    np.testing.assert_array_equal(batch["fmri_values"][1, :3].numpy(), item["signal"][:, :3].T)
    np.testing.assert_array_equal(batch["roi_coordinates"][1, :3].numpy(), item["coordinates"][:3])
    assert not batch["fmri_values"][1, 3:].any() and not batch["roi_coordinates"][1, 3:].any()


def mixtures(max_rois: int = 100, seed: int = 0) -> MixedWindows:
    scans = joined(noise_scans("a", "b"), noise_scans("c", of=atlas("large", 12)))
    descriptors = cut_windows(scans, 16, 4).descriptors()
    cohort = Cohort.fit("tests", CORE_MEASURES, descriptors, 3, list(scans.atlases.values()))
    return MixedWindows(scans, 16, cohort, size=20, seed=seed, max_rois=max_rois)


def equal(first: dict, second: dict) -> bool:
    return all(
        first[name] == second[name] if name == "subject" else np.array_equal(first[name], second[name], equal_nan=True)
        for name in first
    )


def test_mixtures_of_scans_without_some_rois_are_described_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made, signal = mixtures(), Scans.signal

    def without_one(scans: Scans, scan: int) -> np.ndarray:
        found = signal(scans, scan).copy()
        found[:, scan] = np.nan
        return found

    monkeypatch.setattr(Scans, "signal", without_one)
    whole = {len(one) for one in made.scans.atlases.values()}
    items = [made[index] for index in range(20)]
    assert all(len(item["coordinates"]) == item["signal"].shape[1] not in whole for item in items)
    assert all(np.isfinite(item["signal"]).all() and np.isfinite(item["descriptors"]).any() for item in items)


def test_mixtures_depend_on_seed_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = mixtures(), mixtures()
    expected = [first[index] for index in range(20)]
    assert {item["subject"] for item in expected} == {"a", "b", "c"}
    # as where there are more scans than stay in memory
    monkeypatch.setattr(dataset, "SIGNALS_READ", 1)
    assert all(equal(expected[index], second[index]) for index in reversed(range(20)))
    assert first.fingerprint == second.fingerprint != mixtures(seed=1).fingerprint
    monkeypatch.setattr(dataset, "PLAIN_SHARE", 0.0)
    mixed = [mixtures(seed=seed)[index]["signal"].tobytes() for seed in (0, 1) for index in range(20)]
    assert len(set(mixed)) == 40


def test_mixtures_come_with_their_own_descriptors() -> None:
    made = mixtures()
    atlases = {9: atlas(), 12: atlas("large", 12)}
    items = [made[index] for index in range(20)]
    for item in items:
        of = atlases[item["signal"].shape[1]]
        expected = made.cohort.z_scores(made.cohort.describe(item["signal"], of))
        assert np.allclose(item["descriptors"], expected, atol=1e-3, equal_nan=True)
        assert np.array_equal(item["coordinates"], of.coordinates)
        assert np.isfinite(item["descriptors"]).any()
    assert {item["signal"].shape[1] for item in items} == {9, 12}


def test_mixtures_keep_some_rois_and_the_descriptors_of_all() -> None:
    whole, part = mixtures(), mixtures(max_rois=4)
    for index in range(10):
        all_rois, chosen = whole[index], part[index]
        rows = [all_rois["coordinates"].tolist().index(row) for row in chosen["coordinates"].tolist()]
        assert len(rows) == 4 and rows == sorted(rows)
        assert np.array_equal(chosen["signal"], all_rois["signal"][:, rows])
        assert np.array_equal(chosen["descriptors"], all_rois["descriptors"], equal_nan=True)


def test_mixtures_of_short_scans_are_as_long_as_the_first_of_both() -> None:
    signals = [noise_signal(name, frames, atlas(), 0) for name, frames in (("a", 40), ("b", 40), ("c", 11))]
    scans = scans_of(signals, atlas(), subject=["a", "b", "c"])
    cohort = Cohort.fit("tests", CORE_MEASURES, cut_windows(scans, 8, 4).descriptors(), 3, [atlas()])
    made = MixedWindows(scans, 100, cohort, size=20, seed=0)
    items = [made[index] for index in range(20)]
    whole = {"a": 40, "b": 40, "c": 8}
    assert all(len(item["signal"]) == whole[item["subject"]] for item in items)
    assert {len(item["signal"]) for item in items} == {40, 8}
    batch = collate_signals(items)
    assert batch["fmri_mask"].sum((1, 2)).tolist() == [item["signal"].size for item in items]
    assert not batch["fmri_values"][~batch["fmri_mask"]].any()
    np.testing.assert_array_equal(batch["descriptors"].numpy(), [item["descriptors"] for item in items])
    with pytest.raises(ValueError, match="at least 4 frames to mix windows of, got none"):
        MixedWindows(noise_scans("a", frames=3), 100, cohort, 1, 0)


def windows_of(*subjects: str):
    return cut_windows(joined(noise_scans(*subjects), noise_scans("z", frames=11, of=atlas("large", 12))), 16, 8)


def test_codes_and_features_are_those_of_each_window_alone(tiny_codec, tmp_path: Path) -> None:
    windows = windows_of("a", "b")
    encoded = encode_windows(tiny_codec, windows, tmp_path)
    assert encoded.features.shape == (9, tiny_codec.config.num_scan_features)
    for row in range(len(windows)):
        inputs = collate_signals([windows.item(row)])
        codes = tiny_codec.encode(**inputs)
        np.testing.assert_array_equal(encoded.codes[row], codes[0].numpy())
        np.testing.assert_allclose(encoded.features[row], tiny_codec.scan_features(codes)[0].detach(), atol=1e-4)
    # 8 frames are two patches of two tokens
    assert encoded.codes[-1].shape == (4, 3) and encoded.codes[0].shape == (8, 3)


def test_codes_are_computed_once(tiny_codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SHARD", 4)
    expected = encode_windows(tiny_codec, windows_of("a", "b"), tmp_path)
    [kept] = tmp_path.iterdir()
    # as a stopped run leaves it
    (kept / "part-00001.npz").unlink()
    counted = Mock(wraps=encode_items)
    monkeypatch.setattr(dataset, "encode_items", counted)
    for _ in range(2):
        again = encode_windows(tiny_codec, windows_of("a", "b"), tmp_path)
        assert all(np.array_equal(*pair) for pair in zip(again.codes, expected.codes, strict=True))
        np.testing.assert_array_equal(again.features, expected.features)
        counted.assert_called_once()
    assert len(counted.call_args.args[1]) == 4


def test_mixtures_are_made_once_with_what_is_known_of_them(
    tiny_codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SHARD", 4)
    mixed = mixtures()
    items = [mixed[index] for index in range(len(mixed))]
    first = encode_windows(tiny_codec, mixed, tmp_path)
    monkeypatch.delattr(MixedWindows, "__getitem__")
    for encoded in (first, encode_windows(tiny_codec, mixed, tmp_path)):
        np.testing.assert_array_equal(encoded.known["descriptors"], [item["descriptors"] for item in items])
        assert encoded.known["subject"].tolist() == [item["subject"] for item in items]


@pytest.mark.parametrize("change", ["codec", "scans", "windows"])
def test_other_inputs_are_encoded_anew(change: str, tiny_codec, make_codec, tmp_path: Path) -> None:
    before = encode_windows(tiny_codec, windows_of("a", "b"), tmp_path)
    codec = make_codec(hidden_size=32) if change == "codec" else tiny_codec
    windows = windows_of("a", "c") if change == "scans" else windows_of("a", "b")
    if change == "windows":
        windows = cut_windows(windows.scans, 16, 12)
    after = encode_windows(codec, windows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    fresh = encode_items(codec, windows.items())
    np.testing.assert_allclose(after.features, fresh.features, atol=1e-4)
    assert len(after.codes) != len(before.codes) or not np.array_equal(after.features, before.features)


def test_fingerprint_of_a_codec_is_that_of_its_weights(tiny_codec, make_codec) -> None:
    assert codec_fingerprint(tiny_codec) == codec_fingerprint(make_codec())
    next(tiny_codec.parameters()).data += 1e-3
    assert codec_fingerprint(tiny_codec) != codec_fingerprint(make_codec())


def test_interrupted_encoding_leaves_no_half_file(tiny_codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle, **arrays) -> None:
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(dataset.np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        encode_windows(tiny_codec, windows_of("a"), tmp_path)
    assert not list(tmp_path.rglob("*.npz"))
