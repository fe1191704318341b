"""How networks move in time. Functions take series [..., time, networks], NaN for networks an atlas does not have."""

import numpy as np
from scipy.signal import welch

from .networks import NETWORKS


# pairs of two different networks: the row-major upper triangle without the diagonal
NETWORK_PAIRS = [f"{a}-{b}" for i, a in enumerate(NETWORKS) for b in list(NETWORKS)[i + 1 :]]
# Hz; the upper end of HIGH_BAND is the Nyquist frequency where that is lower
LOW_BAND, HIGH_BAND = (0.01, 0.1), (0.1, 0.25)
FALFF_BAND = (0.01, 0.08)
# a scan has to hold one period of the slowest frequency
SHORTEST_SECONDS = 1 / LOW_BAND[0]
# 256 frames at a TR of 2 s
WELCH_SECONDS = 512
OUTLIER_STDS = 3


def detrend(series: np.ndarray) -> np.ndarray:
    """Without mean and least-squares linear trend over time, float64 [..., time, columns]; NaN columns stay NaN."""
    time = np.linspace(-1, 1, series.shape[-2])[:, None]
    slope = (time * series).sum(-2, keepdims=True) / (time**2).sum()
    return series - series.mean(-2, keepdims=True) - time * slope


def amplitude(series: np.ndarray) -> np.ndarray:
    """Mean absolute value [..., networks] of detrended series, in their unit."""
    return np.abs(series).mean(-2)


def variability(series: np.ndarray) -> np.ndarray:
    """Standard deviation [..., networks] of detrended series, in their unit."""
    return series.std(-2)


def outliers(series: np.ndarray) -> np.ndarray:
    """Share of frames [..., networks] more than 3 standard deviations from the mean, of detrended series."""
    scores = np.abs(series) / series.std(-2, keepdims=True)
    return np.where(np.isnan(scores), np.nan, scores > OUTLIER_STDS).mean(-2)


def autocorrelation(series: np.ndarray) -> np.ndarray:
    """Correlation [..., networks] of centred series with themselves one frame later: high values are slow."""
    return (series[..., 1:, :] * series[..., :-1, :]).sum(-2) / (series**2).sum(-2)


def fnc(series: np.ndarray) -> np.ndarray:
    """Functional network connectivity: correlation [..., pairs] of the centred series of `NETWORK_PAIRS`."""
    units = series / np.linalg.norm(series, axis=-2, keepdims=True)
    rows, columns = np.triu_indices(len(NETWORKS), 1)
    return (np.swapaxes(units, -1, -2) @ units)[..., rows, columns]


def spectral_ratio(series: np.ndarray, repetition_time: float) -> np.ndarray:
    """Power at 0.01-0.1 Hz by power at 0.1-0.25 Hz [..., networks] (Welch, Hann windows of up to 512 s, half
    overlapping). NaN for scans shorter than 100 s, and for repetition times of 5 s and more, which leave no high band.
    """
    length = min(series.shape[-2], round(WELCH_SECONDS / repetition_time))
    if series.shape[-2] * repetition_time < SHORTEST_SECONDS or 0.5 / repetition_time <= HIGH_BAND[0]:
        return np.full((*series.shape[:-2], series.shape[-1]), np.nan)
    frequencies, power = welch(series, fs=1 / repetition_time, nperseg=length, axis=-2)
    low = (frequencies >= LOW_BAND[0]) & (frequencies < LOW_BAND[1])
    high = (frequencies >= HIGH_BAND[0]) & (frequencies <= HIGH_BAND[1])
    return power[..., low, :].sum(-2) / power[..., high, :].sum(-2)


def falff(signal: np.ndarray, repetition_time: float) -> np.ndarray:
    """Fractional amplitude of low-frequency fluctuations [..., rois] of detrended signal [..., time, rois]: summed
    amplitude (root of the power spectrum) at 0.01-0.08 Hz by that of all frequencies above 0 (Zou et al. 2008). NaN
    for scans shorter than 100 s, and where the Nyquist frequency is not above the band. Depends on the repetition
    time, which sets the highest frequency.
    """
    time = signal.shape[-2]
    if time * repetition_time < SHORTEST_SECONDS or 0.5 / repetition_time <= FALFF_BAND[1]:
        return np.full((*signal.shape[:-2], signal.shape[-1]), np.nan)
    frequencies = np.fft.rfftfreq(time, repetition_time)
    amplitudes = np.abs(np.fft.rfft(signal, axis=-2))
    low = (frequencies >= FALFF_BAND[0]) & (frequencies <= FALFF_BAND[1])
    return amplitudes[..., low, :].sum(-2) / amplitudes[..., frequencies > 0, :].sum(-2)
