"""FmriLMFeatureExtractor: scans in any usual form -> z-scored, windowed, padded tensors with ROI coordinates."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import logging

from .atlases import Atlas
from .cleaning_fmrilm import Cleaning, clean
from .parcellation import TR_RANGE, parcellate, read_scan
from .signal_fmrilm import (
    interquartile_range,
    nearest_frames,
    resample,
    resampled_length,
    robust_zscore,
    window_bounds,
)


logger = logging.get_logger(__name__)

WINDOWS = ("first", "sliding", "random", "full")
# relative to the largest value of a ROI: below it, what varies is float32 rounding
CONSTANT_BELOW = 1e-6


@dataclass(frozen=True, eq=False)
class MeasuredScan:
    """A scan as it was measured. signal: float64 [time, rois]; tr: s; confounds, censored: as they were given."""

    signal: np.ndarray
    tr: float
    atlas: Atlas
    confounds: Any = None
    censored: Any = None


class FmriLMFeatureExtractor(FeatureExtractionMixin):
    """Turns scans into model inputs.

    Args:
        atlases: the atlases this extractor knows. They are saved with it, so a checkpoint brings its own.
        repetition_time: seconds between two frames of the output.
        patch_length: frames per step of the model; time is padded to a multiple of it.
        window_length: frames of a window.
        window: "first", "sliding" (every full window), "random" or "full" (the whole scan).
        window_stride: frames from one sliding window to the next; `window_length` unless given.
        detrend_order: order of the polynomial drift that is removed; 0 removes the mean only.
        clip: largest absolute z-score.
        median, iqr: one centre and one spread for all ROIs, in the units of the signals, in place of drift removal
            and robust z-scores per ROI; clips nothing. What the paper's official checkpoints were trained on.
        cleaning: settings of `Cleaning` as a dict: band-pass, columns of confound tables, thresholds for scrubbing.
    """

    model_input_names = ["fmri_values", "roi_coordinates", "fmri_mask"]

    def __init__(
        self,
        atlases: list[Atlas | dict[str, Any]] | None = None,
        repetition_time: float = 2.0,
        patch_length: int = 16,
        window_length: int = 160,
        window: str = "first",
        window_stride: int | None = None,
        detrend_order: int = 2,
        clip: float = 6.0,
        median: float | None = None,
        iqr: float | None = None,
        cleaning: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # kept as plain dicts, because attributes are what is saved
        self.atlases = [_as_atlas(atlas).to_dict() for atlas in atlases or []]
        names = [atlas["name"] for atlas in self.atlases]
        if len(set(names)) < len(names):
            raise ValueError(f"expected atlases of different names, got {names}")
        if not TR_RANGE[0] < repetition_time < TR_RANGE[1]:
            raise ValueError(f"repetition_time must be in {TR_RANGE} seconds, got {repetition_time}")
        if patch_length < 1 or window_length < patch_length:
            raise ValueError(f"expected 1 <= patch_length <= window_length, got {patch_length} and {window_length}")
        if detrend_order < 0 or clip <= 0:
            raise ValueError(f"expected detrend_order >= 0 and clip > 0, got {detrend_order} and {clip}")
        if (median is None) != (iqr is None) or iqr is not None and iqr <= 0:
            raise ValueError(f"expected median and iqr > 0 together or neither, got {median} and {iqr}")
        Cleaning.from_dict(cleaning)
        _check_window(window, window_stride)
        self.repetition_time = repetition_time
        self.patch_length = patch_length
        self.window_length = window_length
        self.window = window
        self.window_stride = window_stride
        self.detrend_order = detrend_order
        self.clip = clip
        self.median = median
        self.iqr = iqr
        self.cleaning = cleaning

    def to_dict(self) -> dict[str, Any]:
        # the base class drops an attribute of this name: for audio it is an array of filter weights
        return {**super().to_dict(), "window": self.window}

    def atlas(self, name: str) -> Atlas:
        """The known atlas of this name."""
        for atlas in self.atlases:
            if atlas["name"] == name:
                return Atlas.from_dict(atlas)
        raise ValueError(
            f"unknown atlas {name!r}; this feature extractor knows: {self._known()}. "
            "Pass an Atlas itself, or build the extractor with atlases=[Atlas.load(...)]"
        )

    def _known(self) -> str:
        return ", ".join(f"{atlas['name']} ({len(atlas['rois'])} ROIs)" for atlas in self.atlases) or "none"

    def __call__(
        self,
        scans: Any,
        tr: float | None = None,
        atlas: str | Atlas | None = None,
        label_image: Any = None,
        window: str | None = None,
        window_stride: int | None = None,
        generator: np.random.Generator | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prepare one scan or a list of scans.

        A scan is a path, a nibabel image (with `label_image`), an array or tensor [time, rois], or a dict with
        "signal" (one of these), "tr" and "atlas". A dict may bring "confounds" (array [time, confounds], table or
        its path), which are regressed out, and "censored" (bool [time]), frames to do without: they are interpolated
        and left out of every estimate. They stay True in `fmri_mask`, where holes would shift steps.

        Args:
            tr: repetition time of the scans in seconds; goes before the one in a file's header.
            atlas: name of a known atlas, or an Atlas; may be left out if only one is known.
            label_image: parcels of the atlas as a 3D image or its path; needed for volumes.
            generator: draws the starts of random windows.

        Returns:
            `fmri_values` float32 [batch, rois, time]; `roi_coordinates` float32 [batch, rois, 3] (MNI, mm);
            `fmri_mask` bool [batch, rois, time], False where ROIs or frames are padding (values 0 there); and
            `scan_index` int64 [batch] with sliding windows.
        """
        window = self.window if window is None else window
        window_stride = self.window_stride if window_stride is None else window_stride
        _check_window(window, window_stride)
        scans = list(scans) if isinstance(scans, (list, tuple)) else [scans]
        if not scans:
            raise ValueError("expected at least one scan, got an empty list")

        items: list[tuple[np.ndarray, Atlas]] = []
        scan_index: list[int] = []
        for number, scan in enumerate(scans):
            signal, scan_atlas = self.prepare_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
            stride = self.window_length if window_stride is None else window_stride
            for start, stop in window_bounds(len(signal), window, self.window_length, stride, generator):
                items.append((signal[start:stop], scan_atlas))
                scan_index.append(number)

        data = self._pad(items)
        if window == "sliding":
            data["scan_index"] = np.array(scan_index, dtype=np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def prepare_signal(
        self, scan: Any, tr: float | None = None, atlas: str | Atlas | None = None, label_image: Any = None
    ) -> tuple[np.ndarray, Atlas]:
        """One scan before windowing: float32 [time, rois] at `repetition_time`, robust z-scores; and its atlas."""
        read = self.read_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
        return self._standardize(read), read.atlas

    def read_signal(
        self, scan: Any, tr: float | None = None, atlas: str | Atlas | None = None, label_image: Any = None
    ) -> MeasuredScan:
        """One scan as it was measured, parcellated but not cleaned."""
        confounds, censored = None, None
        while isinstance(scan, dict):
            if scan.get("signal") is None:
                raise ValueError(f"a scan given as dict needs 'signal', got keys {sorted(scan)}")
            tr = _agree("tr", tr, scan.get("tr"))
            atlas = _agree("atlas", atlas, scan.get("atlas"))
            confounds = scan.get("confounds") if confounds is None else confounds
            censored = scan.get("censored") if censored is None else censored
            scan = scan["signal"]

        columns = None
        if isinstance(scan, (str, Path)) or hasattr(scan, "dataobj"):
            scan, file_tr, columns = read_scan(scan)
            if tr is not None and file_tr is not None and abs(tr - file_tr) > 1e-3:
                logger.warning(f"using tr={tr} s as given, although the file's header says {file_tr} s")
            tr = file_tr if tr is None else tr
        found = self._resolve_atlas(atlas)
        if hasattr(scan, "dataobj"):
            if label_image is None:
                raise ValueError(f"a volume needs label_image: the parcels of {found.name!r} in the scan's space")
            scan = parcellate(scan, label_image, found.labels)
        signal = _as_float_array(scan)
        if columns is not None:
            signal = _select_columns(signal, columns, found)
        _check_shape(signal, found)
        _check_finite(signal, found)
        _check_tr(tr)
        return MeasuredScan(signal, tr, found, confounds, censored)

    def num_steps(self, fmri_mask: np.ndarray | torch.Tensor) -> list[int]:
        """Steps of the model per item, from the mask bool [batch, rois, time]; a tail counts as one."""
        frames = np.asarray(fmri_mask).any(axis=1).sum(axis=1)
        return [math.ceil(int(valid) / self.patch_length) for valid in frames]

    def _resolve_atlas(self, atlas: str | Atlas | None) -> Atlas:
        if isinstance(atlas, str):
            return self.atlas(atlas)
        if atlas is not None:
            return _as_atlas(atlas)
        if len(self.atlases) != 1:
            raise ValueError(f"which atlas are the scan's ROIs from? Give atlas=...; known: {self._known()}")
        return Atlas.from_dict(self.atlases[0])

    def clean_signal(self, read: MeasuredScan) -> tuple[np.ndarray, np.ndarray]:
        """Cleaned at its own repetition time, float64 [time, rois], and the frames that were kept, bool [time]."""
        settings = Cleaning.from_dict(self.cleaning)
        order = self.detrend_order if self.median is None else 0
        return clean(read.signal, read.tr, order, settings, read.confounds, read.censored)

    def _standardize(self, read: MeasuredScan) -> np.ndarray:
        cleaned, kept = self.clean_signal(read)
        frames = resampled_length(len(cleaned), read.tr, self.repetition_time)
        if frames < self.patch_length:
            raise ValueError(
                f"scan too short: {len(cleaned)} frames at {read.tr} s make {frames} frames at {self.repetition_time} "
                f"s ({len(cleaned) * read.tr:.1f} s); expected at least one patch of {self.patch_length} frames "
                f"({self.patch_length * self.repetition_time:.1f} s)"
            )
        kept = kept[nearest_frames(len(cleaned), read.tr, self.repetition_time)]
        cleaned = resample(cleaned, read.tr, self.repetition_time)
        constant = interquartile_range(cleaned[kept]) <= CONSTANT_BELOW * np.abs(read.signal).max(axis=0)
        if constant.any():
            first = int(np.flatnonzero(constant)[0])
            raise ValueError(
                f"{constant.sum()} of {len(read.atlas)} ROIs are constant, the first is {read.atlas.rois[first]!r} "
                f"(column {first}); expected a signal that varies"
            )
        if self.median is not None:
            # the mean is taken out for the filters alone
            return ((cleaned + read.signal.mean(axis=0) - self.median) / self.iqr).astype(np.float32)
        return robust_zscore(cleaned, self.clip, kept).astype(np.float32)

    def _pad(self, items: list[tuple[np.ndarray, Atlas]]) -> dict[str, np.ndarray]:
        rois = max(len(atlas) for _, atlas in items)
        steps = max(math.ceil(len(signal) / self.patch_length) for signal, _ in items)
        values = np.zeros((len(items), rois, steps * self.patch_length), dtype=np.float32)
        coordinates = np.zeros((len(items), rois, 3), dtype=np.float32)
        mask = np.zeros(values.shape, dtype=bool)
        for i, (signal, atlas) in enumerate(items):
            values[i, : len(atlas), : len(signal)] = signal.T
            coordinates[i, : len(atlas)] = atlas.coordinates
            mask[i, : len(atlas), : len(signal)] = True
        return {"fmri_values": values, "roi_coordinates": coordinates, "fmri_mask": mask}


def _as_atlas(atlas: Any) -> Atlas:
    if isinstance(atlas, Atlas):
        return atlas
    # code loaded from a checkpoint has an Atlas class of its own: what counts is that it can be written down
    return Atlas.from_dict(atlas.to_dict() if hasattr(atlas, "to_dict") else atlas)


def _agree(what: str, argument: Any, own: Any) -> Any:
    """The value that is given, once or twice alike; a scan's own value and the call's must not contradict."""
    if argument is None or own is None:
        return own if argument is None else argument
    if isinstance(argument, str) != isinstance(own, str):
        # a name and an atlas of that name say the same; the atlas says more
        argument, own = sorted((argument, own), key=lambda value: isinstance(value, str))
        same = argument.name == own
    else:
        same = argument == own
    if not same:
        raise ValueError(f"{what} given twice and differently: {argument!r} and {own!r}")
    return argument


def _check_window(window: str, window_stride: int | None) -> None:
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {WINDOWS}, got {window!r}")
    if window_stride is not None and window_stride < 1:
        raise ValueError(f"window_stride must be at least 1 frame, got {window_stride}")


def _check_tr(tr: float | None) -> None:
    if tr is None:
        raise ValueError("the scan's repetition time is not known: give tr=... in seconds")
    if not TR_RANGE[0] < tr < TR_RANGE[1]:
        hint = "; milliseconds?" if tr >= TR_RANGE[1] else ""
        raise ValueError(f"tr must be in {TR_RANGE} seconds, got {tr}{hint}")


def _as_float_array(scan: Any) -> np.ndarray:
    if isinstance(scan, torch.Tensor):
        scan = scan.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(scan)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected a signal of real numbers, got {type(scan).__name__} of dtype {array.dtype}")
    return array.astype(np.float64)


def _select_columns(signal: np.ndarray, columns: tuple[str, ...], atlas: Atlas) -> np.ndarray:
    """Columns of a table in the atlas' order, found by name; columns that are not in the atlas are left out."""
    position = {name: i for i, name in enumerate(columns)}
    if len(position) < len(columns):
        raise ValueError(f"expected {len(columns)} different column names, got {len(position)}")
    if missing := [roi for roi in atlas.rois if roi not in position]:
        raise ValueError(
            f"{len(missing)} of the {len(atlas)} ROIs of {atlas.name!r} are not among the {len(columns)} columns: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return signal[:, [position[roi] for roi in atlas.rois]]


def _check_shape(signal: np.ndarray, atlas: Atlas) -> None:
    expected = f"expected [time, rois] = [*, {len(atlas)}] for atlas {atlas.name!r}, got {signal.shape}"
    if signal.ndim != 2:
        raise ValueError(f"{expected}: not two-dimensional")
    if signal.shape[1] != len(atlas):
        hint = "transposed?" if signal.shape[0] == len(atlas) else f"{signal.shape[1]} ROIs instead of {len(atlas)}"
        raise ValueError(f"{expected}: {hint}")
    if len(signal) == 0:
        raise ValueError(f"{expected}: no frames")


def _check_finite(signal: np.ndarray, atlas: Atlas) -> None:
    bad = ~np.isfinite(signal)
    if bad.any():
        first = int(np.flatnonzero(bad.any(axis=0))[0])
        raise ValueError(
            f"{int(bad.sum())} of {signal.size} values are NaN or infinite, the first ROI with one is "
            f"{atlas.rois[first]!r} (column {first}); expected finite numbers"
        )
