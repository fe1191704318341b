"""Parcels: where the ROIs of an atlas lie, as integers in a label volume, on the cortical surface, or both."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .limits_fmrilm import check_archive_size
from .nifti_fmrilm import Volumes, from_nibabel, read_nifti


SIDES = ("left", "right")


@dataclass(frozen=True, eq=False)
class Parcels:
    """The labels of an atlas in space; 0 is background.

    Attributes:
        volume: int32 [x, y, z].
        affine: float64 [4, 4], voxel index of the volume -> mm.
        left, right: int32 [vertices] of a hemisphere's mesh. How many there are tells which mesh it is: 10242 of
            fsaverage5, 32492 of fs_LR 32k.
    """

    volume: np.ndarray | None = None
    affine: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.volume is None) != (self.affine is None) or (self.left is None) != (self.right is None):
            raise ValueError("parcels need a volume with its affine, or labels of both hemispheres, or all four")
        if self.volume is None and self.left is None:
            raise ValueError("parcels need a label volume or surface labels, got neither")
        for what, dimensions in (("volume", 3), ("left", 1), ("right", 1)):
            if (values := getattr(self, what)) is not None:
                object.__setattr__(self, what, _labels(values, dimensions, what))
        if self.affine is not None:
            check_affine(self.affine, "the label image")
            affine = np.array(self.affine, dtype=np.float64)
            affine.setflags(write=False)
            object.__setattr__(self, "affine", affine)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parcels":
        # never changed, and large
        return self

    @classmethod
    def from_volume(cls, label_image: Any) -> "Parcels":
        """From a 3D label image: a NIfTI file's path, a nibabel image, or the `Volumes` of one."""
        if isinstance(label_image, Volumes) or hasattr(label_image, "stored"):
            volumes = label_image
        else:
            is_path = isinstance(label_image, (str, Path))
            volumes = read_nifti(label_image) if is_path else from_nibabel(label_image)
        grid = volumes.shape[:3]
        if len(grid) != 3 or any(size != 1 for size in volumes.shape[3:]):
            raise ValueError(f"{volumes.name}: expected a 3D label image, got shape {volumes.shape}")
        [values] = volumes.stored()
        if (volumes.slope, volumes.inter) != (1, 0):
            values = values * volumes.slope + volumes.inter
        return cls(volume=values.reshape(grid, order="F"), affine=volumes.affine)

    def save(self, path: str | Path) -> None:
        """Write an .npz file."""
        values = {what: getattr(self, what) for what in ("volume", "affine", *SIDES)}
        partial = f"{path}.partial.npz"
        np.savez_compressed(partial, **{what: array for what, array in values.items() if array is not None})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "Parcels":
        """Inverse of `save`."""
        try:
            check_archive_size(path)
            with np.load(path, allow_pickle=False) as file:
                values = {what: file[what] for what in file.files}
            return cls(**values)
        except OSError:
            raise
        except Exception as error:
            # the zip and array parsers raise many kinds of errors on damaged files
            raise ValueError(f"{path}: not a readable file of parcels: {error}") from error

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits over all labels and the affine."""
        digest = hashlib.sha256()
        for what, kind in (("volume", "<i4"), ("affine", "<f8"), ("left", "<i4"), ("right", "<i4")):
            if (values := getattr(self, what)) is not None:
                digest.update(f"{what} {values.shape}".encode() + np.ascontiguousarray(values, dtype=kind).tobytes())
        return digest.hexdigest()[:16]

    def on_grid(self, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """Labels int32 [x, y, z] at the voxels of a scan: those of the nearest voxel, 0 outside of the label image."""
        if self.volume is None or self.affine is None:
            raise ValueError("a volume needs a label volume, but the atlas has surface labels only")
        check_affine(affine, "the scan")
        if self.volume.shape == tuple(shape) and np.allclose(affine, self.affine, atol=1e-3):
            return self.volume
        to_label = np.linalg.inv(self.affine) @ affine
        # with a diagonal alone, scipy goes axis by axis: faster
        matrix = to_label[:3, :3]
        matrix = np.diag(matrix) if np.array_equal(matrix, np.diag(np.diag(matrix))) else matrix
        # declared for one number, documented for one of each axis
        offset: Any = to_label[:3, 3]
        return ndimage.affine_transform(self.volume, matrix, offset, tuple(shape), order=0)

    def at_points(self, points: np.ndarray) -> np.ndarray:
        """Labels int32 [points] of the volume at points [points, 3] in mm; 0 everywhere if there is no volume."""
        labels = np.zeros(len(points), dtype=np.int32)
        if self.volume is None or self.affine is None:
            return labels
        to_label = np.linalg.inv(self.affine)
        index = np.floor(points @ to_label[:3, :3].T + to_label[:3, 3] + 0.5).astype(np.int64)
        inside = ((index >= 0) & (index < self.volume.shape)).all(axis=1)
        labels[inside] = self.volume[tuple(index[inside].T)]
        return labels

    def at_vertices(self, side: str, vertices: np.ndarray, mesh: int) -> np.ndarray:
        """Labels int32 [vertices] of some of a mesh's vertices; 0 everywhere if there are no surface labels."""
        labels = getattr(self, side)
        if labels is None:
            return np.zeros(len(vertices), dtype=np.int32)
        if len(labels) != mesh:
            raise ValueError(
                f"expected scan and atlas on one mesh, got {mesh} vertices in the scan's {side} hemisphere "
                f"and {len(labels)} in the atlas"
            )
        return labels[vertices]


@lru_cache(maxsize=8)
def sorted_voxels(parcels: Parcels, shape: tuple[int, ...], affine: bytes) -> tuple[np.ndarray, ...]:
    """`sort_by_label` for the voxels of a scan's grid, flat with the first axis fastest.

    Args:
        affine: the bytes of a float64 [4, 4].
    """
    return sort_by_label(parcels.on_grid(shape, np.frombuffer(affine).reshape(4, 4)).ravel(order="F"))


def sort_by_label(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels > 0 that occur, ascending; where each one's run of positions starts; the positions, run by run."""
    positions = np.flatnonzero(labels)
    positions = positions[np.argsort(labels[positions], kind="stable")]
    occurring, starts = np.unique(labels[positions], return_index=True)
    return occurring, starts, positions


def check_affine(affine: np.ndarray | None, what: str) -> None:
    """Refuse what does not map voxels to mm and back."""
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(np.asarray(affine)[:3, :3])) < 1e-9:
        raise ValueError(f"{what}'s affine is not an invertible matrix of finite numbers, got {affine}")


def _labels(values: np.ndarray, dimensions: int, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != dimensions or values.dtype.kind not in "iuf":
        raise ValueError(f"expected {what} labels as {dimensions}D numbers, got {values.dtype} {values.shape}")
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
        if (np.abs(values - np.rint(values)) > 1e-3).any():
            raise ValueError(f"expected whole numbers as {what} labels, got fractions: is it a probability map?")
        values = np.rint(values)
    if values.size == 0 or values.min() < 0 or values.max() >= 2**31:
        limits = "none" if values.size == 0 else f"{values.min()} to {values.max()}"
        raise ValueError(f"expected {what} labels from 0 to {2**31 - 1}, got {limits}")
    labels = values.astype(np.int32)
    labels.setflags(write=False)
    return labels
