"""NIfTI-1 and NIfTI-2 files, compressed or not, volume by volume: no array of the whole scan is ever made."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


try:
    # inflates several times as fast as the standard library
    from isal import igzip, isal_zlib

    inflated: Callable[..., Any] = igzip.open
    # its stub declares an instance
    MORE_DAMAGE: Any = isal_zlib.error
except ImportError:
    inflated, MORE_DAMAGE = gzip.open, zlib.error

DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, MORE_DAMAGE)

GZIP_MAGIC = b"\x1f\x8b"
# deflate cannot pack more than this many bytes into one
MAX_INFLATION = 1032
# no scanner makes one volume as large as this; what claims it is damaged
MAX_VOLUME_BYTES = 2**31
DATA_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
# seconds per unit of time, by the code in the header's xyzt_units; code 0: no unit said, and seconds are the rule
TIME_UNITS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}
CIFTI_INTENTS = range(3000, 3100)

# https://nifti.nimh.nih.gov: field, type, byte offset
HEADERS = {
    348: {
        "intent_code": ("i2", 68),
        "dim": ("8i2", 40),
        "datatype": ("i2", 70),
        "pixdim": ("8f4", 76),
        "vox_offset": ("f4", 108),
        "scl_slope": ("f4", 112),
        "scl_inter": ("f4", 116),
        "xyzt_units": ("u1", 123),
        "qform_code": ("i2", 252),
        "sform_code": ("i2", 254),
        "quatern": ("3f4", 256),
        "qoffset": ("3f4", 268),
        "srow": ("(3,4)f4", 280),
        "magic": ("S4", 344),
    },
    540: {
        "magic": ("S8", 4),
        "datatype": ("i2", 12),
        "dim": ("8i8", 16),
        "pixdim": ("8f8", 104),
        "vox_offset": ("i8", 168),
        "scl_slope": ("f8", 176),
        "scl_inter": ("f8", 184),
        "qform_code": ("i4", 344),
        "sform_code": ("i4", 348),
        "quatern": ("3f8", 352),
        "qoffset": ("3f8", 376),
        "srow": ("(3,4)f8", 400),
        "xyzt_units": ("i4", 500),
        "intent_code": ("i4", 504),
    },
}
MAGICS = {348: b"n+1", 540: b"n+2\0\r\n\x1a\n"}


@dataclass(frozen=True, eq=False)
class Volumes:
    """An image on a voxel grid, its values still in the file.

    Attributes:
        name: what errors call it.
        shape: voxels along each axis; a series has four.
        affine: float64 [4, 4], voxel index -> mm.
        tr: seconds between two volumes as the header says, plausible or not; None if it does not.
        dtype: type of the stored values.
        offset: byte at which they start.
        slope, inter: stored value * slope + inter is the value meant.
        source: path, bytes, or the array itself.
        cifti: the file is a CIFTI matrix, not an image.
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
            skip(stream, self.offset)
            for _ in range(frames):
                fill(stream, target)
                yield volume
            # at the end of compressed data stands their checksum
            stream.read(1)


def read_nifti(source: Any, name: str | None = None) -> Volumes:
    """Read the header of a path or bytes, and check that the values it speaks of can be there."""
    name = name or (Path(source).name if isinstance(source, (str, Path)) else "image in memory")
    with opened(source, name) as stream:
        start = stream.read(540)
        compressed = isinstance(stream, gzip.GzipFile)
    header = _header(start, name)

    dimensions = int(header["dim"][0])
    if not 1 <= dimensions <= 7:
        raise ValueError(f"{name}: expected 1 to 7 dimensions in the header, got {dimensions}")
    shape = tuple(int(size) for size in header["dim"][1 : dimensions + 1])
    if min(shape) < 1:
        raise ValueError(f"{name}: expected at least one voxel along every axis, got shape {shape}")
    if int(header["datatype"]) not in DATA_TYPES:
        raise ValueError(f"{name}: expected integers or real numbers, got NIfTI data type {int(header['datatype'])}")
    dtype = np.dtype(DATA_TYPES[int(header["datatype"])]).newbyteorder(header.dtype["datatype"].byteorder)
    offset, smallest = float(header["vox_offset"]), header.dtype.itemsize + 4
    if not smallest <= offset < 2**40:
        raise ValueError(f"{name}: expected values to start at byte {smallest} or later, got {offset}")
    needed = int(offset) + int(np.prod(shape, dtype=object)) * dtype.itemsize
    check_extent(name, f"shape {shape}", needed, _size(source), compressed)

    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        slope, inter = 1.0, 0.0
    elif not np.isfinite(inter):
        raise ValueError(f"{name}: expected a finite scl_inter beside scl_slope {slope}, got {inter}")
    unit = TIME_UNITS.get(int(header["xyzt_units"]) & 0x38)
    return Volumes(
        name=name,
        shape=shape,
        affine=_affine(header, shape, name),
        tr=float(header["pixdim"][4]) * unit if dimensions >= 4 and unit else None,
        dtype=dtype,
        offset=int(offset),
        slope=slope,
        inter=inter,
        source=source,
        cifti=int(header["intent_code"]) in CIFTI_INTENTS,
    )


def from_nibabel(image: Any) -> Volumes:
    """The same view of a nibabel image, with the header and affine it has now."""
    zooms, data, header = image.header.get_zooms(), image.dataobj, image.header
    unit = TIME_UNITS.get(int(header["xyzt_units"]) & 0x38) if "xyzt_units" in header.keys() else None
    affine = np.full((4, 4), np.nan) if image.affine is None else np.array(image.affine, dtype=np.float64)
    common = {
        "name": Path(image.get_filename() or "image in memory").name,
        "shape": tuple(int(size) for size in image.shape),
        "affine": affine,
        "tr": float(zooms[3]) * unit if len(zooms) > 3 and unit else None,
    }
    file = getattr(data, "file_like", None)
    if isinstance(file, io.BytesIO):
        file = file.getvalue()
    # nibabel would open a compressed file anew for each volume, and inflate it from the start
    if isinstance(file, (str, Path, bytes)) and getattr(data, "order", "F") == "F":
        return Volumes(**common, dtype=data.dtype, offset=data.offset, slope=data.slope, inter=data.inter, source=file)
    values = np.asanyarray(data)
    return Volumes(**common, dtype=values.dtype, offset=0, slope=1.0, inter=0.0, source=values)


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


def skip(stream: io.BufferedIOBase, size: int) -> None:
    """Move on by a number of bytes, holding few of them."""
    while size > 0:
        found = len(stream.read(min(size, 2**20)))
        if not found:
            raise EOFError(f"{size} bytes before the first value are missing")
        size -= found


def fill(stream: io.BufferedIOBase, target: memoryview) -> None:
    """Read as many bytes as the target holds."""
    done = 0
    while done < len(target):
        found = stream.readinto(target[done:])
        if not found:
            raise EOFError(f"{len(target) - done} bytes of a volume of {len(target)} are missing")
        done += found


def check_extent(name: str, claim: str, needed: int, size: int, compressed: bool) -> None:
    """Refuse a header that speaks of more bytes than the file can hold, before anything is allocated."""
    if needed > (size * MAX_INFLATION if compressed else size):
        what = "compressed bytes" if compressed else "bytes"
        raise ValueError(f"{name}: the header's {claim} needs {needed} bytes, but the file has {size} {what}")


def _size(source: Any) -> int:
    return len(source) if isinstance(source, (bytes, bytearray)) else Path(source).stat().st_size


def _header(start: bytes, name: str) -> np.void:
    for size, fields in HEADERS.items():
        for order in ("<", ">"):
            if len(start) >= size and int(np.frombuffer(start, f"{order}i4", 1)[0]) == size:
                formats, offsets = zip(*fields.values(), strict=True)
                layout: Any = {"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": size}
                header = np.frombuffer(start, np.dtype(layout).newbyteorder(order), 1)[0]
                if bytes(header["magic"]) == MAGICS[size].rstrip(b"\0"):
                    return header
    raise ValueError(f"{name}: expected a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz), got no header of these")


def _affine(header: np.void, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Voxel index -> mm, from the sform, else the qform, else the voxel sizes alone, as the standard ranks them."""
    affine, zooms = np.eye(4), header["pixdim"][1:4].astype(np.float64)
    if header["sform_code"] > 0:
        affine[:3] = header["srow"]
    elif header["qform_code"] > 0:
        b, c, d = header["quatern"].astype(np.float64)
        square = 1 - (b * b + c * c + d * d)
        if not square > -1e-6:
            raise ValueError(f"{name}: expected a unit quaternion in the header, got b, c, d = {b}, {c}, {d}")
        a = np.sqrt(max(square, 0.0))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        zooms[2] *= -1 if header["pixdim"][0] < 0 else 1
        affine[:3, :3], affine[:3, 3] = rotation * zooms, header["qoffset"]
    else:
        size = np.array((*shape, 1, 1)[:3])
        zooms[0] *= -1
        affine[:3, :3], affine[:3, 3] = np.diag(zooms), -zooms * (size - 1) / 2
    return affine
