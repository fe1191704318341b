"""Readers of scan files: what each format gives; and that damaged files give a ValueError, nothing else."""

import gzip
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from datasets import Dataset, Nifti
from hypothesis import example, given, settings
from hypothesis import strategies as st
from isal import igzip

from fmrilm.processors import Parcels, parcellate, read_parcels, read_scan, scan_io_fmrilm


SHAPE, FRAMES = (4, 3, 2), 5
AFFINE = np.diag([2.0, 2, 2, 1])
CORTEX = ("CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 5, shape).astype(np.float32)


def volume_image(tr: float = 2.0, unit: str = "sec", version: type = nib.Nifti1Image) -> nib.Nifti1Image:
    image = version(noise(*SHAPE, FRAMES).astype(np.int16), AFFINE)
    image.header.set_zooms((2, 2, 2, tr))
    image.header.set_xyzt_units("mm", unit)
    return image


def brain_model() -> nib.cifti2.BrainModelAxis:
    """3 of 5 left vertices, 2 of 5 right ones, and 2 voxels."""
    left = nib.cifti2.BrainModelAxis.from_surface([0, 2, 4], 5, CORTEX[0])
    right = nib.cifti2.BrainModelAxis.from_surface([1, 3], 5, CORTEX[1])
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1, 1, 1] = mask[2, 1, 1] = True
    return left + right + nib.cifti2.BrainModelAxis.from_mask(mask, "thalamus_left", AFFINE)


def cifti_image(columns: nib.cifti2.Axis, tr: float = 0.72) -> nib.Cifti2Image:
    return nib.Cifti2Image(noise(FRAMES, len(columns)), (nib.cifti2.SeriesAxis(0, tr, FRAMES), columns))


def ptseries_image() -> nib.Cifti2Image:
    model = brain_model()
    return cifti_image(nib.cifti2.ParcelsAxis.from_brain_models([("A", model[:2]), ("B", model[2:5])]))


def write_gifti(path: Path, values: np.ndarray, intent: str, **meta: str) -> None:
    arrays = [nib.gifti.GiftiDataArray(frame, intent=intent, meta=nib.gifti.GiftiMetaData(meta)) for frame in values]
    nib.save(nib.GiftiImage(darrays=arrays), path)


def write_all(folder: Path) -> dict[str, Path]:
    """A small real file of each format."""
    nib.save(volume_image(), folder / "a.nii")
    nib.save(volume_image(version=nib.Nifti2Image), folder / "b.nii.gz")
    nib.save(cifti_image(brain_model()), folder / "a.dtseries.nii")
    nib.save(ptseries_image(), folder / "a.ptseries.nii")
    for mark in ("lh", "rh"):
        write_gifti(folder / f"{mark}.func.gii", noise(FRAMES, 5), "NIFTI_INTENT_TIME_SERIES", TimeStep="2000.0")
        nib.save(nib.MGHImage(noise(5, 1, 1, FRAMES), np.eye(4)), folder / f"a.{mark}.mgz")
    np.save(folder / "a.npy", noise(FRAMES, 3))
    (folder / "a.csv").write_text("A,B\n0,1\n2,3.5\n")
    (folder / "a.tsv").write_text("A\tB\n0\t1\n2\tn/a\n")
    (folder / "a.1D").write_text("#1 #2\n0 1\n2 3.5\n")
    return {path.name: path for path in sorted(folder.iterdir())}


# --- what each format gives


@pytest.mark.parametrize(
    "tr, unit, seconds",
    [
        (0.72, "sec", 0.72),
        (720, "msec", 0.72),
        (720000, "usec", 0.72),
        (2, "unknown", 2),
        (0, "sec", 0),
        (2, "hz", None),
    ],
)
def test_repetition_time_is_told_in_seconds(tmp_path: Path, tr: float, unit: str, seconds: float | None) -> None:
    image = volume_image(tr, unit)
    nib.save(image, tmp_path / "a.nii")
    for source in (image, tmp_path / "a.nii"):
        assert read_scan(source).tr == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_affine_is_the_one_nibabel_finds(tmp_path: Path, version: type, codes: tuple[int, int]) -> None:
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.5) * [2, -3, 2.5]
    affine = nib.affines.from_matvec(turn, [5, -7, 9])
    image = version(np.zeros((*SHAPE, FRAMES), np.int16), affine)
    image.header.set_sform(affine + 0.5, codes[0])
    image.header.set_qform(affine, codes[1])
    image.header.set_data_offset(int(image.header["sizeof_hdr"]) + 4)
    # written as it is: saving an image would set both
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4 + 2 * 24 * FRAMES))
    with open(tmp_path / "a.nii", "rb") as file:
        expected = version.header_class.from_fileobj(file).get_best_affine()
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii").affine, expected, atol=1e-5)


def test_values_of_datasets_are_read(tmp_path: Path) -> None:
    nib.save(volume_image(), tmp_path / "a.nii.gz")
    labels = np.zeros(SHAPE, int)
    labels[1:3] = 1
    expected = parcellate(read_scan(tmp_path / "a.nii.gz"), Parcels(labels, AFFINE), (1,))
    rows = Dataset.from_dict({"scan": [str(tmp_path / "a.nii.gz")]}).cast_column("scan", Nifti())
    stored = rows.cast_column("scan", Nifti(decode=False))[0]["scan"]
    packed = {"path": "a.nii.gz", "bytes": (tmp_path / "a.nii.gz").read_bytes()}
    in_memory = nib.Nifti1Image.from_bytes(volume_image().to_bytes())
    for scan in (rows[0]["scan"], stored, packed, in_memory):
        volumes = read_scan(scan)
        assert volumes.tr == 2
        np.testing.assert_array_equal(parcellate(volumes, Parcels(labels, AFFINE), (1,)), expected)


def test_arrays_and_tables_are_read(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    np.testing.assert_array_equal(read_scan(files["a.npy"]).values, noise(FRAMES, 3))
    table = read_scan(str(files["a.csv"]))
    np.testing.assert_array_equal(table.values, [[0, 1], [2, 3.5]])
    assert (table.tr, table.rois) == (None, ("A", "B"))
    assert np.isnan(read_scan(files["a.tsv"]).values[1, 1])


def test_parcellated_cifti_brings_signal_names_and_tr(tmp_path: Path) -> None:
    image = ptseries_image()
    nib.save(image, tmp_path / "a.ptseries.nii")
    for source in (image, tmp_path / "a.ptseries.nii"):
        series = read_scan(source)
        np.testing.assert_array_equal(series.values, image.get_fdata(dtype=np.float32))
        assert series.rois == ("A", "B") and series.tr == pytest.approx(0.72)


def test_dense_cifti_is_parcellated_by_surface_and_volume_labels(tmp_path: Path) -> None:
    image = cifti_image(brain_model())
    nib.save(image, tmp_path / "a.dtseries.nii")
    values = image.get_fdata()
    volume = np.zeros(SHAPE, int)
    volume[1, 1, 1], volume[2, 1, 1] = 7, 8
    parcels = Parcels(volume, AFFINE, left=[3, 9, 3, 9, 5], right=[9, 5, 9, 0, 9])
    signal = parcellate(read_scan(tmp_path / "a.dtseries.nii"), parcels, (8, 5, 3, 7, 9))
    expected = [values[:, 6], values[:, [2, 3]].mean(1), values[:, :2].mean(1), values[:, 5]]
    np.testing.assert_allclose(signal[:, :4], np.stack(expected, 1), rtol=1e-6)
    # label 9 lies on vertices that the file leaves out
    assert np.isnan(signal[:, 4]).all()
    with pytest.raises(ValueError, match="got 5 vertices in the scan's left hemisphere and 4 in the atlas"):
        parcellate(read_scan(image), Parcels(left=np.ones(4, int), right=np.ones(4, int)), (1,))


def test_label_files_give_parcels(tmp_path: Path) -> None:
    model, table = brain_model(), {0: ("?", (0, 0, 0, 0)), **{i: (str(i), (1, 1, 1, 1)) for i in range(1, 8)}}
    labels = np.arange(1, 8)
    dlabel = nib.Cifti2Image(labels[None].astype(np.float32), (nib.cifti2.LabelAxis(["x"], [table]), model))
    nib.save(dlabel, tmp_path / "a.dlabel.nii")
    parcels = read_parcels(tmp_path / "a.dlabel.nii")
    assert parcels.left.tolist() == [1, 0, 2, 0, 3] and parcels.right.tolist() == [0, 4, 0, 5, 0]
    assert parcels.volume[1, 1, 1] == 6 and parcels.volume.sum() == 13
    assert read_parcels(dlabel).checksum == parcels.checksum
    colors = np.array([[0, 0, 0, 0, 0], [1, 1, 1, 0, 1], [2, 2, 2, 0, 2]])
    for mark in ("L", "R"):
        write_gifti(tmp_path / f"x.{mark}.label.gii", np.array([[0, 1, 2]], np.int32), "NIFTI_INTENT_LABEL")
        nib.freesurfer.write_annot(tmp_path / f"{mark.lower()}h.annot", np.array([0, 1, 2]), colors, list("?ab"))
    pair = (tmp_path / "lh.annot", tmp_path / "x.R.label.gii")
    for source in (tmp_path / "x.R.label.gii", tmp_path / "lh.annot", pair):
        parcels = read_parcels(source)
        assert parcels.left.tolist() == parcels.right.tolist() == [0, 1, 2]


def test_volume_labels_alone_leave_the_surface_out_and_surface_labels_the_volume() -> None:
    scan = read_scan(cifti_image(brain_model()))
    values = scan.values
    in_volume = parcellate(scan, Parcels(np.ones(SHAPE, int), AFFINE), (1,))
    np.testing.assert_allclose(in_volume[:, 0], values[:, 5:].mean(1), rtol=1e-6)
    on_surface = parcellate(scan, Parcels(left=np.ones(5, int), right=np.ones(5, int)), (1,))
    np.testing.assert_allclose(on_surface[:, 0], values[:, :5].mean(1), rtol=1e-6)


def test_scaled_label_image_holds_the_scaled_labels(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones(SHAPE, np.int16), AFFINE)
    nib.save(image, tmp_path / "labels.nii")
    content = bytearray((tmp_path / "labels.nii").read_bytes())
    struct.pack_into("<2f", content, 112, 3, 2)
    (tmp_path / "labels.nii").write_bytes(content)
    assert (read_parcels(tmp_path / "labels.nii").volume == 5).all()


@pytest.mark.parametrize("form", ["gii", "mgz"])
def test_hemispheres_are_read_as_a_pair(tmp_path: Path, form: str) -> None:
    left, right = noise(FRAMES, 4), noise(FRAMES, 4)[::-1].copy()
    # the medial wall holds nothing, and must not thin the mean
    left[:, 1] = 0
    for mark, values in (("L", left), ("R", right)):
        path = tmp_path / f"sub-1_hemi-{mark}_bold.{form}"
        if form == "gii":
            write_gifti(path, values, "NIFTI_INTENT_TIME_SERIES", TimeStep="1400.0")
        else:
            image = nib.MGHImage(values.T[:, None, None], np.eye(4))
            image.header.set_zooms((1, 1, 1, 1400.0))
            nib.save(image, path)
    parcels = Parcels(left=[1, 1, 0, 2], right=[2, 2, 0, 0])
    both = [np.mean([left[:, 3], right[:, 0], right[:, 1]], axis=0), left[:, 0]]
    other = path.with_name(f"sub-1_hemi-L_bold.{form}")
    for source in (path, other, (other, path)):
        series = read_scan(source)
        assert series.tr == pytest.approx(1.4)
        np.testing.assert_allclose(parcellate(series, parcels, (2, 1)), np.stack(both, 1), rtol=1e-6)
    other.unlink()
    with pytest.raises(ValueError, match=f"the other hemisphere beside it as sub-1_hemi-L_bold.{form}"):
        read_scan(path)


@pytest.mark.parametrize(
    "name, content, rois",
    [
        # as the Preprocessed Connectomes Project and AFNI write them
        ("a.1D", "#1\t#2\t#3\n0.5\t1\t2\n3\t4\t5\n", ("1", "2", "3")),
        ("a.1d", "# made by AFNI\n#2001 #2002 #2101\n  0.5  1 2 \n3 4   5\n# end\n", ("2001", "2002", "2101")),
        ("a.1D", "# Left Right Both\n0.5 1 2\n3 4 5\n", ("Left", "Right", "Both")),
        ("a.1D", "# 3dmaskave\n0.5 1 2\n3 4 5\n", None),
        # as pandas and numpy write them
        ("a.csv", "0,1,2\n0.5,1,2\n3,4,5\n", ("0", "1", "2")),
        ("a.csv", "0.5,1,2\n3,4,5\n", None),
        ("a.tsv", "7\t9\t8\n0.5\t1\t2\n3\t4\t5\n", ("7", "9", "8")),
    ],
)  # fmt: skip
def test_numbered_or_absent_headers_of_tables(tmp_path: Path, name: str, content: str, rois: tuple | None) -> None:
    (tmp_path / name).write_text(content)
    table = read_scan(tmp_path / name)
    assert table.rois == rois
    np.testing.assert_array_equal(table.values, [[0.5, 1, 2], [3, 4, 5]])


# --- the BIDS sidecar's repetition time


@pytest.mark.parametrize(
    "name, sidecar",
    [
        ("b.nii.gz", "b.json"),
        ("a.dtseries.nii", "a.json"),
        ("a.dtseries.nii", "a.dtseries.json"),
        ("a.ptseries.nii", "a.json"),
        ("lh.func.gii", "lh.json"),
        ("a.lh.mgz", "a.lh.json"),
        ("a.npy", "a.json"),
        ("a.csv", "a.json"),
    ],
)
def test_sidecar_goes_before_a_header_that_disagrees(tmp_path: Path, caplog, name: str, sidecar: str) -> None:
    path = write_all(tmp_path)[name]
    header = read_scan(path).tr
    (tmp_path / sidecar).write_text('{"RepetitionTime": 1.25, "TaskName": "rest"}')
    scan = read_scan(path)
    assert (scan.tr, scan.tr_from) == (1.25, sidecar)
    # a conflict is a warning with both values
    assert len(caplog.messages) == bool(header)
    assert not header or f"1.25 s of {sidecar}; the header has {header:g} s" in caplog.messages[0]
    other = "rh.func.gii" if "func" in name else "a.rh.mgz"
    if "h." in name:
        assert read_scan((path, tmp_path / other)).tr == 1.25
    (tmp_path / sidecar).write_text('{"TaskName": "rest"}')
    assert read_scan(path).tr == header


def test_sidecars_of_a_dataset_are_inherited(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "sub-01" / "ses-a" / "func"
    folder.mkdir(parents=True)
    scan = folder / "sub-01_ses-a_task-rest_run-1_bold.nii.gz"
    nib.save(volume_image(1.0), scan)

    def found(path: str, seconds: float) -> tuple[float | None, str]:
        (tmp_path / path).write_text(json.dumps({"RepetitionTime": seconds}))
        read = read_scan(scan)
        return read.tr, read.tr_from

    # of no dataset, of other scans, of another suffix
    assert found("task-rest_bold.json", 3.0) == found("study/task-motor_bold.json", 3.0) == (1.0, "header")
    assert found("study/task-rest_run-2_bold.json", 3.0) == found("study/task-rest_sbref.json", 3.0) == (1.0, "header")
    assert found("study/bold.json", 1.4) == (1.4, "bold.json")
    assert found("study/task-rest_bold.json", 1.5) == (1.5, "task-rest_bold.json")
    # the more specific one, the nearer one, its own
    assert found("study/task-rest_run-1_bold.json", 1.6) == (1.6, "task-rest_run-1_bold.json")
    assert found("study/sub-01/sub-01_bold.json", 1.7) == (1.7, "sub-01_bold.json")
    assert found(f"study/sub-01/ses-a/func/{scan.name[:-7]}.json", 1.8) == (1.8, f"{scan.name[:-7]}.json")


@pytest.mark.parametrize("tr", [1.0, 0.0, 1000.0])
def test_headers_with_a_wrong_repetition_time_are_read_with_their_sidecar(tmp_path: Path, tr: float) -> None:
    nib.save(volume_image(tr), tmp_path / "a.nii")
    (tmp_path / "a.json").write_text('{"RepetitionTime": 2}')
    content = (tmp_path / "a.nii").read_bytes()
    rows = Dataset.from_dict({"scan": [str(tmp_path / "a.nii")]}).cast_column("scan", Nifti())
    in_file = {"path": str(tmp_path / "a.nii"), "bytes": content}
    for scan in (tmp_path / "a.nii", nib.load(tmp_path / "a.nii"), rows[0]["scan"], in_file):
        assert read_scan(scan).tr == 2.0
    # a row that holds the bytes alone has no file beside which one could look
    assert read_scan({"path": "a.nii", "bytes": content}).tr == tr


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"RepetitionTime": "2"}', '{"RepetitionTime": NaN}', "\xff"])
def test_broken_sidecar_is_refused(tmp_path: Path, content: str) -> None:
    np.save(tmp_path / "a.npy", noise(FRAMES, 3))
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: (not a readable sidecar|expected RepetitionTime in seconds, got)"):
        read_scan(tmp_path / "a.npy")


# --- what is refused


def changed(offset: int, form: str, *values: float, data: int = 240) -> bytes:
    """A NIfTI-1 file of little-endian int16 in whose header some values are others."""
    block = bytearray(volume_image().header.binaryblock)
    struct.pack_into("<f", block, 108, 352)
    struct.pack_into(f"<{form}", block, offset, *values)
    return bytes(block) + bytes(4 + data)


def packed(content: bytes) -> bytes:
    """Compressed without the time of day: parallel runs must name a case alike."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    "content, message",
    [
        (changed(40, "5h", 4, 32767, 32767, 9, 1), "needs .* bytes, but the file has 592 bytes"),
        (changed(42, "h", -4), r"at least one voxel along every axis, got shape \(-4,"),
        (changed(40, "h", 0), "1 to 7 dimensions in the header, got 0"),
        (changed(40, "h", 8), "expected a NIfTI-1 or NIfTI-2 file"),
        (changed(40, "h", -1), "expected a NIfTI-1 or NIfTI-2 file"),
        (changed(70, "h", 32), "NIfTI data type 32"),
        (changed(108, "f", np.nan), "values to start at byte"),
        (changed(108, "f", 0), "values to start at byte 352 or later, got 0.0"),
        (changed(108, "f", 10), "values to start at byte"),
        (changed(112, "ff", 1, np.inf), "Valid slope but invalid intercept inf"),
        (changed(252, "hh3f", 1, 0, 1, 1, 1), "w2 should be positive"),
        (changed(344, "4s", b"xxxx"), "expected a NIfTI-1 or NIfTI-2 file"),
        (changed(0, "i", 100), "expected a NIfTI-1 or NIfTI-2 file"),
        (changed(0, "i", 348, data=200), "needs 592 bytes, but the file has 552"),
        (b"", "expected a NIfTI-1"),
        (packed(changed(0, "i", 348))[:60], "a.nii: the file is damaged or cut short"),
        (packed(changed(0, "i", 348))[:-4], "a.nii: the file is damaged or cut short"),
        (packed(changed(0, "i", 348))[:-8] + bytes(8), "a.nii: the file is damaged or cut short"),
        (packed(changed(0, "i", 348, data=200)), "a.nii: the file is damaged or cut short"),
        (packed(changed(42, "3h", 32767, 32767, 9)), r"needs \d+ bytes, but the file has \d+ compressed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inflated", [gzip.open, igzip.open])
def test_damaged_volume_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inflated: Callable, content: bytes, message: str
) -> None:
    monkeypatch.setattr(scan_io_fmrilm, "inflated", inflated)
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parcellate(read_scan(tmp_path / "a.nii"), Parcels(np.ones(SHAPE, int), AFFINE), (1,))


@pytest.mark.parametrize("pack", [bytes, packed])
def test_false_size_is_refused_in_bounded_memory(tmp_path: Path, pack) -> None:
    # 400 bytes that claim 18 GB
    path = tmp_path / "a.nii"
    path.write_bytes(pack(changed(42, "4h", 1024, 1024, 900, 10, data=48)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="needs 18874368352 bytes"):
        read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_huge_volume_within_the_reach_of_compression_is_refused() -> None:
    volumes = scan_io_fmrilm.Volumes("x", (2048, 2048, 2048, 1), AFFINE, 2.0, np.dtype("i2"), 352, 1.0, 0.0, b"")
    with pytest.raises(ValueError, match="below 2 GiB"):
        next(volumes.stored())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "A,B\n", "got no row of numbers"),
        ("a.csv", "A;B\n1;2\n", "separated by commas or tabs, got semicolons"),
        ("a.tsv", "A;B\n1;2\n", "separated by commas or tabs, got semicolons"),
        ("a.csv", "A\tB\n1\t2\n", "separated by commas, got tabs"),
        ("a.1D", "#1 #2\n1 2\n3\n", "line 3: expected 2 cells, got 1"),
        ("a.1D", "# nothing\n", "got no row of numbers"),
        ("a.csv", "A,B\n1,2\n3\n", "line 3: expected 2 cells, got 1"),
        ("a.csv", "A,B\n1,x\n", "expected numbers below the header: could not"),
        ("a.csv", "roi,0,1\nA,1,2\nB,1,2\n", "names down the first column, such as 'A': transposed?"),
        ("a.tsv", "A\t1\t2\nB\t1\t2\n", "names down the first column, such as 'B': transposed?"),
        ("a.txt", "1", "got a.txt"),
        ("lh.func.gii", "1", "the other hemisphere beside it as rh.func.gii"),
        ("a.func.gii", "1", "expected a name with hemi-L, lh, L"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_scan(tmp_path / name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        read_scan(tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match=r"no label image at .*none\.nii"):
        read_parcels(tmp_path / "none.nii")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        Parcels.load(tmp_path / "none.npz")


def test_cifti_of_other_axes_is_refused() -> None:
    scalars = nib.Cifti2Image(noise(1, 7), (nib.cifti2.ScalarAxis(["x"]), brain_model()))
    with pytest.raises(ValueError, match="axes ScalarAxis and BrainModelAxis"):
        read_scan(scalars)
    with pytest.raises(ValueError, match=r"expected a label file \(.dlabel.nii\), got a ScalarAxis"):
        read_parcels(scalars)


def test_cifti_without_a_file_of_its_own_is_refused(tmp_path: Path) -> None:
    nib.save(cifti_image(brain_model()), tmp_path / "a.dtseries.nii")
    with pytest.raises(ValueError, match="CIFTI files are read from a path, got bytes"):
        read_scan({"path": None, "bytes": (tmp_path / "a.dtseries.nii").read_bytes()})


def test_hemispheres_of_two_scans_are_refused(tmp_path: Path) -> None:
    for names in (
        ("sub-1_hemi-L.gii", "sub-2_hemi-R.gii"),
        ("sub-1_hemi-L.gii", "sub-2_hemi-L.gii"),
        ("rh.gii", "lh.gii"),
    ):
        with pytest.raises(ValueError, match=f"right hemisphere of one scan, got {names[0]} and {names[1]}"):
            read_scan([tmp_path / name for name in names])
    for mark, frames in (("lh", FRAMES), ("rh", FRAMES + 1)):
        write_gifti(tmp_path / f"{mark}.func.gii", noise(frames, 4), "NIFTI_INTENT_TIME_SERIES", TimeStep="2000.0")
    with pytest.raises(ValueError, match="hemispheres of one scan, got 5 frames at TR 2.0 and 6 at 2.0"):
        read_scan(tmp_path / "lh.func.gii")
    write_gifti(tmp_path / "rh.func.gii", noise(FRAMES, 4, 3), "NIFTI_INTENT_TIME_SERIES")
    with pytest.raises(ValueError, match=r"expected a series \[time, vertices\], got shape"):
        read_scan(tmp_path / "lh.func.gii")


# --- fuzz: bytes of real files flipped, cut out and cut off

PARCELS = Parcels(np.ones(SHAPE, int), AFFINE, left=np.ones(5, int), right=np.ones(5, int))
FORMATS = [
    "a.nii",
    "b.nii.gz",
    "a.dtseries.nii",
    "a.ptseries.nii",
    "lh.func.gii",
    "a.lh.mgz",
    "a.npy",
    "a.csv",
    "a.1D",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    files = write_all(folder)
    (folder / "sidecar.json").write_text('{"RepetitionTime": 2.0, "TaskName": "rest"}')
    return {**files, "sidecar.json": folder / "sidecar.json"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FORMATS, "sidecar.json"])
@settings(max_examples=100, deadline=None)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    start=st.booleans(),
    end=st.floats(0, 1),
    cut=st.booleans(),
)
@example(flips=[], start=False, end=1.0, cut=False)
def test_damaged_files_give_a_value_error_or_a_signal(
    originals: dict[str, Path], name: str, flips: list, start: bool, end: float, cut: bool
) -> None:
    data = bytearray(originals[name].read_bytes())
    # headers, where most can go wrong, get half of the flips
    reach = min(len(data), 352) if start else len(data)
    for position, value in flips:
        data[int(position * reach)] = value
    if cut:
        del data[int(end * len(data)) :]
    # next to the undamaged other hemisphere
    path = originals[name].with_name(f"damaged.{name}")
    path.write_bytes(data)
    if name == "sidecar.json":
        path = Path(shutil.copy(originals["a.npy"], path.with_suffix(".npy")))
    try:
        other = path.with_name(path.name.replace("lh", "rh"))
        scan = read_scan((path, shutil.copy(originals[name], other)) if "lh" in name else path)
        signal = scan.values if hasattr(scan, "rois") else parcellate(scan, PARCELS, (1,))
    except ValueError:
        assert flips or cut
    else:
        assert signal.dtype.kind in "fiu"
