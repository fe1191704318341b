"""Functional connectivity between and within networks."""

import numpy as np

from .networks import NETWORKS, network_series


# every network with itself and with those after it: the row-major upper triangle of the blocks
PAIRS = [f"{a}-{b}" for i, a in enumerate(NETWORKS) for b in list(NETWORKS)[i:]]


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
