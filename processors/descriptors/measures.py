"""All descriptors of a scan: names, families, and the one function that computes any of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..atlases_fmrilm import Atlas
from .gradients import COMPONENTS, aligned_gradients, network_means
from .graph import graph_metrics, strength
from .networks import NETWORKS, PAIRS, connectivity, membership, network_series, standardize
from .temporal import (
    NETWORK_PAIRS,
    amplitude,
    autocorrelation,
    detrend,
    falff,
    fnc,
    outliers,
    spectral_ratio,
    variability,
)


class Parts:
    """What several measures of one signal need, each part computed when it is first used."""

    def __init__(
        self,
        signal: np.ndarray,
        atlas: Atlas,
        repetition_time: float | None,
        references: dict[str, np.ndarray] | None,
    ):
        self.signal = signal
        self.atlas = atlas
        self.references = references
        self._repetition_time = repetition_time
        self.members = membership(atlas)
        self.standardized = standardize(signal)

    @property
    def repetition_time(self) -> float:
        if self._repetition_time is None or not self._repetition_time > 0:
            raise ValueError(
                f"expected repetition_time in seconds, which frequencies depend on, got {self._repetition_time}"
            )
        return self._repetition_time

    @cached_property
    def series(self) -> np.ndarray:
        """Mean of each network's standardized ROIs [..., time, networks]."""
        return network_series(self.standardized, self.members)

    @cached_property
    def detrended_series(self) -> np.ndarray:
        """Mean of each network's ROIs in the signal's own unit, detrended, [..., time, networks]."""
        return detrend(network_series(np.asarray(self.signal, np.float64), self.members))

    @cached_property
    def gradients(self) -> np.ndarray:
        """Gradients [..., rois, 3] aligned to the atlas' reference."""
        name = self.atlas.name
        reference = None if self.references is None else self.references.get(name)
        if reference is None:
            known = ", ".join(self.references or ()) or "none"
            raise ValueError(f"expected reference gradients of atlas {name!r}, which gradients need, got {known}")
        if reference.shape != (len(self.atlas), COMPONENTS):
            raise ValueError(
                f"expected reference gradients {(len(self.atlas), COMPONENTS)} of atlas {name!r}, "
                f"got {reference.shape}: they are of another atlas of that name"
            )
        return self._of_each_scan(lambda scan: aligned_gradients(scan, reference))

    @cached_property
    def graph(self) -> np.ndarray:
        """Global efficiency, modularity, clustering [..., 3]."""
        return self._of_each_scan(graph_metrics)

    def _of_each_scan(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        *batch, time, rois = self.standardized.shape
        values = np.stack([function(scan) for scan in self.standardized.reshape(-1, time, rois)])
        return values.reshape(*batch, *values.shape[1:])


@dataclass(frozen=True)
class Measure:
    """family: one of four. targets: what is measured, in order. compute: values [..., targets], NaN if absent."""

    family: str
    targets: tuple[str, ...]
    compute: Callable[[Parts], np.ndarray]


def _with_global(values: np.ndarray) -> np.ndarray:
    """Adds to values [..., networks] the mean over the networks that have one."""
    known = np.isfinite(values)
    count = known.sum(-1, keepdims=True)
    mean = np.where(known, values, 0).sum(-1, keepdims=True) / np.where(count > 0, count, np.nan)
    return np.concatenate([values, mean], axis=-1)


def _falff(parts: Parts) -> np.ndarray:
    return _with_global(network_series(falff(detrend(parts.standardized), parts.repetition_time), parts.members))


def _gradient_means(parts: Parts) -> np.ndarray:
    means = np.swapaxes(network_means(parts.gradients, parts.members), -1, -2)
    return means.reshape(*means.shape[:-2], -1)


_AXES = tuple(str(axis + 1) for axis in range(COMPONENTS))
_NETWORKS = tuple(NETWORKS)
_NETWORKS_AND_GLOBAL = (*_NETWORKS, "global")

# A descriptor is called measure/target. Amplitude and variability are in the signal's unit, all others have none.
MEASURES = {
    "connectivity": Measure(
        "connectivity", tuple(PAIRS), lambda parts: connectivity(parts.standardized, parts.members)
    ),
    "gradient_range": Measure("gradients", _AXES, lambda parts: np.ptp(parts.gradients, axis=-2)),
    "gradient_dispersion": Measure("gradients", _AXES, lambda parts: parts.gradients.var(-2)),
    "gradient_mean": Measure(
        "gradients", tuple(f"{axis}-{network}" for axis in _AXES for network in NETWORKS), _gradient_means
    ),
    "efficiency": Measure("graph", ("global",), lambda parts: parts.graph[..., :1]),
    "modularity": Measure("graph", ("global",), lambda parts: parts.graph[..., 1:2]),
    "clustering": Measure("graph", ("global",), lambda parts: parts.graph[..., 2:]),
    "strength": Measure("graph", _NETWORKS, lambda parts: strength(parts.standardized, parts.members)),
    "amplitude": Measure(
        "temporal", _NETWORKS_AND_GLOBAL, lambda parts: _with_global(amplitude(parts.detrended_series))
    ),
    "variability": Measure(
        "temporal", _NETWORKS_AND_GLOBAL, lambda parts: _with_global(variability(parts.detrended_series))
    ),
    "spectral_ratio": Measure(
        "temporal",
        _NETWORKS_AND_GLOBAL,
        lambda parts: _with_global(spectral_ratio(detrend(parts.series), parts.repetition_time)),
    ),
    "autocorrelation": Measure("temporal", _NETWORKS, lambda parts: autocorrelation(parts.series)),
    "outliers": Measure("temporal", _NETWORKS_AND_GLOBAL, lambda parts: _with_global(outliers(detrend(parts.series)))),
    "falff": Measure("temporal", _NETWORKS_AND_GLOBAL, _falff),
    "fnc": Measure("temporal", tuple(NETWORK_PAIRS), lambda parts: fnc(parts.series)),
}
FAMILIES = {name: measure.family for name, measure in MEASURES.items()}
# closed forms over any number of windows at once: cheap enough to compute for every training example
CORE_MEASURES = ("connectivity", "strength", "autocorrelation")


def descriptor_names(measures: Iterable[str]) -> list[str]:
    """Names `measure/target` of all descriptors of these measures, in the order in which `describe` gives them."""
    measures = list(measures)
    if unknown := [measure for measure in measures if measure not in MEASURES]:
        raise ValueError(f"expected measures among {', '.join(MEASURES)}, got {', '.join(unknown)}")
    if len(set(measures)) < len(measures) or not measures:
        raise ValueError(f"expected at least one measure, each once, got {measures}")
    return [f"{measure}/{target}" for measure in measures for target in MEASURES[measure].targets]


CORE_NAMES = descriptor_names(CORE_MEASURES)


def _without(references: dict[str, np.ndarray] | None, missing: np.ndarray) -> dict[str, np.ndarray] | None:
    """References of the ROIs that are not missing; those of other atlases are left as they are."""
    return references and {
        name: array[~missing] if len(array) == len(missing) else array for name, array in references.items()
    }


def describe(
    signal: np.ndarray,
    atlas: Atlas,
    measures: Iterable[str],
    repetition_time: float | None = None,
    references: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Descriptors float64 [..., names] of signal [..., time, rois], `descriptor_names(measures)` their names.

    Missing ROIs, NaN throughout, are left out. Absent, and then NaN, is what the atlas cannot support (networks it
    does not have; connectivity within a network of one ROI; gradients of fewer than 21 ROIs; a graph of fewer than
    5), what the scan is too short or too slow for (`spectral_ratio`, `falff`), and gradients of a scan whose affinity
    graph is not connected.

    Args:
        signal: robust z-scores per ROI, as the feature extractor prepares them, for `amplitude` and `variability` to
            mean the same in all scans; all other measures come out the same for any scale of a ROI.
        repetition_time: s, needed by `spectral_ratio` and `falff`.
        references: reference gradients [rois, 3] by atlas name (`fit_references`), needed by the gradient measures.

    Raises:
        ValueError: for an atlas whose networks are not those of `NETWORKS`, ROIs that are constant or in part not
            finite, unknown measures, and gradients without a reference of this atlas.
    """
    measures = list(measures)
    names = descriptor_names(measures)
    if signal.ndim < 2 or signal.shape[-1] != len(atlas):
        raise ValueError(f"expected signal [..., time, {len(atlas)}] for atlas {atlas.name!r}, got {signal.shape}")
    missing = np.isnan(signal).all(-2)
    if missing.any():
        windows = zip(signal.reshape(-1, *signal.shape[-2:]), missing.reshape(-1, len(atlas)), strict=True)
        values = [
            describe(
                window[:, ~absent], atlas.without(absent), measures, repetition_time, _without(references, absent)
            )
            for window, absent in windows
        ]
        return np.reshape(values, (*missing.shape[:-1], len(names)))
    parts = Parts(signal, atlas, repetition_time, references)
    return np.concatenate([MEASURES[measure].compute(parts) for measure in measures], axis=-1)
