"""Functional connectivity between and within networks."""

import numpy as np

from ..atlases import Atlas
from .networks import NETWORKS, membership, network_series, standardize


PAIRS = [(a, b) for i, a in enumerate(NETWORKS) for b in list(NETWORKS)[i:]]
CONNECTIVITY_NAMES = [f"connectivity/{a}-{b}" for a, b in PAIRS]
STRENGTH_NAMES = [f"strength/{a}" for a in NETWORKS]


def network_blocks(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """
    Mean Pearson correlation [..., networks, networks] between the ROIs of two networks of signal [..., time, rois].

    The mean over a block of the correlation matrix is the product of two network means, so the matrix itself is
    never built. A network with one ROI has no correlation within (NaN), an absent one has none at all.
    """
    members = membership(atlas)
    series = network_series(standardize(signal), members)
    blocks = np.swapaxes(series, -1, -2) @ series / signal.shape[-2]
    counts = members.sum(0)
    index = np.arange(len(NETWORKS))
    pairs = counts * (counts - 1)
    blocks[..., index, index] = np.where(
        pairs > 0, (blocks[..., index, index] * counts**2 - counts) / np.where(pairs > 0, pairs, 1), np.nan
    )
    return blocks


def connectivity(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """`CONNECTIVITY_NAMES` [..., pairs] of signal [..., time, rois]."""
    rows, columns = np.triu_indices(len(NETWORKS))
    return network_blocks(signal, atlas)[..., rows, columns]


def strength(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """
    `STRENGTH_NAMES` [..., networks]: mean over a network's ROIs of their mean correlation with all other ROIs
    (node strength of the signed, unthresholded graph, divided by the number of other nodes).
    """
    members = membership(atlas)
    standardized = standardize(signal)
    rois, time = members.shape[0], signal.shape[-2]
    total = standardized.sum(-1, keepdims=True)
    per_roi = ((standardized * total).sum(-2) / time - 1) / (rois - 1)
    counts = members.sum(0)
    return per_roi @ members / np.where(counts > 0, counts, np.nan)
