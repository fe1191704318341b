"""How the mean series of each network moves in time."""

import numpy as np

from ..atlases import Atlas
from .networks import NETWORKS, membership, network_series, standardize


AUTOCORRELATION_NAMES = [f"autocorrelation/{network}" for network in NETWORKS]


def autocorrelation(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """
    `AUTOCORRELATION_NAMES` [..., networks] of signal [..., time, rois]: correlation of a network's mean series with
    itself one frame later. High values are slow fluctuations.
    """
    series = network_series(standardize(signal), membership(atlas))
    return (series[..., 1:, :] * series[..., :-1, :]).sum(-2) / (series**2).sum(-2)
