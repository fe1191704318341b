"""The networks that descriptors are about, and the series of each."""

import numpy as np

from ..atlases_fmrilm import Atlas


# Yeo's seven in their usual order, then subcortex: the key in a descriptor's name, the value in its text
NETWORKS = {
    "Vis": "visual",
    "SomMot": "somatomotor",
    "DorsAttn": "dorsal attention",
    "SalVentAttn": "ventral attention",
    "Limbic": "limbic",
    "Cont": "control",
    "Default": "default mode",
    "Subcortical": "subcortical",
}
# relative to the largest value of a ROI: below it, what varies is float64 rounding
CONSTANT_BELOW = 1e-12


def membership(atlas: Atlas) -> np.ndarray:
    """Indicator float64 [rois, networks] of each ROI's network, in the order of `NETWORKS`."""
    # a ROI may be of no network
    unknown = sorted(set(atlas.networks) - set(NETWORKS) - {""})
    if unknown:
        raise ValueError(f"expected the networks {list(NETWORKS)} in atlas {atlas.name!r}, got also {unknown}")
    return (np.array(atlas.networks)[:, None] == np.array(list(NETWORKS))).astype(np.float64)


def standardize(signal: np.ndarray) -> np.ndarray:
    """Zero mean and unit standard deviation over time, float64, of signal [..., time, rois]."""
    signal = np.asarray(signal, np.float64)
    std = signal.std(-2, keepdims=True)
    # one such ROI would silently make NaN or rounding noise of the descriptors of all networks
    bad = ~(std > CONSTANT_BELOW * np.abs(signal).max(-2, keepdims=True))
    if bad.any():
        raise ValueError(f"expected finite ROIs that vary over time, got {int(bad.sum())} that do not")
    return (signal - signal.mean(-2, keepdims=True)) / std


def network_series(standardized: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean series [..., time, networks] over each network's ROIs; NaN for a network the atlas does not have."""
    counts = members.sum(0)
    return standardized @ members / np.where(counts > 0, counts, np.nan)


def correlation(standardized: np.ndarray) -> np.ndarray:
    """Functional connectivity: Pearson correlations [rois, rois], exactly symmetric, of standardized [time, rois]."""
    return standardized.T @ standardized / len(standardized)
