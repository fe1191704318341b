"""Signals as float arrays [time, rois]: cleaning at their own sampling rate, then resampling, scale and windows.

Cleaning follows Lindquist et al. 2019 (second recommendation), Power et al. 2014 and `nilearn.signal.clean`:

1. censored frames at both ends are cut off, those between become a cubic spline through the kept frames;
2. drift is removed, and the band-pass applied, to the signal and to the confounds alike, so that regression
   brings back nothing that was filtered out;
3. confounds are regressed out, fitted on kept frames alone;
4. censored frames become straight lines between their cleaned neighbours: time stays evenly spaced, and no motion is
   left in them. A spline would swing out in long gaps. The mask of kept frames goes along, so that scales are
   estimated without them.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its parts are imported where they are used, as some take a while
from scipy.linalg import qr
from scipy.sparse import csr_array

from .scan_io_fmrilm import read_table


# interquartile range of a standard normal distribution
NORMAL_IQR = 1.349
FILTER_ORDER = 5
# of the filter against aliasing: half its length in frames of the longer repetition time, and its Kaiser window's beta
FILTER_REACH, FILTER_SHAPE = 10, 5.0
# of the scan's frames; with fewer left, what is interpolated outweighs what was measured
LEAST_KEPT = 0.5
# of a confound's largest value: what varies less after removal of drift was constant, or a drift
ROUNDING = 1e-10


@dataclass(frozen=True)
class Cleaning:
    """Settings of `clean`. high_pass, low_pass: slowest and fastest fluctuation to keep, Hz."""

    high_pass: float | None = None
    low_pass: float | None = None

    def __post_init__(self) -> None:
        for name in ("high_pass", "low_pass"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"cleaning: expected {name} > 0, got {value}")
        if self.high_pass is not None and self.low_pass is not None and self.high_pass >= self.low_pass:
            raise ValueError(f"cleaning: expected high_pass < low_pass (Hz), got {self.high_pass} and {self.low_pass}")

    @classmethod
    def from_dict(cls, settings: dict[str, Any] | None) -> "Cleaning":
        """Checked settings; None is no cleaning."""
        settings = settings or {}
        if unknown := sorted(set(settings) - set(cls.__dataclass_fields__)):
            raise ValueError(f"cleaning knows {', '.join(cls.__dataclass_fields__)}; got {', '.join(unknown)}")
        return cls(**settings)


def clean(
    signal: np.ndarray,
    tr: float,
    detrend_order: int,
    cleaning: Cleaning,
    confounds: Any = None,
    censored: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Clean a scan at its own repetition time.

    Args:
        signal: float [time, rois], finite but for ROIs that are NaN throughout, which stay so.
        tr: s.
        detrend_order: order of the polynomial drift to remove; 0 removes the mean only.
        confounds: array or DataFrame [time, confounds], or the path of a .tsv or .csv. NaN in the first row, as
            derivatives have it, takes the value of the second.
        censored: bool [time], True on frames to do without.

    Returns:
        float64 [time, rois] and the kept frames, bool [time]; shorter than the input where its ends are censored.
    """
    kept = _kept_frames(censored, len(signal))
    nuisance = _read_confounds(confounds, len(signal))
    first, last = np.flatnonzero(kept)[[0, -1]]
    inside = slice(first, last + 1)
    kept, frames = kept[inside], np.arange(last + 1 - first)
    present = np.asarray(~np.isnan(signal).all(axis=0))
    both = np.hstack([signal[:, present], nuisance])[inside]
    if cleaning.high_pass is None and cleaning.low_pass is None:
        both = detrend(both[kept], detrend_order, frames[kept])
    else:
        if not kept.all():
            both[~kept] = scipy.interpolate.CubicSpline(frames[kept], both[kept])(frames[~kept])
        both = _band_pass(detrend(both, detrend_order), tr, cleaning)[kept]
    cleaned = _regress(both[:, : present.sum()], both[:, present.sum() :], detrend_order)
    out = np.full((len(frames), len(present)), np.nan)
    if not kept.all():
        cleaned = scipy.interpolate.make_interp_spline(frames[kept], cleaned, k=1)(frames)
    out[:, present] = cleaned
    return out, kept


def _kept_frames(censored: Any, frames: int) -> np.ndarray:
    """Frames to keep: bool [time]."""
    out = np.zeros(frames, dtype=bool) if censored is None else np.asarray(censored)
    if out.shape != (frames,) or out.dtype != bool:
        raise ValueError(f"expected censored as {frames} bools, one per frame, got {out.shape} of {out.dtype}")
    if frames - out.sum() < LEAST_KEPT * frames:
        raise ValueError(f"{out.sum()} of {frames} frames are censored; expected at most {1 - LEAST_KEPT:.0%}")
    return ~out


def _read_confounds(confounds: Any, frames: int) -> np.ndarray:
    """The confounds to regress out: float64 [time, confounds], each at most 1 in size."""
    if confounds is None:
        return np.empty((frames, 0))
    values = read_table(Path(confounds))[1] if isinstance(confounds, (str, Path)) else confounds
    values = np.array(values, dtype=np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or len(values) != frames:
        raise ValueError(
            f"expected confounds [time, confounds] with {frames} rows, one per frame, got {len(values)} rows "
            f"(shape {values.shape})"
        )
    values[0] = np.where(np.isnan(values[0]), values[min(1, frames - 1)], values[0])
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        # by its number: names out of files are kept out of tables of failures
        raise ValueError(
            f"{len(bad)} values of the confounds are missing or infinite, the first in column {column}, row {row}, "
            "counted from 0; expected that in row 0 alone"
        )
    size = np.abs(values).max(axis=0)
    return values / np.where(size == 0, 1, size)


def _band_pass(values: np.ndarray, tr: float, cleaning: Cleaning) -> np.ndarray:
    """Butterworth filter, forwards and backwards: no phase shift."""
    cutoffs = [cutoff for cutoff in (cleaning.high_pass, cleaning.low_pass) if cutoff is not None]
    if max(cutoffs) >= 0.5 / tr:
        raise ValueError(f"expected cutoffs under {0.5 / tr:.3f} Hz, half the sampling rate, got {max(cutoffs)} Hz")
    kind = "bandpass" if len(cutoffs) == 2 else "lowpass" if cleaning.high_pass is None else "highpass"
    critical = cutoffs if len(cutoffs) == 2 else cutoffs[0]
    sections = scipy.signal.butter(FILTER_ORDER, critical, kind, output="sos", fs=1 / tr)
    try:
        return scipy.signal.sosfiltfilt(sections, values, axis=0)
    except ValueError as error:
        raise ValueError(f"{len(values)} frames are too few for a {kind} filter: {error}") from error


def _regress(signal: np.ndarray, confounds: np.ndarray, detrend_order: int) -> np.ndarray:
    """Residual of the signal after the least-squares fit of the confounds, all [kept frames, ...]."""
    spread = confounds.std(axis=0, ddof=1)
    standardized = (confounds - confounds.mean(axis=0))[:, spread > ROUNDING] / spread[spread > ROUNDING]
    if not standardized.size:
        return signal
    # the declared result depends on the arguments' values
    factors: Any = qr(standardized, mode="economic", pivoting=True)
    basis, triangle, _ = factors
    basis = basis[:, np.abs(np.diag(triangle)) > 100 * np.finfo(np.float64).eps]
    if basis.shape[1] + detrend_order + 1 >= len(signal):
        raise ValueError(
            f"{basis.shape[1]} independent confounds and a drift of order {detrend_order} leave nothing of "
            f"{len(signal)} kept frames"
        )
    return signal - basis @ (basis.T @ signal)


def sampling_ratio(tr: float, repetition_time: float) -> Fraction:
    """Output frames per input frame, as a fraction small enough for a polyphase filter (both TRs in seconds)."""
    return Fraction(tr / repetition_time).limit_denominator(1000)


def resampled_length(frames: int, tr: float, repetition_time: float) -> int:
    """Number of frames that `resample` returns: those no later than the last one measured."""
    return math.floor((frames - 1) * sampling_ratio(tr, repetition_time)) + 1


def detrend(signal: np.ndarray, order: int, frames: np.ndarray | None = None) -> np.ndarray:
    """Remove the least-squares polynomial of `order` (0: the mean only) from each ROI.

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
    # as scipy.signal.resample_poly with padtype="symmetric", whose import takes a tenth of the time of an answer. At
    # both ends a mirror image keeps slow fluctuations, where zeros would bend them towards the mean; point reflection
    # would keep them better, but lets fast ones through unfiltered
    up, down = ratio.numerator, ratio.denominator
    # places are multiples of the step that is common to the frames of both
    reach = FILTER_REACH * max(up, down)
    weights = np.sinc(np.arange(-reach, reach + 1) / max(up, down)) * np.kaiser(2 * reach + 1, FILTER_SHAPE)
    weights *= up / weights.sum()
    places = np.arange(resampled_length(len(signal), tr, repetition_time)) * down
    margin = reach // up + 1
    frames = places[:, None] // up + np.arange(-margin, margin + 1)
    distances = np.minimum(np.abs(places[:, None] - frames * up), reach + 1)
    values = np.append(weights[reach:], 0)[distances]
    mirrored = np.pad(np.arange(len(signal)), margin, mode="symmetric")[frames + margin]
    # what falls on one frame twice is added up
    starts = np.arange(0, values.size + 1, values.shape[1])
    return csr_array((values.ravel(), mirrored.ravel(), starts), shape=(len(places), len(signal))) @ signal


def interquartile_range(signal: np.ndarray) -> np.ndarray:
    """Spread of each ROI [rois]."""
    low, high = np.percentile(signal, (25, 75), axis=0)
    return high - low


def robust_zscore(signal: np.ndarray, clip: float, kept: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Centre on the median, divide by IQR / 1.349 (the standard deviation of normal data), clip to [-clip, clip].

    Spikes from head motion change mean and standard deviation, but hardly these two. kept: bool [time], the frames
    they are estimated from.
    """
    scale = interquartile_range(signal[kept]) / NORMAL_IQR
    return np.clip((signal - np.median(signal[kept], axis=0)) / scale, -clip, clip)


def nearest_frames(frames: int, tr: float, repetition_time: float) -> np.ndarray:
    """The input frame that is nearest in time to each frame `resample` returns."""
    times = np.arange(resampled_length(frames, tr, repetition_time)) * repetition_time
    return np.minimum(np.rint(times / tr).astype(int), frames - 1)


def window_bounds(frames: int, window: str, length: int, stride: int) -> list[tuple[int, int]]:
    """First and one-past-last frame of each window. A scan shorter than `length` is one window by itself."""
    if window == "full" or frames <= length:
        return [(0, frames)]
    if window == "first":
        return [(0, length)]
    return [(start, start + length) for start in range(0, frames - length + 1, stride)]
