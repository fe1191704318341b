import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.maskers import NiftiLabelsMasker

from fmrilm.processors import Parcels, parcellate, read_parcels, read_scan


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


def image_of(values: np.ndarray, affine: np.ndarray = AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, affine)


def means(image: nib.Nifti1Image, label_image: nib.Nifti1Image, labels: tuple[int, ...] = (10, 20, 30)) -> np.ndarray:
    return parcellate(read_scan(image), read_parcels(label_image), labels)


def test_signal_is_the_mean_of_each_parcel_in_the_order_of_the_labels(volume, labels) -> None:
    signal = means(image_of(volume), image_of(labels))
    assert signal.dtype == np.float32 and signal.shape == (FRAMES, 3)
    np.testing.assert_allclose(signal, expected_means(volume, labels), rtol=1e-6)
    np.testing.assert_array_equal(means(image_of(volume), image_of(labels), (20, 30, 10)), signal[:, [1, 2, 0]])


def test_finer_and_flipped_label_image_is_brought_to_the_scan(volume, labels) -> None:
    fine = labels.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = AFFINE[:3, 3] - 1
    flipped, mirror = fine[::-1].copy(), np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = fine.shape[0] - 1
    for grid, matrix in ((fine, affine), (flipped, affine @ mirror)):
        signal = means(image_of(volume), image_of(grid, matrix))
        np.testing.assert_allclose(signal, expected_means(volume, labels), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_stored_type_is_read_as_nibabel_reads_it(
    labels, tmp_path: Path, suffix: str, order: str, kind: str, version: type
) -> None:
    stored = np.random.default_rng(0).integers(0, 200, (*SHAPE, FRAMES)).astype(order + kind)
    image = version(stored, AFFINE, header=version.header_class(endianness=order))
    image.header.set_slope_inter(0.5, -3)
    path = tmp_path / f"scan{suffix}"
    nib.save(image, path)
    expected = expected_means(nib.load(path).get_fdata(), labels)
    parcels = Parcels(labels, AFFINE)
    np.testing.assert_allclose(parcellate(read_scan(path), parcels, (10, 20, 30)), expected, rtol=1e-6)
    np.testing.assert_allclose(parcellate(read_scan(nib.load(path)), parcels, (10, 20, 30)), expected, rtol=1e-6)


@pytest.mark.parametrize("zoom, rotation", [(3.0, 0.0), (4.0, 0.0), (2.5, 0.3)])
def test_nilearn_finds_the_same_means(tmp_path: Path, zoom: float, rotation: float) -> None:
    rng = np.random.default_rng(1)
    # 6 x 6 x 6 blocks of labels, so that a coarser grid does not lose any
    blocks = (1 + np.arange(27)).reshape(3, 3, 3).repeat(6, 0).repeat(6, 1).repeat(6, 2).astype(np.int16)
    blocks[:1] = 0
    label_affine = np.diag([3.0, 3, 3, 1])
    label_affine[:3, 3] = -25
    affine = np.diag([zoom, zoom, zoom, 1])
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    affine[:2, :2] = turn * zoom
    affine[:3, 3] = -25 if zoom == 3 else -22
    image = nib.Nifti1Image(rng.integers(0, 3000, (18, 18, 18, 5)).astype(np.int16), affine)
    label_image = nib.Nifti1Image(blocks, label_affine)
    masker = NiftiLabelsMasker(label_image, standardize=None, resampling_target="data")
    expected = masker.fit_transform(image)
    assert expected.shape == (5, 27)
    np.testing.assert_allclose(means(image, label_image, tuple(range(1, 28))), expected, rtol=1e-5)


def test_lost_and_empty_labels_stay_as_missing_columns(volume, labels) -> None:
    volume[labels == 20] = 0
    signal = means(image_of(volume), image_of(labels), (10, 77, 20, 30))
    assert np.isnan(signal[:, [1, 2]]).all()
    np.testing.assert_allclose(signal[:, [0, 3]], expected_means(volume, labels)[:, [0, 2]], rtol=1e-6)


def test_voxels_that_are_not_finite_count_as_zero(volume, labels) -> None:
    expected = volume.copy()
    volume[0, 0, 0], volume[2, 0, 0, 1] = np.nan, np.inf
    expected[0, 0, 0], expected[2, 0, 0, 1] = 0, 0
    signal = means(image_of(volume), image_of(labels))
    np.testing.assert_allclose(signal, expected_means(expected, labels), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_permuted_labels_permute_the_columns(seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, parts + 1, SHAPE)
    grid[0, 0, 0] = 1
    image = image_of(rng.normal(100, 5, (*SHAPE, 3)))
    order = rng.permutation(parts)
    numbers = np.arange(1, parts + 1)
    signal = means(image, image_of(grid.astype(np.int32)), tuple(numbers))
    permuted = means(image, image_of(grid.astype(np.int32)), tuple(numbers[order]))
    np.testing.assert_array_equal(permuted, signal[:, order])


@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE, 2, 3)])
def test_other_than_four_dimensions_are_refused(labels, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"expected a 4D image.*got {len(shape)}D"):
        means(image_of(np.zeros(shape, dtype=np.float32)), image_of(labels))


def test_images_that_do_not_fit_are_refused(volume, labels) -> None:
    far = AFFINE.copy()
    far[:3, 3] += 500
    with pytest.raises(ValueError, match="do not overlap"):
        means(image_of(volume), image_of(labels, far))
    with pytest.raises(ValueError, match="expected a 3D label image"):
        means(image_of(volume), image_of(volume))
    with pytest.raises(ValueError, match="got fractions"):
        read_parcels(image_of(np.full(SHAPE, 0.5)))
    with pytest.raises(ValueError, match="surface labels only"):
        parcellate(read_scan(image_of(volume)), Parcels(left=np.ones(3, int), right=np.ones(3, int)), (1,))
    for value in (np.nan, 0.0):
        broken = image_of(volume)
        broken.affine[:3, 0] = value
        with pytest.raises(ValueError, match="scan's affine"):
            means(broken, image_of(labels))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "a label volume or surface labels, got neither"),
        ({"volume": np.ones(SHAPE, int)}, "a volume with its affine"),
        ({"left": np.ones(3, int)}, "labels of both hemispheres"),
        ({"left": np.ones(3, int), "right": np.ones((3, 1), int)}, "right labels as 1D numbers, got int64"),
        ({"left": np.ones(3, int), "right": np.array(["a"])}, "right labels as 1D numbers, got <U1"),
        ({"left": np.ones(3, int), "right": np.array([2**31])}, "right labels from 0 to 2147483647, got 2147483648"),
        ({"left": np.ones(3, int), "right": np.zeros(0, int)}, "right labels from 0 to 2147483647, got none"),
    ],
)
def test_arrays_that_are_no_parcels_are_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parcels(**arrays)


def test_checksum_depends_on_where_parcels_lie(labels) -> None:
    assert Parcels(labels, AFFINE + np.eye(4)).checksum != Parcels(labels, AFFINE).checksum


def test_memory_stays_at_a_few_volumes(tmp_path: Path) -> None:
    shape, frames = (64, 64, 32), 150
    header = nib.Nifti1Image(np.zeros((*shape, 1), np.int16), AFFINE).header
    header.set_data_shape((*shape, frames))
    header.set_data_offset(352)
    with gzip.open(tmp_path / "scan.nii.gz", "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        rng = np.random.default_rng(0)
        block = rng.integers(0, 50, (10, int(np.prod(shape))), dtype=np.int16)
        for _ in range(frames // 10):
            file.write(block.tobytes())
    parcels = Parcels(rng.integers(0, 451, shape), header.get_best_affine())
    tracemalloc.start()
    signal = parcellate(read_scan(tmp_path / "scan.nii.gz"), parcels, tuple(range(1, 451)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert signal.shape == (frames, 450) and np.isfinite(signal).all()
    # of the 150 volumes; most of it is the list of labelled voxels, made once
    assert peak < 20 * block[0].nbytes
