"""Signal steps as pure functions on float arrays [time, rois]: drift, sampling rate, scale, windows."""

import math
from fractions import Fraction

import numpy as np
from scipy.signal import resample_poly


# interquartile range of a standard normal distribution
NORMAL_IQR = 1.349


def sampling_ratio(tr: float, repetition_time: float) -> Fraction:
    """Output frames per input frame, as a fraction small enough for a polyphase filter (both TRs in seconds)."""
    return Fraction(tr / repetition_time).limit_denominator(1000)


def resampled_length(frames: int, tr: float, repetition_time: float) -> int:
    """Number of frames that `resample` returns: those no later than the last one measured."""
    return math.floor((frames - 1) * sampling_ratio(tr, repetition_time)) + 1


def detrend(signal: np.ndarray, order: int, frames: np.ndarray | None = None) -> np.ndarray:
    """
    Remove the least-squares polynomial of `order` (0: the mean only) from each ROI.

    frames: increasing position in time of each row, where some are left out.
    """
    frames = np.arange(len(signal)) if frames is None else frames
    time = np.interp(frames, frames[[0, -1]], [-1.0, 1.0])
    # Legendre columns stay well conditioned where powers of time do not
    basis, _ = np.linalg.qr(np.polynomial.legendre.legvander(time, min(order, len(signal) - 1)))
    return signal - basis @ (basis.T @ signal)


def resample(signal: np.ndarray, tr: float, repetition_time: float) -> np.ndarray:
    """Change the sampling interval from `tr` to `repetition_time` seconds, filtering out what would alias."""
    ratio = sampling_ratio(tr, repetition_time)
    if ratio == 1:
        return signal
    # at both ends a mirror image keeps slow fluctuations, where zeros would bend them towards the mean; point
    # reflection would keep them better, but lets fast ones through unfiltered
    resampled = resample_poly(signal, ratio.numerator, ratio.denominator, axis=0, padtype="symmetric")
    return resampled[: resampled_length(len(signal), tr, repetition_time)]


def interquartile_range(signal: np.ndarray) -> np.ndarray:
    """Spread of each ROI [rois]."""
    low, high = np.percentile(signal, (25, 75), axis=0)
    return high - low


def robust_zscore(signal: np.ndarray, clip: float, kept: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Centre on the median, divide by IQR / 1.349 (the SD of normal data), clip to [-clip, clip].

    Spikes from head motion move mean and SD, but hardly these two. kept: bool [time], the frames they come from.
    """
    scale = interquartile_range(signal[kept]) / NORMAL_IQR
    return np.clip((signal - np.median(signal[kept], axis=0)) / scale, -clip, clip)


def nearest_frames(frames: int, tr: float, repetition_time: float) -> np.ndarray:
    """The input frame that is nearest in time to each frame `resample` returns."""
    times = np.arange(resampled_length(frames, tr, repetition_time)) * repetition_time
    return np.minimum(np.rint(times / tr).astype(int), frames - 1)


def window_bounds(
    frames: int, window: str, length: int, stride: int, generator: np.random.Generator | None = None
) -> list[tuple[int, int]]:
    """First and one-past-last frame of each window. A scan shorter than `length` is one window by itself."""
    if window == "full" or frames <= length:
        return [(0, frames)]
    if window == "first":
        return [(0, length)]
    if window == "random":
        if generator is None:
            raise ValueError("window='random' needs generator=numpy.random.default_rng(seed)")
        start = int(generator.integers(frames - length + 1))
        return [(start, start + length)]
    return [(start, start + length) for start in range(0, frames - length + 1, stride)]
