"""From voxels and vertices to ROI series: the mean of each parcel, frame after frame."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .parcels_fmrilm import Parcels, sort_by_label, sorted_voxels


def parcellate(scan: Any, parcels: Parcels, labels: tuple[int, ...]) -> np.ndarray:
    """Average the voxels or vertices of each parcel.

    Voxels that are not finite count as 0, as in nilearn's NiftiLabelsMasker; vertices that never change (medial
    wall) are left out. Label volumes on another grid than the scan's are brought to it by nearest neighbour.

    Args:
        scan: a series on voxels (`Volumes`) or on a surface (`SurfaceSeries`), as `read_scan` gives it.
        parcels: where the labels lie, in the scan's space.
        labels: the integer of each ROI.

    Returns:
        float32 [time, rois]; a ROI without voxels in the scan, or with nothing but zeros there, is NaN throughout.
    """
    if hasattr(scan, "stored"):
        if len(scan.shape) != 4:
            raise ValueError(
                f"{scan.name}: expected a 4D image [x, y, z, time], got {len(scan.shape)}D of shape {scan.shape}"
            )
        affine = np.ascontiguousarray(scan.affine, dtype=np.float64).tobytes()
        occurring, starts, positions = sorted_voxels(parcels, scan.shape[:3], affine)
        frames, slope, inter = scan.stored(), scan.slope, scan.inter
    else:
        on_scan = scan.labels(parcels)
        on_scan[(scan.values == scan.values[0]).all(axis=0)] = 0
        occurring, starts, positions = sort_by_label(on_scan)
        frames, slope, inter = scan.values, 1.0, 0.0

    columns = np.searchsorted(occurring, labels)
    columns[columns == len(occurring)] = 0
    found = occurring[columns] == labels if len(occurring) else np.zeros(len(labels), dtype=bool)
    if not found.any():
        raise ValueError(
            f"{scan.name}: scan and atlas do not overlap: none of the {len(labels)} labels lies in the scan; "
            "are both in the same space (MNI)?"
        )
    means = _run_means(frames, positions, starts)[:, columns] * slope + inter
    means[:, ~found | (means == 0).all(axis=0)] = np.nan
    return means.astype(np.float32)


def _run_means(frames: Iterable[np.ndarray], positions: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means float64 [time, runs] over runs of positions, from flat frames."""
    counts = np.diff(starts, append=len(positions))
    picked, sums = None, []
    for frame in frames:
        picked = np.empty(len(positions), frame.dtype) if picked is None else picked
        # positions are inside: clipping, which changes none, saves a copy
        np.take(frame, positions, out=picked, mode="clip")
        if picked.dtype.kind == "f":
            np.nan_to_num(picked, copy=False, posinf=0, neginf=0)
        sums.append(np.add.reduceat(picked, starts, dtype=np.float64))
    return np.array(sums) / counts
