"""Atlases: which regions of interest (ROIs) a signal's columns are, and where they lie in the brain."""

import csv
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .atlas_sources import (
    aal2_parcels,
    fetched_schaefer,
    glasser,
    schaefer_400_parcels,
    schaefer_surface,
    tian_parcels,
    volume_centers,
)
from .limits_fmrilm import check_text_size
from .parcels_fmrilm import SIDES, Parcels
from .scan_files_fmrilm import read_parcels


TABLES = Path(__file__).parent / "tables"
# the paper's 450 ROIs stand in this order in its files
JOINED = {"schaefer-400-tian-s3": ("tian-s3", "schaefer-400-7networks")}
COLUMNS = ("index", "name", "hemisphere", "network", "x", "y", "z")


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
                raise ValueError(f"atlas {self.name!r}: {what} {repeated!r} stands twice, expected it once")
        if min(labels) < 1:
            raise ValueError(f"atlas {self.name!r}: expected labels >= 1 (0 is background), got {min(labels)}")
        coordinates.setflags(write=False)
        for field, value in (("rois", rois), ("networks", networks), ("coordinates", coordinates), ("labels", labels)):
            object.__setattr__(self, field, value)

    @classmethod
    def load(cls, name: str, parcels: bool = False) -> "Atlas":
        """Load a well-known atlas.

        Args:
            name: a packaged one (`aal2-94`, `schaefer-100-7networks`, `schaefer-400-7networks`, `tian-s3`);
                `schaefer-400-tian-s3`, whose 450 ROIs are Tian's 50, then Schaefer's 400; `glasser-360`, on the
                surface; or `schaefer-N-7networks` through nilearn.
            parcels: also load where the ROIs lie, for volumes and surfaces, from the data packages.

        Raises:
            ValueError: no such atlas, or what it is read from is missing; says how to get it.
        """
        if name in JOINED:
            return cls.join(name, [cls.load(part, parcels) for part in JOINED[name]])
        # compared with the listing, not with the file system: a name such as "../x" must not leave the folder
        if name in (packaged := sorted(table.stem for table in TABLES.glob("*.tsv"))):
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

    def _packaged_parcels(self) -> Parcels:
        match self.name:
            case "aal2-94":
                return aal2_parcels()
            case "tian-s3":
                return tian_parcels()
            case "schaefer-400-7networks":
                return schaefer_400_parcels(self.networks, self.coordinates)
            case _:
                return schaefer_surface(len(self))

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
            table: TSV with columns index (label in the image), name and network; and hemisphere, x, y, z as in
                `from_table`, which a volume may leave out: the centres are then those of its parcels.
            name: the table's file name unless given.
        """
        parcels = read_parcels(label_image)
        volume_labels, centers = volume_centers(parcels) if parcels.volume is not None else ((), ())
        found = {int(label): center for label, center in zip(volume_labels, centers, strict=True)}
        atlas = replace(cls.from_table(table, name, centers=found), parcels=parcels)
        surfaces = [labels for side in SIDES if (labels := getattr(parcels, side)) is not None]
        occurring = set(found).union(*(np.unique(labels).tolist() for labels in surfaces))
        if absent := [roi for roi, label in zip(atlas.rois, atlas.labels, strict=True) if label not in occurring]:
            raise ValueError(
                f"{len(absent)} of the {len(atlas)} ROIs of {atlas.name!r} are not in the label image, "
                f"among them {', '.join(absent[:5])}"
            )
        return atlas

    @classmethod
    def from_table(
        cls, path: str | Path, name: str | None = None, centers: dict[int, np.ndarray] | None = None
    ) -> "Atlas":
        """Read a TSV with columns index (label in the label image), name, hemisphere, network, x, y, z (MNI, mm).

        Args:
            centers: [3] of each label; a table without them needs no hemisphere, x, y, z.
        """
        path = Path(path)
        check_text_size(path)
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter="\t", restval="")
            try:
                header, rows = tuple(reader.fieldnames or ()), list(reader)
            except csv.Error as error:
                raise ValueError(f"{path}: not a readable table: {error}") from error
        if set("xyz") <= set(header):
            centers = None
        columns = ("index", "name", "network") if centers else COLUMNS
        if missing := [column for column in columns if column not in header]:
            raise ValueError(
                f"{path}: expected tab-separated columns {', '.join(columns)}; "
                f"missing {', '.join(missing)}, got {', '.join(header) or 'an empty file'}"
            )
        labels, coordinates = [], []
        for number, row in enumerate(rows, start=2):
            try:
                labels.append(int(row["index"]))
                xyz = centers.get(labels[-1], np.zeros(3)) if centers else [float(row[axis]) for axis in "xyz"]
                coordinates.append(xyz)
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


def _relabelled(labels: np.ndarray, known: tuple[int, ...], start: int, below: np.ndarray | None = None) -> np.ndarray:
    """The known labels as start + 1, start + 2, ...; elsewhere what lies below, or 0."""
    numbers = np.zeros(max(int(labels.max()), *known) + 1, dtype=np.int32)
    numbers[list(known)] = start + 1 + np.arange(len(known))
    new = numbers[labels]
    return new if below is None else np.where(new > 0, new, below)
