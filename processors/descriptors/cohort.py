"""What the training subjects look like: the reference that levels and z-scores are relative to."""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..atlases import Atlas
from .connectivity import CONNECTIVITY_NAMES, STRENGTH_NAMES, connectivity, strength
from .temporal import AUTOCORRELATION_NAMES, autocorrelation


DESCRIPTOR_NAMES = [*CONNECTIVITY_NAMES, *STRENGTH_NAMES, *AUTOCORRELATION_NAMES]
LEVELS = ("low", "typical", "high")


def describe(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """All descriptors float64 [..., descriptors] of signal [..., time, rois], NaN where the atlas has none."""
    if signal.ndim < 2 or signal.shape[-1] != len(atlas):
        raise ValueError(f"expected signal [..., time, {len(atlas)}] for atlas {atlas.name!r}, got {signal.shape}")
    return np.concatenate(
        [connectivity(signal, atlas), strength(signal, atlas), autocorrelation(signal, atlas)], axis=-1
    )


@dataclass(frozen=True)
class Cohort:
    """
    Moments and terciles of each descriptor over the windows of the training subjects.

    mean, deviation, lower, upper: one value per entry of `names`, NaN where no training atlas has the descriptor;
    lower and upper part the thirds.
    """

    names: list[str]
    mean: list[float]
    deviation: list[float]
    lower: list[float]
    upper: list[float]
    subjects: int
    windows: int

    @classmethod
    def fit(cls, descriptors: np.ndarray, subjects: int) -> "Cohort":
        """From descriptors [windows, descriptors] (NaN where absent) of that many training subjects."""
        if descriptors.ndim != 2 or descriptors.shape[1] != len(DESCRIPTOR_NAMES):
            raise ValueError(f"expected descriptors [windows, {len(DESCRIPTOR_NAMES)}], got {descriptors.shape}")
        with warnings.catch_warnings():
            # numpy warns about columns of NaN alone, which stay NaN as they should
            warnings.simplefilter("ignore", RuntimeWarning)
            lower, upper = np.nanquantile(descriptors, [1 / 3, 2 / 3], axis=0)
            mean, deviation = np.nanmean(descriptors, axis=0), np.nanstd(descriptors, axis=0)
        return cls(
            names=list(DESCRIPTOR_NAMES),
            mean=mean.tolist(),
            deviation=deviation.tolist(),
            lower=lower.tolist(),
            upper=upper.tolist(),
            subjects=subjects,
            windows=len(descriptors),
        )

    def z_scores(self, descriptors: np.ndarray) -> np.ndarray:
        """Deviations [..., descriptors] from the cohort's mean in units of its standard deviation."""
        return (descriptors - np.array(self.mean)) / np.array(self.deviation)

    def from_z_scores(self, z_scores: np.ndarray) -> np.ndarray:
        """Descriptors [..., descriptors] with these z-scores: the inverse of `z_scores`."""
        return z_scores * np.array(self.deviation) + np.array(self.mean)

    def levels(self, descriptors: np.ndarray) -> np.ndarray:
        """Index into `LEVELS` [..., descriptors] of each descriptor, -1 where it or the cohort's is NaN."""
        level = (descriptors > np.array(self.lower)).astype(int) + (descriptors > np.array(self.upper))
        return np.where(np.isnan(descriptors) | np.isnan(self.lower), -1, level)

    def save(self, path: str | Path) -> None:
        # NaN is no JSON: null stands for it
        values = {
            key: [None if item != item else item for item in value] if isinstance(value, list) else value
            for key, value in asdict(self).items()
        }
        Path(path).write_text(json.dumps(values, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Cohort":
        values = json.loads(Path(path).read_text())
        if values["names"] != DESCRIPTOR_NAMES:
            raise ValueError(f"{path}: expected the {len(DESCRIPTOR_NAMES)} descriptors of this version, got others")
        return cls(
            **{
                key: [math.nan if item is None else item for item in value] if isinstance(value, list) else value
                for key, value in values.items()
            }
        )
