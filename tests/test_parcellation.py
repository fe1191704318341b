import nibabel as nib
import numpy as np
import pytest

from fmrilm.processors import parcellate, parcellation, read_scan


SHAPE, FRAMES = (6, 5, 4), 7
AFFINE = np.array([[3.0, 0, 0, -9], [0, 3, 0, -6], [0, 0, 3, -6], [0, 0, 0, 1]])


@pytest.fixture
def labels() -> np.ndarray:
    values = np.zeros(SHAPE, dtype=np.int16)
    values[0:2], values[2:4], values[4:5, :3] = 30, 10, 20
    return values


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 5, (*SHAPE, FRAMES)).astype(np.float32)


def expected_means(volume: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([volume[labels == label].mean(axis=0) for label in (10, 20, 30)], axis=1)


def image_of(values: np.ndarray, affine: np.ndarray = AFFINE, tr: float = 2.0, unit: str = "sec") -> nib.Nifti1Image:
    image = nib.Nifti1Image(values, affine)
    if values.ndim == 4:
        image.header.set_zooms((3.0, 3.0, 3.0, tr))
        image.header.set_xyzt_units("mm", unit)
    return image


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_signal_is_the_mean_of_each_parcel_in_the_order_of_the_labels(
    volume, labels, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcellation, "CHUNK_BYTES", chunk_bytes)
    signal = parcellate(image_of(volume), image_of(labels), (10, 20, 30))
    assert signal.dtype == np.float32 and signal.shape == (FRAMES, 3)
    np.testing.assert_allclose(signal, expected_means(volume, labels), rtol=1e-5)


def test_finer_and_flipped_label_image_is_brought_to_the_scan(volume, labels) -> None:
    fine = labels.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = AFFINE[:3, 3] - 1
    flipped, mirror = fine[::-1].copy(), np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = fine.shape[0] - 1
    for grid, matrix in ((fine, affine), (flipped, affine @ mirror)):
        signal = parcellate(image_of(volume), image_of(grid, matrix), (10, 20, 30))
        np.testing.assert_allclose(signal, expected_means(volume, labels), rtol=1e-5)


def test_label_image_may_be_a_path_and_the_scan_compressed(volume, labels, tmp_path) -> None:
    nib.save(image_of(volume), tmp_path / "scan.nii.gz")
    nib.save(image_of(labels), tmp_path / "labels.nii.gz")
    image, tr, rois = read_scan(tmp_path / "scan.nii.gz")
    assert (tr, rois) == (2.0, None)
    signal = parcellate(image, tmp_path / "labels.nii.gz", (10, 20, 30))
    np.testing.assert_allclose(signal, expected_means(volume, labels), rtol=1e-5)


def test_label_without_voxel_is_named(volume, labels) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 labels have no voxel.*\[77\]"):
        parcellate(image_of(volume), image_of(labels), (10, 77))


@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE, 2, 3)])
def test_other_than_four_dimensions_are_refused(labels, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"expected a 4D image.*got {len(shape)}D"):
        parcellate(nib.Nifti1Image(np.zeros(shape, dtype=np.float32), AFFINE), image_of(labels), (10,))


def test_images_that_do_not_fit_are_refused(volume, labels) -> None:
    far = AFFINE.copy()
    far[:3, 3] += 500
    with pytest.raises(ValueError, match="do not overlap"):
        parcellate(image_of(volume), image_of(labels, far), (10, 20, 30))
    with pytest.raises(ValueError, match="3D label image"):
        parcellate(image_of(volume), image_of(volume), (10,))
    broken = image_of(volume)
    broken.affine[0, 0] = np.nan
    with pytest.raises(ValueError, match="scan's affine"):
        parcellate(broken, image_of(labels), (10,))


@pytest.mark.parametrize(
    "tr, unit, seconds", [(0.72, "sec", 0.72), (720, "msec", 0.72), (0, "sec", None), (2000, "sec", None)]
)
def test_repetition_time_is_read_in_seconds(volume, tr: float, unit: str, seconds: float | None) -> None:
    assert read_scan(image_of(volume, tr=tr, unit=unit))[1] == (None if seconds is None else pytest.approx(seconds))


def test_arrays_and_tables_are_read(tmp_path) -> None:
    signal = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", signal)
    (tmp_path / "a.csv").write_text("A,B\n0,1\n2,3\n4,5\n")
    (tmp_path / "a.tsv").write_text("A\tB\n0\t1\n2\tn/a\n4\t5\n")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.npy")[0], signal)
    values, tr, rois = read_scan(str(tmp_path / "a.csv"))
    np.testing.assert_array_equal(values, signal)
    assert (tr, rois) == (None, ("A", "B"))
    assert np.isnan(read_scan(tmp_path / "a.tsv")[0][1, 1])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "1,2\n3,4\n", "first row must hold ROI names"),
        ("a.csv", "A,B\n", "got 1 rows"),
        ("a.csv", "A,B\n1,2\n3\n", "line 3: expected 2 cells, got 1"),
        ("a.csv", "A,B\n1,x\n", "expected numbers below the header"),
        ("a.txt", "1", "got a.txt"),
    ],
)
def test_broken_file_is_refused(tmp_path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_scan(tmp_path / name)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        read_scan(tmp_path / "none.npy")


def cifti(columns: nib.cifti2.Axis, tr: float = 0.72) -> nib.Cifti2Image:
    values = np.random.default_rng(0).normal(size=(FRAMES, len(columns))).astype(np.float32)
    return nib.Cifti2Image(values, (nib.cifti2.SeriesAxis(0, tr, FRAMES), columns))


def test_parcellated_cifti_brings_signal_names_and_tr(tmp_path) -> None:
    vertices = nib.cifti2.BrainModelAxis.from_surface(np.arange(4), 10, "cortex_left")
    image = cifti(nib.cifti2.ParcelsAxis.from_brain_models([("A", vertices[:2]), ("B", vertices[2:])]))
    nib.save(image, tmp_path / "a.ptseries.nii")
    signal, tr, rois = read_scan(tmp_path / "a.ptseries.nii")
    np.testing.assert_array_equal(signal, image.get_fdata(dtype=np.float32))
    assert rois == ("A", "B") and tr == pytest.approx(0.72)


def test_dense_cifti_is_not_supported_yet() -> None:
    with pytest.raises(ValueError, match="BrainModelAxis are not supported yet"):
        read_scan(cifti(nib.cifti2.BrainModelAxis.from_surface(np.arange(4), 10, "cortex_left")))
