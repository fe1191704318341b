"""The networks that descriptors are about: their ROIs, series and connectivity."""

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
# every network with itself and with those after it: the row-major upper triangle of the blocks
PAIRS = [f"{a}-{b}" for i, a in enumerate(NETWORKS) for b in list(NETWORKS)[i:]]
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


def network_series(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """
    Mean [..., networks], such as [..., time, networks], of values [..., rois] over each network's ROIs; NaN for a
    network the atlas does not have.
    """
    counts = members.sum(0)
    return values @ members / np.where(counts > 0, counts, np.nan)


def correlation(standardized: np.ndarray) -> np.ndarray:
    """Functional connectivity: Pearson correlations [rois, rois], exactly symmetric, of standardized [time, rois]."""
    return standardized.T @ standardized / len(standardized)


def network_blocks(standardized: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean Pearson correlation [..., networks, networks] between the ROIs of two networks of standardized
    [..., time, rois]; members: indicator [rois, networks].

    The mean over a block of the correlation matrix is the product of two network means, so the matrix itself is
    never built. A network with one ROI has no correlation within (NaN), an absent one has none at all.
    """
    series = network_series(standardized, members)
    blocks = np.swapaxes(series, -1, -2) @ series / standardized.shape[-2]
    counts = members.sum(0)
    index = np.arange(len(NETWORKS))
    pairs = counts * (counts - 1)
    blocks[..., index, index] = np.where(
        pairs > 0, (blocks[..., index, index] * counts**2 - counts) / np.where(pairs > 0, pairs, 1), np.nan
    )
    return blocks


def connectivity(standardized: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean correlation [..., pairs] of each of `PAIRS` of networks."""
    rows, columns = np.triu_indices(len(NETWORKS))
    return network_blocks(standardized, members)[..., rows, columns]
