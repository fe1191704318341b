"""Reading scans: from a file's name and first bytes to the reader that knows it."""

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .limits_fmrilm import check_text_size
from .nifti_fmrilm import Volumes, from_nibabel, read_nifti
from .parcels_fmrilm import Parcels
from .surface_files_fmrilm import (
    RoiSeries,
    SurfaceSeries,
    hemispheres,
    read_cifti,
    read_dlabel,
    read_surface_labels,
    read_surface_pair,
)


FORMATS = ".nii, .nii.gz, .dtseries.nii, .ptseries.nii, .func.gii, .mgh, .mgz, .npy, .csv, .tsv"


def is_scan_file(source: Any) -> bool:
    """Whether `read_scan` takes it: a path, a pair of them, a nibabel image, or a value of `datasets.Nifti`."""
    if isinstance(source, dict):
        return source.get("path") is not None or source.get("bytes") is not None
    return isinstance(source, (str, Path)) or hasattr(source, "dataobj") or _is_pair(source)


def read_scan(source: Any) -> Volumes | SurfaceSeries | RoiSeries:
    """Read a scan.

    Args:
        source: path of a file of one of `FORMATS`; of surface series either hemisphere's path, the other one found
            by name, or a pair (left, right); a nibabel image; `{"bytes", "path"}` as `datasets.Nifti` stores it.

    Returns:
        A series of volumes whose values are still in the file, of vertices, or of ROIs. `tr` is what the file says.
    """
    if isinstance(source, dict):
        if source.get("bytes") is None:
            return read_scan(source["path"])
        return _on_voxels(read_nifti(source["bytes"], source.get("path") and Path(source["path"]).name))
    if _is_pair(source):
        return read_surface_pair(*source)
    if not isinstance(source, (str, Path)):
        return read_cifti(source) if hasattr(source.header, "get_axis") else from_nibabel(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no scan at {path}")
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return _on_voxels(read_nifti(path))
    if name.endswith((".gii", ".mgh", ".mgz")):
        return read_surface_pair(*hemispheres(path))
    if name.endswith(".npy"):
        return RoiSeries(path.name, _read_array(path))
    if name.endswith((".csv", ".tsv")):
        return _read_table(path, "\t" if name.endswith(".tsv") else ",")
    raise ValueError(f"expected one of {FORMATS}, got {path.name}")


def read_parcels(label_image: Any) -> Parcels:
    """Read labels: a 3D NIfTI file or image, a .dlabel.nii, or a pair (left, right) of .label.gii or .annot files."""
    if _is_pair(label_image):
        return read_surface_labels(*label_image)
    if hasattr(label_image, "header") and hasattr(label_image.header, "get_axis"):
        return read_dlabel(label_image)
    if not isinstance(label_image, (str, Path)):
        return Parcels.from_volume(label_image)
    path = Path(label_image)
    if not path.is_file():
        raise FileNotFoundError(f"no label image at {path}")
    if path.name.lower().endswith((".label.gii", ".annot")):
        return read_surface_labels(*hemispheres(path))
    volumes = read_nifti(path)
    return read_dlabel(path) if volumes.cifti else Parcels.from_volume(volumes)


def _is_pair(source: Any) -> bool:
    is_sequence = isinstance(source, (tuple, list)) and len(source) == 2
    return is_sequence and all(isinstance(item, (str, Path)) for item in source)


def _on_voxels(volumes: Volumes) -> Volumes | SurfaceSeries | RoiSeries:
    if not volumes.cifti:
        return volumes
    if isinstance(volumes.source, (bytes, bytearray)):
        raise ValueError(f"{volumes.name}: CIFTI files are read from a path, got bytes")
    return read_cifti(volumes.source)


def _read_array(path: Path) -> np.ndarray:
    try:
        # mapped first: a header that speaks of more than the file holds is refused before anything is allocated
        with warnings.catch_warnings(action="ignore"):
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:
        # the header of this format is parsed as Python: damaged ones raise many kinds of errors
        raise ValueError(f"{path.name}: not a readable .npy file: {error}") from error


def _read_table(path: Path, delimiter: str) -> RoiSeries:
    check_text_size(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [row for row in csv.reader(handle, delimiter=delimiter) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a readable table: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path.name}: expected a header row of ROI names and rows of numbers, got {len(rows)} rows")
    header = tuple(cell.strip() for cell in rows[0])
    if all(_is_number(cell) for cell in header):
        raise ValueError(f"{path.name}: the first row must hold ROI names, got numbers: {', '.join(header[:3])}, ...")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"{path.name}, line {number}: expected {len(header)} cells, got {len(row)}")
    try:
        # cells left empty and "n/a" are missing values
        values = [[np.nan if cell.strip() in ("", "n/a") else float(cell) for cell in row] for row in rows[1:]]
    except ValueError as error:
        raise ValueError(f"{path.name}: expected numbers below the header: {error}") from error
    return RoiSeries(path.name, np.array(values, dtype=np.float32), rois=header)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
