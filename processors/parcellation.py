"""From image files to ROI series: reading scans, and averaging voxels inside the parcels of a label image."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse


TIME_UNITS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
# plausible repetition times, s: headers outside of it hold another unit or nothing at all
TR_RANGE = (0.1, 10.0)
CHUNK_BYTES = 256 * 2**20


def parcellate(image: Any, label_image: Any, labels: tuple[int, ...]) -> np.ndarray:
    """Average the voxels of each parcel.

    Args:
        image: 4D nibabel image [x, y, z, time], in the space of the label image.
        label_image: 3D nibabel image of integers, or a path to one.
        labels: the integer of each ROI.

    Returns:
        float32 [time, rois].
    """
    if isinstance(label_image, (str, Path)):
        label_image = _load_image(label_image)
    if len(image.shape) != 4:
        raise ValueError(f"expected a 4D image [x, y, z, time], got {len(image.shape)}D of shape {image.shape}")
    grid = _labels_on_grid(label_image, image.shape[:3], image.affine).ravel(order="F")

    order = np.argsort(labels)
    sorted_labels = np.asarray(labels)[order]
    position = np.minimum(np.searchsorted(sorted_labels, grid), len(labels) - 1)
    voxels = np.flatnonzero(sorted_labels[position] == grid)
    roi = order[position[voxels]]
    counts = np.bincount(roi, minlength=len(labels))
    if voxels.size == 0:
        raise ValueError(
            f"scan and label image do not overlap: none of the {len(labels)} labels has a voxel in the scan's "
            f"grid of {image.shape[:3]}; are both in MNI space?"
        )
    if (counts == 0).any():
        empty = [int(labels[i]) for i in np.flatnonzero(counts == 0)]
        raise ValueError(f"{len(empty)} of {len(labels)} labels have no voxel in the scan, among them {empty[:10]}")
    weights = sparse.csr_array((1.0 / counts[roi], (roi, np.arange(voxels.size))), shape=(len(labels), voxels.size))

    frames = image.shape[3]
    # a few hundred MB of volumes at a time: a 1200-frame scan need not fit in memory
    chunk = max(1, CHUNK_BYTES // (8 * grid.size))
    signal = np.empty((frames, len(labels)), dtype=np.float32)
    for start in range(0, frames, chunk):
        volumes = np.asarray(image.dataobj[..., start : start + chunk])
        signal[start : start + chunk] = (weights @ volumes.reshape(grid.size, -1, order="F")[voxels]).T
    return signal


def _labels_on_grid(label_image: Any, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Labels [x, y, z] at the voxels of a grid, by nearest neighbour; 0 outside of the label image."""
    if len(label_image.shape) != 3:
        raise ValueError(f"expected a 3D label image, got shape {label_image.shape}")
    for what, matrix in (("scan", affine), ("label image", label_image.affine)):
        if matrix is None or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
            raise ValueError(f"the {what}'s affine is not an invertible matrix of finite numbers, got {matrix}")
    values = np.rint(np.nan_to_num(np.asarray(label_image.dataobj))).astype(np.int64)
    if values.shape == tuple(shape) and np.allclose(affine, label_image.affine, atol=1e-3):
        return values
    to_label = np.linalg.inv(label_image.affine) @ affine
    points = np.indices(shape).reshape(3, -1)
    index = np.rint(to_label[:3, :3] @ points + to_label[:3, 3:]).astype(np.int64)
    inside = ((index >= 0) & (index < np.array(values.shape)[:, None])).all(axis=0)
    aligned = np.zeros(points.shape[1], dtype=np.int64)
    aligned[inside] = values[tuple(index[:, inside])]
    return aligned.reshape(shape)


def read_scan(source: Any) -> tuple[Any, float | None, tuple[str, ...] | None]:
    """Read a scan from a path or a nibabel image.

    Returns:
        The signal [time, rois] or, for a volume, the nibabel image; the TR in seconds if the file tells a plausible
        one; the ROI names if the file holds them.
    """
    if not isinstance(source, (str, Path)):
        return _read_image(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no scan at {path}")
    name = path.name.lower()
    if name.endswith(".npy"):
        return np.load(path, allow_pickle=False), None, None
    if name.endswith((".csv", ".tsv")):
        signal, rois = _read_table(path, "\t" if name.endswith(".tsv") else ",")
        return signal, None, rois
    if name.endswith((".nii", ".nii.gz")):
        return _read_image(_load_image(path))
    raise ValueError(f"expected .nii, .nii.gz, .ptseries.nii, .npy, .csv or .tsv, got {path.name}")


def _load_image(path: str | Path) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("reading NIfTI and CIFTI files needs nibabel: pip install nibabel") from error
    # one open handle: compressed volumes are then read once, front to back, rather than from the start per chunk
    return nibabel.load(path, keep_file_open=True)


def _read_image(image: Any) -> tuple[Any, float | None, tuple[str, ...] | None]:
    if not hasattr(image.header, "get_axis"):
        zooms = image.header.get_zooms()
        unit = image.header.get_xyzt_units()[1] if hasattr(image.header, "get_xyzt_units") else "unknown"
        tr = float(zooms[3]) * TIME_UNITS.get(unit, 0.0) if len(zooms) > 3 else None
        return image, _plausible_tr(tr), None
    series, columns = image.header.get_axis(0), image.header.get_axis(1)
    if (type(series).__name__, type(columns).__name__) != ("SeriesAxis", "ParcelsAxis"):
        raise ValueError(
            f"CIFTI files of axes {type(series).__name__} and {type(columns).__name__} are not supported yet: "
            "give a parcellated series (.ptseries.nii)"
        )
    tr = series.step if series.unit == "SECOND" else None
    return np.asarray(image.dataobj, dtype=np.float32), _plausible_tr(tr), tuple(str(name) for name in columns.name)


def _plausible_tr(tr: float | None) -> float | None:
    return float(tr) if tr is not None and TR_RANGE[0] < tr < TR_RANGE[1] else None


def _read_table(path: Path, delimiter: str) -> tuple[np.ndarray, tuple[str, ...]]:
    with open(path, newline="", encoding="utf-8-sig") as handle:
        rows = [row for row in csv.reader(handle, delimiter=delimiter) if row]
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header row of ROI names and rows of numbers, got {len(rows)} rows")
    header = tuple(cell.strip() for cell in rows[0])
    if all(_is_number(cell) for cell in header):
        raise ValueError(f"{path}: the first row must hold ROI names, got numbers: {', '.join(header[:3])}, ...")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: expected {len(header)} cells, got {len(row)}")
    try:
        # cells left empty and "n/a" are missing values; the feature extractor refuses them by ROI name
        signal = [[np.nan if cell.strip() in ("", "n/a") else float(cell) for cell in row] for row in rows[1:]]
    except ValueError as error:
        raise ValueError(f"{path}: expected numbers below the header: {error}") from error
    return np.array(signal, dtype=np.float32), header


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
