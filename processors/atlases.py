"""Atlases: which regions of interest (ROIs) a signal's columns are, and where they lie in the brain."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


TABLES = Path(__file__).parent / "tables"
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
    """

    name: str
    rois: tuple[str, ...]
    networks: tuple[str, ...]
    coordinates: np.ndarray
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rois = tuple(str(roi) for roi in self.rois)
        networks = tuple(str(network) for network in self.networks)
        coordinates = np.array(self.coordinates, dtype=np.float32)
        labels = tuple(range(1, len(rois) + 1)) if self.labels is None else tuple(int(label) for label in self.labels)
        if not self.name:
            raise ValueError("an atlas needs a name, got an empty one")
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
    def load(cls, name: str) -> "Atlas":
        """Load one of the atlases that the package brings along."""
        path = TABLES / f"{name}.tsv"
        packaged = sorted(table.stem for table in TABLES.glob("*.tsv"))
        # compared with the listing, not with the file system: a name such as "../x" must not leave the folder
        if name not in packaged:
            raise ValueError(
                f"no packaged atlas {name!r}; packaged: {', '.join(packaged) or 'none (code of a checkpoint)'}. "
                f"Make one with Atlas.from_table(path), a TSV with columns {', '.join(COLUMNS)}."
            )
        return cls.from_table(path, name)

    @classmethod
    def from_table(cls, path: str | Path, name: str | None = None) -> "Atlas":
        """Read a TSV with columns index (label in the label image), name, hemisphere, network, x, y, z (MNI, mm)."""
        path = Path(path)
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter="\t")
            header = tuple(reader.fieldnames or ())
            if missing := [column for column in COLUMNS if column not in header]:
                raise ValueError(
                    f"{path}: expected tab-separated columns {', '.join(COLUMNS)}; "
                    f"missing {', '.join(missing)}, got {', '.join(header) or 'an empty file'}"
                )
            rows = list(reader)
        labels, coordinates = [], []
        for number, row in enumerate(rows, start=2):
            try:
                labels.append(int(row["index"]))
                coordinates.append([float(row[axis]) for axis in "xyz"])
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
        """JSON-safe form; `from_dict` gives back an equal atlas."""
        return {
            "name": self.name,
            "rois": list(self.rois),
            "networks": list(self.networks),
            # the shortest decimal that reads back as the same float32 keeps saved files short
            "coordinates": [[float(str(value)) for value in row] for row in self.coordinates],
            "labels": list(self.labels),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Atlas":
        """Inverse of `to_dict`."""
        if missing := [key for key in ("name", "rois", "networks", "coordinates") if key not in values]:
            raise ValueError(f"an atlas dict needs name, rois, networks, coordinates; missing {', '.join(missing)}")
        return cls(
            name=values["name"],
            rois=tuple(values["rois"]),
            networks=tuple(values["networks"]),
            coordinates=np.array(values["coordinates"], dtype=np.float32),
            labels=None if values.get("labels") is None else tuple(values["labels"]),
        )

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
