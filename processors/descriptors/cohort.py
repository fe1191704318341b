"""Descriptors of the training subjects: the reference of tercile labels and z-scores."""

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..atlases_fmrilm import Atlas
from ..scan_io_fmrilm import check_text_size
from .measures import describe, descriptor_names


# labels of the terciles
LEVELS = ("low", "typical", "high")
# the bounds between terciles
QUANTILES = (1 / 3, 2 / 3)
JSON_FILE, ARRAYS_FILE = "cohort.json", "cohort.safetensors"
_REFERENCE = "references."


@dataclass(frozen=True, eq=False)
class Cohort:
    """Moments and quantiles of each descriptor over the windows of the training subjects.

    Attributes:
        name: the cohort's name beside its z-scores.
        names: descriptor names, those of whole measures.
        mean, std: float64 [names], NaN where no window has the descriptor; std also where it never varies.
        quantiles: float64 [2, names] at `QUANTILES`.
        subjects, windows: how many it was fitted on.
        atlases: checksum of each atlas by its name.
        references: reference gradients [rois, 3] by atlas name, for the gradient measures.
    """

    name: str
    names: list[str]
    mean: np.ndarray
    std: np.ndarray
    quantiles: np.ndarray
    subjects: int
    windows: int
    atlases: dict[str, str]
    references: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.names != descriptor_names(self.measures):
            raise ValueError(f"cohort {self.name!r}: expected all descriptors of {self.measures}, got {self.names}")
        for what, shape in (("mean", ()), ("std", ()), ("quantiles", (len(QUANTILES),))):
            expected, found = (*shape, len(self.names)), getattr(self, what).shape
            if found != expected:
                raise ValueError(f"cohort {self.name!r}: expected {what} {expected}, got {found}")

    @classmethod
    def fit(
        cls,
        name: str,
        measures: Iterable[str],
        descriptors: np.ndarray,
        subjects: int,
        atlases: Iterable[Atlas],
        references: dict[str, np.ndarray] | None = None,
    ) -> "Cohort":
        """From descriptors [windows, names] (NaN where absent) of that many training subjects."""
        names = descriptor_names(measures)
        if descriptors.ndim != 2 or descriptors.shape[1] != len(names) or not len(descriptors):
            raise ValueError(f"expected descriptors [windows, {len(names)}], got {descriptors.shape}")
        with warnings.catch_warnings():
            # numpy warns about columns of NaN alone, which stay NaN as they should
            warnings.simplefilter("ignore", RuntimeWarning)
            quantiles = np.nanquantile(descriptors, QUANTILES, axis=0)
            mean, std = np.nanmean(descriptors, axis=0), np.nanstd(descriptors, axis=0)
        return cls(
            name=name,
            names=names,
            mean=mean,
            std=np.where(std > 0, std, np.nan),
            quantiles=quantiles,
            subjects=subjects,
            windows=len(descriptors),
            atlases={atlas.name: atlas.checksum for atlas in atlases},
            references=dict(references or {}),
        )

    @property
    def measures(self) -> list[str]:
        return list(dict.fromkeys(name.partition("/")[0] for name in self.names))

    def describe(self, signal: np.ndarray, atlas: Atlas, repetition_time: float | None = None) -> np.ndarray:
        """The cohort's descriptors [..., names] of signal [..., time, rois] of one of the cohort's atlases."""
        self.check_atlas(atlas)
        return describe(signal, atlas, self.measures, repetition_time, self.references)

    def check_atlas(self, atlas: Atlas) -> None:
        """ValueError for an atlas that the cohort's scans are not of."""
        if self.atlases.get(atlas.name) != atlas.checksum:
            known = ", ".join(f"{name!r} ({checksum})" for name, checksum in self.atlases.items())
            raise ValueError(f"cohort {self.name!r}: expected a scan of the atlas {known}, got one of {atlas}")

    def z_scores(self, descriptors: np.ndarray) -> np.ndarray:
        """Distances [..., names] from the cohort's mean in units of its standard deviation."""
        return (self._checked(descriptors) - self.mean) / self.std

    def from_z_scores(self, z_scores: np.ndarray) -> np.ndarray:
        """Descriptors [..., names] with these z-scores: the inverse of `z_scores`."""
        return self._checked(z_scores) * self.std + self.mean

    def levels(self, descriptors: np.ndarray) -> np.ndarray:
        """Tercile label of each descriptor: index into `LEVELS` [..., names].

        -1 where it or the cohort's is NaN, and where a third or more of the cohort shares one value.
        """
        lower, upper = self.quantiles
        level = (self._checked(descriptors) > lower).astype(int) + (descriptors > upper)
        return np.where(np.isnan(descriptors) | ~(lower < upper), -1, level)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if values.shape[-1:] != (len(self.names),):
            raise ValueError(
                f"cohort {self.name!r}: expected its {len(self.names)} descriptors ({', '.join(self.measures)}), "
                f"got shape {values.shape}"
            )
        return values

    def save(self, folder: str | Path) -> None:
        """Writes `cohort.json` and `cohort.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"mean": self.mean, "std": self.std, "quantiles": self.quantiles}
        arrays |= {_REFERENCE + name: array for name, array in self.references.items()}
        facts = {key: getattr(self, key) for key in ("name", "names", "subjects", "windows", "atlases")}
        staged = {name: folder / f"{name}.partial" for name in (ARRAYS_FILE, JSON_FILE)}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, staged[ARRAYS_FILE])
        staged[JSON_FILE].write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for name, path in staged.items():
            os.replace(path, folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> "Cohort":
        folder = Path(folder)
        check_text_size(folder / JSON_FILE)
        try:
            arrays: dict[str, Any] = load_file(folder / ARRAYS_FILE)
            references = {
                key.removeprefix(_REFERENCE): arrays.pop(key) for key in list(arrays) if key.startswith(_REFERENCE)
            }
            return cls(**json.loads((folder / JSON_FILE).read_text(encoding="utf-8")), **arrays, references=references)
        except (TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: expected a cohort of this version: {error}") from error
