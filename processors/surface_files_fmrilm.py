"""Series and labels on the cortical surface: CIFTI, GIFTI, FreeSurfer's MGZ and annot, read with nibabel."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .nifti_fmrilm import GZIP_MAGIC, check_extent
from .parcels_fmrilm import SIDES, Parcels


try:
    import nibabel
except ImportError:
    # only the files of this module need it
    nibabel: Any = None

CORTEX = {"CIFTI_STRUCTURE_CORTEX_LEFT": "left", "CIFTI_STRUCTURE_CORTEX_RIGHT": "right"}
# how file names tell the hemispheres apart: BIDS, FreeSurfer, HCP
HEMISPHERE_MARKS = (("hemi-L", "hemi-R"), ("lh", "rh"), ("L", "R"))


@dataclass(frozen=True, eq=False)
class Patch:
    """Consecutive columns of a series that lie on one mesh (side, vertices, mesh) or in a volume (points)."""

    columns: slice
    side: str | None = None
    vertices: np.ndarray | None = None
    mesh: int = 0
    points: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SurfaceSeries:
    """A series at vertices, and at voxels of subcortical structures.

    Attributes:
        name: what errors call it.
        values: float32 [time, positions].
        tr: seconds as the file says, plausible or not; None if it does not.
        patches: where the positions lie.
    """

    name: str
    values: np.ndarray
    tr: float | None
    patches: tuple[Patch, ...]

    def labels(self, parcels: Parcels) -> np.ndarray:
        """Label int32 [positions] of each position."""
        labels = np.zeros(self.values.shape[1], dtype=np.int32)
        for patch in self.patches:
            if patch.points is not None:
                labels[patch.columns] = parcels.at_points(patch.points)
            elif patch.side is not None and patch.vertices is not None:
                labels[patch.columns] = parcels.at_vertices(patch.side, patch.vertices, patch.mesh)
        return labels


@dataclass(frozen=True, eq=False)
class RoiSeries:
    """A series of ROIs: values [time, rois], the TR in seconds and the ROI names if the file tells them."""

    name: str
    values: np.ndarray
    tr: float | None = None
    rois: tuple[str, ...] | None = None


def read_cifti(source: Any) -> RoiSeries | SurfaceSeries:
    """A ptseries or dtseries, from a path or a nibabel image."""
    name = _name(source)
    with readable(name, "CIFTI"):
        image = _loaded(source)
        series, columns = image.header.get_axis(0), image.header.get_axis(1)
        kinds = (type(series).__name__, type(columns).__name__)
        tr = float(series.step) if kinds[0] == "SeriesAxis" and series.unit == "SECOND" else None
        if kinds == ("SeriesAxis", "ParcelsAxis"):
            values = np.asarray(image.dataobj, dtype=np.float32)
            return RoiSeries(name, values, tr, tuple(str(roi) for roi in columns.name))
        if kinds == ("SeriesAxis", "BrainModelAxis"):
            return SurfaceSeries(name, np.asarray(image.dataobj, dtype=np.float32), tr, tuple(_patches(columns)))
        raise ValueError(
            f"expected a parcellated or dense series (.ptseries.nii, .dtseries.nii), got axes {' and '.join(kinds)}"
        )


def read_dlabel(source: Any) -> Parcels:
    """Labels of a .dlabel.nii, from a path or a nibabel image: its first map."""
    name = _name(source)
    with readable(name, "CIFTI"):
        image = _loaded(source)
        columns = image.header.get_axis(1)
        if (found := type(image.header.get_axis(0)).__name__) != "LabelAxis":
            raise ValueError(f"expected a label file (.dlabel.nii), got a {found}")
        labels = np.asarray(image.dataobj[0]).astype(np.int32)
        surfaces: dict[str, np.ndarray] = {}
        for structure, side in CORTEX.items():
            if structure in columns.nvertices:
                surfaces[side] = np.zeros(columns.nvertices[structure], dtype=np.int32)
        volume = None if columns.volume_shape is None else np.zeros(columns.volume_shape, dtype=np.int32)
        for structure, part, model in columns.iter_structures():
            if structure in CORTEX:
                surfaces[CORTEX[structure]][model.vertex] = labels[part]
            elif volume is not None:
                volume[tuple(model.voxel.T)] = labels[part]
        return Parcels(volume, None if volume is None else columns.affine, **surfaces)


def read_surface_pair(left: str | Path, right: str | Path) -> SurfaceSeries:
    """Series of both hemispheres, GIFTI or MGZ: left hemisphere's vertices first."""
    values, trs, patches, start = [], [], [], 0
    for side, path in zip(SIDES, (left, right), strict=True):
        vertices, tr = _read_hemisphere(path)
        stop = start + vertices.shape[1]
        patches.append(Patch(slice(start, stop), side, np.arange(stop - start), stop - start))
        values.append(vertices)
        trs.append(tr)
        start = stop
    name = f"{_name(left)} and {_name(right)}"
    if len(values[0]) != len(values[1]) or trs[0] != trs[1]:
        raise ValueError(
            f"{name}: expected hemispheres of one scan, got {len(values[0])} frames at TR {trs[0]} and "
            f"{len(values[1])} at {trs[1]}"
        )
    return SurfaceSeries(name, np.concatenate(values, axis=1), trs[0], tuple(patches))


def read_surface_labels(left: str | Path, right: str | Path) -> Parcels:
    """Labels of both hemispheres: GIFTI (.label.gii) or FreeSurfer (.annot)."""
    sides = {}
    for side, path in zip(SIDES, (left, right), strict=True):
        with readable(_name(path), "surface label"):
            if str(path).endswith(".annot"):
                sides[side] = np.maximum(nibabel.freesurfer.read_annot(path)[0], 0)
            else:
                sides[side] = np.asarray(_loaded(path).darrays[0].data)
    return Parcels(**sides)


def hemispheres(path: Path) -> tuple[Path, Path]:
    """Files of the left and the right hemisphere, from the name of one of them."""
    for marks in HEMISPHERE_MARKS:
        for mark in marks:
            pattern = rf"(?<![A-Za-z0-9]){mark}(?=[._-])"
            if re.search(pattern, path.name):
                left, right = (path.with_name(re.sub(pattern, other, path.name, count=1)) for other in marks)
                for file in (left, right):
                    if not file.is_file():
                        raise ValueError(f"{path.name}: expected the other hemisphere beside it as {file.name}")
                return left, right
    raise ValueError(f"{path.name}: expected a name with hemi-L, lh, L or their like, or a pair (left, right)")


@contextmanager
def readable(name: str, kind: str) -> Iterator[None]:
    """Turns what nibabel's parsers raise on damaged files, which is almost anything, into a ValueError."""
    if nibabel is None:
        raise ImportError(f"reading {kind} files needs nibabel: pip install nibabel")
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: not a readable {kind} file: {error}") from error


def _read_hemisphere(path: str | Path) -> tuple[np.ndarray, float | None]:
    """Series float32 [time, vertices], and the TR in seconds."""
    name = _name(path)
    with readable(name, "GIFTI" if name.lower().endswith(".gii") else "MGH"):
        image = _loaded(path)
        if name.lower().endswith(".gii"):
            arrays = [np.asarray(array.data, dtype=np.float32) for array in image.darrays]
            step = image.darrays[0].meta.get("TimeStep")
            values = arrays[0].T if len(arrays) == 1 and arrays[0].ndim == 2 else np.stack(arrays)
        else:
            file = Path(path)
            with open(file, "rb") as stream:
                compressed = stream.read(2) == GZIP_MAGIC
            needed = int(np.prod(image.shape, dtype=object)) * image.dataobj.dtype.itemsize
            check_extent(name, f"shape {image.shape}", needed, file.stat().st_size, compressed)
            values = np.asarray(image.dataobj, dtype=np.float32).reshape(-1, *image.shape[3:], order="F").T
            step = image.header.get_zooms()[3] if len(image.shape) > 3 else None
        if values.ndim != 2:
            raise ValueError(f"expected a series [time, vertices], got shape {values.shape}")
    # both formats speak of milliseconds
    return values, None if step is None else float(step) / 1000


def _patches(axis: Any) -> Iterator[Patch]:
    for structure, part, model in axis.iter_structures():
        columns = slice(part.start, len(axis) if part.stop is None else part.stop)
        if structure in CORTEX:
            yield Patch(columns, CORTEX[structure], model.vertex, axis.nvertices[structure])
        elif not model.surface_mask.any():
            yield Patch(columns, points=model.voxel @ axis.affine[:3, :3].T + axis.affine[:3, 3])


def _loaded(source: Any) -> Any:
    return nibabel.load(source) if isinstance(source, (str, Path)) else source


def _name(source: Any) -> str:
    get_filename: Callable[[], str | None] = getattr(source, "get_filename", lambda: None)
    file = source if isinstance(source, (str, Path)) else get_filename()
    return Path(file).name if file else "image in memory"
