"""From files to signals: volumes frame by frame, surfaces, ROI tables, and the mean of each parcel."""

import csv
import gzip
import io
import json
import logging
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from .atlases_fmrilm import Parcels

try:
    # inflates several times as fast as the standard library
    from isal import igzip, isal_zlib

    inflated: Callable[..., Any] = igzip.open
    # its stub declares an instance
    MORE_DAMAGE: Any = isal_zlib.error
except ImportError:
    inflated, MORE_DAMAGE = gzip.open, zlib.error

logger = logging.getLogger(__name__)

FORMATS = (
    ".nii.gz", ".dtseries.nii", ".ptseries.nii", ".nii", ".func.gii", ".gii", ".mgh", ".mgz", ".npy", ".csv", ".tsv",
    ".1D",
)  # fmt: skip
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, MORE_DAMAGE)
GZIP_MAGIC = b"\x1f\x8b"
# deflate cannot pack more than this many bytes into one
MAX_INFLATION = 1032
# no scanner makes one volume as large as this; what claims it is damaged
MAX_VOLUME_BYTES = 2**31
# a cell of text becomes an object of several times its size; ten hours of 1000 ROIs take a tenth of this
MAX_TEXT_BYTES = 2**28
# both hemispheres and a volume of half a millimetre take a third of this
MAX_ARCHIVE_BYTES = 2**30
# cells of a table without a value
MISSING = ("", "n/a")
# seconds per unit of time, by the code in the header's xyzt_units; code 0: no unit given, and seconds are the rule
TIME_UNITS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}
CIFTI_INTENTS = range(3000, 3100)
SIDES = ("left", "right")
CORTEX = {"CIFTI_STRUCTURE_CORTEX_LEFT": "left", "CIFTI_STRUCTURE_CORTEX_RIGHT": "right"}
# the hemisphere in a file's name: BIDS, FreeSurfer, HCP
HEMISPHERE_MARKS = (("hemi-L", "hemi-R"), ("lh", "rh"), ("L", "R"))


@dataclass(frozen=True, eq=False)
class Volumes:
    """An image on a voxel grid, its values still in the file.

    Attributes:
        name: what errors call it.
        shape: voxels along each axis; a series has four.
        affine: float64 [4, 4], voxel index -> mm.
        tr: seconds between two volumes, plausible or not; None if unknown.
        dtype: type of the stored values.
        offset: byte at which they start.
        slope, inter: stored value * slope + inter is the value meant.
        source: path, bytes, or the array itself.
        cifti: the file is a CIFTI matrix, not an image.
        tr_from: where the TR was found: the header, or the name of a sidecar.
    """

    name: str
    shape: tuple[int, ...]
    affine: np.ndarray
    tr: float | None
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    source: Any
    cifti: bool = False
    tr_from: str = "header"

    def stored(self) -> Iterator[np.ndarray]:
        """Stored values of each volume, flat with the first axis fastest. The next volume overwrites the last."""
        frames = int(np.prod(self.shape[3:], dtype=object))
        if isinstance(self.source, np.ndarray):
            series = self.source.reshape(*self.shape[:3], frames)
            yield from (series[..., frame].ravel(order="F") for frame in range(frames))
            return
        voxels = int(np.prod(self.shape[:3], dtype=object))
        if voxels * self.dtype.itemsize > MAX_VOLUME_BYTES:
            raise ValueError(f"{self.name}: expected volumes below 2 GiB, got a shape of {self.shape}")
        volume = np.empty(voxels, self.dtype)
        target = (volume if self.dtype.isnative else volume.view("u1")).data.cast("B")
        with opened(self.source, self.name) as stream:
            stream.seek(self.offset)
            for _ in range(frames):
                if (found := stream.readinto(target)) < len(target):
                    raise EOFError(f"{len(target) - found} bytes of a volume of {len(target)} are missing")
                yield volume
            # compressed data end with their checksum
            stream.read(1)


@dataclass(frozen=True, eq=False)
class Structure:
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
        tr, tr_from: as of `Volumes`.
        structures: where the positions lie.
    """

    name: str
    values: np.ndarray
    tr: float | None
    structures: tuple[Structure, ...]
    tr_from: str = "header"

    def labels(self, parcels: "Parcels") -> np.ndarray:
        """Label int32 [positions] of each position."""
        labels = np.zeros(self.values.shape[1], dtype=np.int32)
        for part in self.structures:
            if part.points is not None:
                labels[part.columns] = parcels.at_points(part.points)
            elif part.side is not None and part.vertices is not None:
                labels[part.columns] = parcels.at_vertices(part.side, part.vertices, part.mesh)
        return labels


@dataclass(frozen=True, eq=False)
class RoiSeries:
    """A series of ROIs: values [time, rois]; the ROI names or numbers if the file has them; TR as of `Volumes`."""

    name: str
    values: np.ndarray
    tr: float | None = None
    rois: tuple[str, ...] | None = None
    tr_from: str = "header"


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """A warning that many scans of a folder would repeat."""
    logger.warning(message)


# --- any scan


def is_scan_file(source: Any) -> bool:
    """Whether `read_scan` takes it: a path, a pair of them, a nibabel image, or a value of `datasets.Nifti`."""
    if isinstance(source, dict):
        return source.get("path") is not None or source.get("bytes") is not None
    return isinstance(source, (str, Path)) or hasattr(source, "dataobj") or is_pair(source)


def read_scan(source: Any) -> Volumes | SurfaceSeries | RoiSeries:
    """Read a scan.

    Args:
        source: path of a file of one of `FORMATS`; of surface series either hemisphere's path, the other one found
            by name, or a pair (left, right); a nibabel image; `{"bytes", "path"}` as `datasets.Nifti` stores it.

    Returns:
        A series of volumes whose values are still in the file, of vertices, or of ROIs. `tr` is RepetitionTime of the
        BIDS sidecar beside the file or above it, else what the file's header has.
    """
    if isinstance(source, dict) and source.get("bytes") is not None:
        path = source.get("path")
        found = _on_voxels(read_nifti(source["bytes"], path and Path(path).name))
    elif is_pair(source):
        path, found = source[0], _read_surface_pair(*source)
    elif isinstance(source, dict) or isinstance(source, (str, Path)):
        path = source["path"] if isinstance(source, dict) else source
        found = _read_file(Path(path))
    else:
        path = source.get_filename()
        found = _read_cifti(source) if hasattr(source.header, "get_axis") else from_nibabel(source)
    tr, sidecar = _sidecar_tr(Path(path)) if path and Path(path).is_file() else (None, "")
    if tr is None:
        return found
    if found.tr and abs(found.tr - tr) > 1e-3:
        logger.warning(f"{found.name}: using RepetitionTime {tr:g} s of {sidecar}; the header has {found.tr:g} s")
    return replace(found, tr=tr, tr_from=sidecar)


def is_pair(source: Any) -> bool:
    is_sequence = isinstance(source, (tuple, list)) and len(source) == 2
    return is_sequence and all(isinstance(item, (str, Path)) for item in source)


def _read_file(path: Path) -> Volumes | SurfaceSeries | RoiSeries:
    if not path.is_file():
        raise FileNotFoundError(f"no scan at {path}")
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return _on_voxels(read_nifti(path))
    if name.endswith((".gii", ".mgh", ".mgz")):
        return _read_surface_pair(*hemispheres(path))
    if name.endswith(".npy"):
        return RoiSeries(path.name, _read_array(path))
    if name.endswith((".csv", ".tsv", ".1d")):
        header, values = read_table(path)
        return RoiSeries(path.name, values.astype(np.float32), rois=header)
    raise ValueError(f"expected one of {', '.join(FORMATS)}, got {path.name}")


def sidecars(path: Path) -> list[Path]:
    """Where the BIDS sidecar of a scan may lie; the first one that is there counts."""
    stem = re.sub(r"(\.[A-Za-z0-9]+?)(\.gz)?$", "", path.name)
    names = dict.fromkeys((re.sub(r"\.(dtseries|ptseries|func)$", "", stem), stem))
    return [path.with_name(f"{name}.json") for name in names]


def inherited_sidecars(path: Path) -> list[Path]:
    """
    Sidecars of several scans that apply to this one by the BIDS inheritance principle: in its folder or above it in
    the dataset, of the same suffix, with no entity that the scan does not have. Nearer and more specific ones first.
    """
    own = sidecars(path)[0]
    *entities, suffix = own.stem.split("_")
    if not path.name.startswith("sub-"):
        return []
    found = []
    for folder in path.absolute().parents:
        if not folder.is_dir():
            break
        listed = _json_files(folder, folder.stat().st_mtime_ns)
        others = [(other.stem.split("_"), other) for other in listed if other.name != own.name]
        fitting = [one for one in others if one[0][-1] == suffix and set(one[0][:-1]) <= set(entities)]
        found += [other for _, other in sorted(fitting, key=lambda one: -len(one[0]))]
        if not re.fullmatch(r"func|(ses|sub)-.*", folder.name):
            # the dataset's own folder
            break
    return found


@lru_cache(maxsize=64)
def _json_files(folder: Path, changed: int) -> tuple[Path, ...]:
    """Of a folder that thousands of scans may share; changed: its time of change, with which the list does."""
    return tuple(folder.glob("*.json"))


def _sidecar_tr(path: Path) -> tuple[float | None, str]:
    """RepetitionTime in s of a scan's JSON files, plausible or not, and that file's name."""
    for sidecar in [*sidecars(path), *inherited_sidecars(path)]:
        if not sidecar.is_file():
            continue
        check_text_size(sidecar)
        try:
            values = json.loads(sidecar.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{sidecar.name}: not a readable sidecar: {error}") from error
        tr = values.get("RepetitionTime") if isinstance(values, dict) else None
        if tr is not None:
            if isinstance(tr, bool) or not isinstance(tr, (int, float)) or not 0 < tr < 1e9:
                raise ValueError(f"{sidecar.name}: expected RepetitionTime in seconds, got {tr!r}")
            return float(tr), sidecar.name
    return None, ""


# --- volumes


def read_nifti(source: Any, name: str | None = None) -> Volumes:
    """Read the header of a NIfTI-1 or NIfTI-2 path or bytes, and check that its values can be there."""
    name = name or (Path(source).name if isinstance(source, (str, Path)) else "image in memory")
    with opened(source, name) as stream:
        start = stream.read(540)
        compressed = isinstance(stream, gzip.GzipFile)
    with readable(name, "NIfTI") as nibabel:
        header = _header(start, nibabel)
        dimensions = int(header["dim"][0])
        if not 1 <= dimensions <= 7:
            raise ValueError(f"expected 1 to 7 dimensions in the header, got {dimensions}")
        shape = tuple(int(size) for size in header["dim"][1 : dimensions + 1])
        if min(shape) < 1:
            raise ValueError(f"expected at least one voxel along every axis, got shape {shape}")
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise ValueError(f"expected integers or real numbers, got NIfTI data type {int(header['datatype'])}")
        offset, smallest = float(header["vox_offset"]), header.sizeof_hdr + 4
        if not smallest <= offset < 2**40:
            raise ValueError(f"expected values to start at byte {smallest} or later, got {offset}")
        slope, inter = header.get_slope_inter()
        affine = header.get_best_affine()
    needed = int(offset) + int(np.prod(shape, dtype=object)) * dtype.itemsize
    size = len(source) if isinstance(source, (bytes, bytearray)) else Path(source).stat().st_size
    _check_extent(name, f"shape {shape}", needed, size, compressed)
    return Volumes(
        name=name,
        shape=shape,
        affine=affine,
        tr=_header_tr(header, dimensions),
        dtype=dtype,
        offset=int(offset),
        slope=1.0 if slope is None else slope,
        inter=0.0 if slope is None else inter,
        source=source,
        cifti=int(header["intent_code"]) in CIFTI_INTENTS,
    )


def from_nibabel(image: Any) -> Volumes:
    """The same view of a nibabel image, with the header and affine it has now."""
    data = image.dataobj
    common = {
        "name": Path(image.get_filename() or "image in memory").name,
        "shape": tuple(int(size) for size in image.shape),
        "affine": np.full((4, 4), np.nan) if image.affine is None else np.array(image.affine, dtype=np.float64),
        "tr": _header_tr(image.header, len(image.shape)) if "xyzt_units" in image.header.keys() else None,
    }
    file = getattr(data, "file_like", None)
    if isinstance(file, io.BytesIO):
        file = file.getvalue()
    # nibabel would open a compressed file anew for each volume, and inflate it from the start
    if isinstance(file, (str, Path, bytes)) and getattr(data, "order", "F") == "F":
        return Volumes(**common, dtype=data.dtype, offset=data.offset, slope=data.slope, inter=data.inter, source=file)
    values = np.asanyarray(data)
    return Volumes(**common, dtype=values.dtype, offset=0, slope=1.0, inter=0.0, source=values)


def _header(start: bytes, nibabel: Any) -> Any:
    """nibabel's header, with what many writers leave out: voxel sizes are positive, and a qfac of 0 means 1."""
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        if len(start) >= kind.sizeof_hdr and kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            if (header["magic"].item(), int(header["sizeof_hdr"])) == (kind.single_magic, kind.sizeof_hdr):
                header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
                header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
                return header
    raise ValueError("expected a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz), got no header of these")


def _header_tr(header: Any, dimensions: int) -> float | None:
    unit = TIME_UNITS.get(int(header["xyzt_units"]) & 0x38)
    return float(header["pixdim"][4]) * unit if dimensions >= 4 and unit else None


@contextmanager
def opened(source: Any, name: str) -> Iterator[io.BufferedIOBase]:
    """A stream of the source's bytes, inflated if they are compressed. Damage met in it is a ValueError."""
    with io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else open(source, "rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
        file.seek(0)
        try:
            yield inflated(file, "rb") if compressed else file
        except DAMAGE as error:
            raise ValueError(f"{name}: the file is damaged or cut short: {error}") from error


# --- limits: how much a file from outside may hold, checked before anything of it is kept in memory


def _check_extent(name: str, claim: str, needed: int, size: int, compressed: bool) -> None:
    """Refuse a header that claims more bytes than the file can hold, before anything is allocated."""
    if needed > (size * MAX_INFLATION if compressed else size):
        what = "compressed bytes" if compressed else "bytes"
        raise ValueError(f"{name}: the header's {claim} needs {needed} bytes, but the file has {size} {what}")


def check_text_size(path: Path) -> None:
    """ValueError for a table or JSON file that is larger than any that is meant."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name}: expected a text file of at most {MAX_TEXT_BYTES} bytes, got {size}")


def check_archive_size(path: str | Path) -> None:
    """ValueError for an .npz file that would inflate to more than any that is meant."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_ARCHIVE_BYTES:
        raise ValueError(f"expected arrays of at most {MAX_ARCHIVE_BYTES} bytes, got {size}")


# --- surfaces: CIFTI, GIFTI, FreeSurfer's MGH


@contextmanager
def readable(name: str, kind: str) -> Iterator[Any]:
    """Gives nibabel, and turns what its parsers raise on damaged files, which is almost anything, into ValueError."""
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"reading {kind} files needs nibabel: pip install nibabel") from error
    try:
        yield nibabel
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: not a readable {kind} file: {error}") from error


def file_name(source: Any) -> str:
    file = source if isinstance(source, (str, Path)) else source.get_filename()
    return Path(file).name if file else "image in memory"


def loaded(source: Any, nibabel: Any) -> Any:
    return nibabel.load(source) if isinstance(source, (str, Path)) else source


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


def _check_sides(left: str, right: str) -> None:
    """ValueError if both names say their side, and are not those of the left and the right hemisphere of one scan."""
    found = []
    for name in (left, right):
        for side, mark in (pair for marks in HEMISPHERE_MARKS for pair in enumerate(marks)):
            rest, count = re.subn(rf"(?<![A-Za-z0-9]){mark}(?=[._-])", "", name, count=1)
            if count:
                found.append((side, rest))
                break
    if len(found) == 2 and (found[0][0] != 0 or found[1] != (1, found[0][1])):
        raise ValueError(f"expected the left and the right hemisphere of one scan, got {left} and {right}")


def _on_voxels(volumes: Volumes) -> Volumes | SurfaceSeries | RoiSeries:
    if not volumes.cifti:
        return volumes
    if isinstance(volumes.source, (bytes, bytearray)):
        raise ValueError(f"{volumes.name}: CIFTI files are read from a path, got bytes")
    return _read_cifti(volumes.source)


def _read_cifti(source: Any) -> RoiSeries | SurfaceSeries:
    """A ptseries or dtseries, from a path or a nibabel image."""
    name = file_name(source)
    with readable(name, "CIFTI") as nibabel:
        image = loaded(source, nibabel)
        series, columns = image.header.get_axis(0), image.header.get_axis(1)
        kinds = (type(series).__name__, type(columns).__name__)
        tr = float(series.step) if kinds[0] == "SeriesAxis" and series.unit == "SECOND" else None
        if kinds == ("SeriesAxis", "ParcelsAxis"):
            values = np.asarray(image.dataobj, dtype=np.float32)
            return RoiSeries(name, values, tr, tuple(str(roi) for roi in columns.name))
        if kinds == ("SeriesAxis", "BrainModelAxis"):
            return SurfaceSeries(name, np.asarray(image.dataobj, dtype=np.float32), tr, tuple(_structures(columns)))
        raise ValueError(
            f"expected a parcellated or dense series (.ptseries.nii, .dtseries.nii), got axes {' and '.join(kinds)}"
        )


def _structures(axis: Any) -> Iterator[Structure]:
    for structure, part, model in axis.iter_structures():
        columns = slice(part.start, len(axis) if part.stop is None else part.stop)
        if structure in CORTEX:
            yield Structure(columns, CORTEX[structure], model.vertex, axis.nvertices[structure])
        elif not model.surface_mask.any():
            yield Structure(columns, points=model.voxel @ axis.affine[:3, :3].T + axis.affine[:3, 3])


def _read_surface_pair(left: str | Path, right: str | Path) -> SurfaceSeries:
    """Series of both hemispheres, GIFTI or MGH: left hemisphere's vertices first."""
    _check_sides(Path(left).name, Path(right).name)
    values, trs, structures, start = [], [], [], 0
    for side, path in zip(SIDES, (left, right), strict=True):
        vertices, tr = _read_hemisphere(Path(path))
        stop = start + vertices.shape[1]
        structures.append(Structure(slice(start, stop), side, np.arange(stop - start), stop - start))
        values.append(vertices)
        trs.append(tr)
        start = stop
    name = f"{file_name(left)} and {file_name(right)}"
    if len(values[0]) != len(values[1]) or trs[0] != trs[1]:
        raise ValueError(
            f"{name}: expected hemispheres of one scan, got {len(values[0])} frames at TR {trs[0]} and "
            f"{len(values[1])} at {trs[1]}"
        )
    return SurfaceSeries(name, np.concatenate(values, axis=1), trs[0], tuple(structures))


def _read_hemisphere(path: Path) -> tuple[np.ndarray, float | None]:
    """Series float32 [time, vertices], and the TR in seconds."""
    gifti = path.name.lower().endswith(".gii")
    with readable(path.name, "GIFTI" if gifti else "MGH") as nibabel:
        image = nibabel.load(path)
        if gifti:
            arrays = [np.asarray(array.data, dtype=np.float32) for array in image.darrays]
            step = image.darrays[0].meta.get("TimeStep")
            values = arrays[0].T if len(arrays) == 1 and arrays[0].ndim == 2 else np.stack(arrays)
        else:
            with open(path, "rb") as stream:
                compressed = stream.read(2) == GZIP_MAGIC
            needed = int(np.prod(image.shape, dtype=object)) * image.dataobj.dtype.itemsize
            _check_extent(path.name, f"shape {image.shape}", needed, path.stat().st_size, compressed)
            values = np.asarray(image.dataobj, dtype=np.float32).reshape(-1, *image.shape[3:], order="F").T
            step = image.header.get_zooms()[3] if len(image.shape) > 3 else None
        if values.ndim != 2:
            raise ValueError(f"expected a series [time, vertices], got shape {values.shape}")
    # both formats have milliseconds
    return values, None if step is None else float(step) / 1000


# --- arrays and tables of ROIs


def _read_array(path: Path) -> np.ndarray:
    try:
        # mapped first: a header that claims more than the file holds is refused before anything is allocated
        with warnings.catch_warnings(action="ignore"):
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:
        # the header of this format is parsed as Python: damaged ones raise many kinds of errors
        raise ValueError(f"{path.name}: not a readable .npy file: {error}") from error


def read_table(path: Path) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """Header of names or numbers, None if it is absent, and float64 [rows, columns] of a .csv, .tsv or .1D file."""
    header, rows = _table_rows(path)
    if header is None and rows and _is_header(rows):
        header, rows = rows[0][1], rows[1:]
    if not rows:
        raise ValueError(f"{path.name}: expected a header row of names and rows of numbers, got no row of numbers")
    columns = len(rows[0][1] if header is None else header)
    for mark, others, got in ((";", "commas or tabs", "semicolons"), ("\t", "commas", "tabs")):
        if header is not None and columns == 1 and mark in header[0]:
            raise ValueError(f"{path.name}: expected cells separated by {others}, got {got}")
    for number, row in rows:
        if len(row) != columns:
            raise ValueError(f"{path.name}, line {number}: expected {columns} cells, got {len(row)}")
    if header is not None and all(row[0].strip() not in MISSING and not _is_number(row[0]) for _, row in rows):
        raise ValueError(
            f"{path.name}: expected numbers below the header, got names down the first column, such as "
            f"{rows[0][1][0].strip()!r}: transposed? Rows are frames, columns are ROIs"
        )
    try:
        # cells left empty and "n/a" are missing values
        values = [[np.nan if cell.strip() in MISSING else float(cell) for cell in row] for _, row in rows]
    except ValueError as error:
        raise ValueError(f"{path.name}: expected numbers below the header: {error}") from error
    return None if header is None else tuple(cell.strip() for cell in header), np.array(values)


def _table_rows(path: Path) -> tuple[list[str] | None, list[tuple[int, list[str]]]]:
    """Lines of cells with their numbers; and of a .1D file, whose cells spaces or tabs separate, its header."""
    check_text_size(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            if path.suffix.lower() != ".1d":
                reader = csv.reader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                return None, [(reader.line_num, row) for row in reader if row]
            lines = list(enumerate(handle.read().splitlines(), start=1))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a readable table: {error}") from error
    rows = [(number, line.split()) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]
    # AFNI writes other comments, too: the header is the last one that fits
    for _, line in reversed(lines):
        cells = [cell.lstrip("#") for cell in line.split() if cell.strip("#")]
        if line.lstrip().startswith("#") and rows and len(cells) == len(rows[0][1]):
            return cells, rows
    return None, rows


def _is_header(rows: list[tuple[int, list[str]]]) -> bool:
    """Whether the first row names ROIs: text, or different whole numbers above a row that has others."""
    first = [cell.strip() for cell in rows[0][1]]
    if not all(_is_number(cell) for cell in first):
        return True
    if not all(cell.isdecimal() for cell in first) or len(set(first)) < len(first):
        return False
    numbers = [int(cell) for cell in first]
    counted = numbers in ([*range(len(first))], [*range(1, len(first) + 1)])
    return counted or len(rows) > 1 and not all(cell.strip().isdecimal() for cell in rows[1][1])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --- parcellation


def parcellate(scan: Any, parcels: "Parcels", labels: tuple[int, ...]) -> np.ndarray:
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
        occurring, starts, positions = parcels.sorted_voxels(scan.shape[:3], scan.affine)
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


def sort_by_label(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels > 0 that occur, ascending; where each one's run of positions starts; the positions, run by run."""
    positions = np.flatnonzero(labels)
    positions = positions[np.argsort(labels[positions], kind="stable")]
    occurring, starts = np.unique(labels[positions], return_index=True)
    return occurring, starts, positions


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
