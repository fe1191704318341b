"""FmriLMFeatureExtractor: scans in any usual form -> z-scored, windowed, padded tensors with ROI coordinates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file, logging

from .atlases import Atlas
from .cleaning_fmrilm import Cleaning, clean
from .parcellation import parcellate
from .parcels_fmrilm import Parcels
from .scan_checks_fmrilm import (
    TR_RANGE,
    agree,
    as_float_array,
    check_finite,
    check_shape,
    check_tr,
    select_columns,
    without,
)
from .scan_files_fmrilm import is_scan_file, read_parcels, read_scan
from .signal_fmrilm import (
    interquartile_range,
    nearest_frames,
    resample,
    resampled_length,
    robust_zscore,
    window_bounds,
)


logger = logging.get_logger(__name__)

PARCELS_FOLDER = "atlases"
# what decides which file of a checkpoint is found, and how it is fetched
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "subfolder", "token", "local_files_only", "revision")
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
        atlases: the atlases this extractor knows. They are saved with it, so a checkpoint brings its own, parcels
            included: `atlases/NAME.npz` beside its configuration.
        repetition_time: seconds between two frames of the output.
        patch_length: frames of a patch; time is padded to a multiple of it.
        window_length: frames of a window.
        window: "first", "sliding" (every full window), "random" or "full" (the whole scan).
        window_stride: frames from one sliding window to the next; `window_length` unless given.
        detrend_order: order of the polynomial drift that is removed; 0 removes the mean only.
        clip: largest absolute z-score.
        median, iqr: one centre and one spread for all ROIs, in the units of the signals, in place of drift removal
            and robust z-scores per ROI; clips nothing. What the paper's official checkpoints were trained on.
        cleaning: settings of `Cleaning` as a dict: band-pass, columns of confound tables, thresholds for scrubbing.
        parcel_files: path of a saved atlas' parcels, by its name; set by `from_pretrained`.
    """

    model_input_names = ["fmri_values", "roi_coordinates", "fmri_mask"]

    def __init__(
        self,
        atlases: Sequence[Atlas | dict[str, Any]] | None = None,
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
        parcel_files: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # kept as plain dicts, because attributes are what is saved
        self.atlases = []
        # not saved as attributes: paths are read when a volume or a surface comes
        self._parcels: dict[str, Parcels | str] = dict(parcel_files or {})
        for atlas in atlases or []:
            known = _as_atlas(atlas)
            checksum = atlas.get("parcels_checksum") if isinstance(atlas, dict) else None
            if known.parcels is not None:
                self._parcels[known.name], checksum = known.parcels, known.parcels.checksum
            self.atlases.append(known.to_dict() | ({} if checksum is None else {"parcels_checksum": checksum}))
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
        values = {**super().to_dict(), "window": self.window}
        del values["_parcels"]
        return values

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        files = super().save_pretrained(save_directory) + self.save_parcels(save_directory)
        if push_to_hub:
            # the base class would upload before the parcels are there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def save_parcels(self, save_directory: str | Path) -> list[str]:
        """Write the parcels of each atlas that has some; returns the files."""
        files = []
        for atlas in self.atlases:
            if (parcels := self._known_parcels(atlas["name"])) is not None:
                path = Path(save_directory, PARCELS_FOLDER, f"{atlas['name']}.npz")
                path.parent.mkdir(parents=True, exist_ok=True)
                parcels.save(path)
                files.append(str(path))
        return files

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved configuration; and where the parcels are, fetched from the Hub if need be, like all its files."""
        values, unused = super().get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        source = folder.parent if folder.is_file() else pretrained_model_name_or_path
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        values["parcel_files"] = {
            atlas["name"]: cached_file(source, f"{PARCELS_FOLDER}/{_as_atlas(atlas).name}.npz", **options)
            for atlas in values.get("atlases", [])
            if atlas.get("parcels_checksum") is not None
        }
        return values, unused

    def _known_parcels(self, name: str) -> Parcels | None:
        parcels = self._parcels.get(name)
        if isinstance(parcels, str):
            expected = next(atlas["parcels_checksum"] for atlas in self.atlases if atlas["name"] == name)
            file, parcels = parcels, Parcels.load(parcels)
            if (found := parcels.checksum) != expected:
                raise ValueError(f"{file}: expected the parcels saved with {name!r}, {expected}, got {found}")
            self._parcels[name] = parcels
        return parcels

    def atlas(self, name: str) -> Atlas:
        """The known atlas of this name."""
        return replace(self._known_atlas(name), parcels=self._known_parcels(name))

    def _known_atlas(self, name: str) -> Atlas:
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

        A scan is a path, a nibabel image, a value of `datasets.Nifti`, an array or tensor [time, rois], or a dict
        with "signal" (one of these, or a pair of paths: left and right hemisphere), "tr" and "atlas". A dict may
        bring "confounds" (array [time, confounds], table or its path), which are regressed out, and "censored" (bool
        [time]), frames to do without: they are interpolated and left out of every estimate. They stay True in
        `fmri_mask`, where holes would shift patches. A ROI whose series is NaN throughout, such as one outside of a
        volume's field of view, is missing: it is masked.

        Args:
            tr: repetition time of the scans in seconds; goes before the one in a file's header.
            atlas: name of a known atlas, or an Atlas; may be left out if only one is known.
            label_image: the atlas' parcels in the scan's own space, in place of those that it brings; see
                `read_parcels`.
            generator: draws the starts of random windows.

        Returns:
            `fmri_values` float32 [batch, rois, time]; `roi_coordinates` float32 [batch, rois, 3] (MNI, mm);
            `fmri_mask` bool [batch, rois, time], False where ROIs are missing or padding, or frames are padding
            (values 0 there); and `scan_index` int64 [batch] with sliding windows.
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
        """One scan before windowing: float32 [time, rois] at `repetition_time`, robust z-scores; and its atlas.

        Missing ROIs are NaN.
        """
        read = self.read_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
        return self._standardize(read), read.atlas

    def read_signal(
        self, scan: Any, tr: float | None = None, atlas: str | Atlas | None = None, label_image: Any = None
    ) -> MeasuredScan:
        """One scan as it was measured, parcellated but not cleaned; missing ROIs are NaN."""
        confounds, censored = None, None
        while isinstance(scan, dict) and not is_scan_file(scan):
            if scan.get("signal") is None:
                raise ValueError(f"a scan given as dict needs 'signal', got keys {sorted(scan)}")
            tr = agree("tr", tr, scan.get("tr"))
            atlas = agree("atlas", atlas, scan.get("atlas"))
            confounds = scan.get("confounds") if confounds is None else confounds
            censored = scan.get("censored") if censored is None else censored
            scan = scan["signal"]

        found = self._resolve_atlas(atlas)
        if is_scan_file(scan):
            file = read_scan(scan)
            if tr is not None and file.tr is not None and abs(tr - file.tr) > 1e-3:
                logger.warning(f"using tr={tr} s as given, although the file's header says {file.tr} s")
            tr = file.tr if tr is None else tr
            # before a large file is read
            check_tr(tr)
            scan = self._roi_signal(file, found, label_image)
        signal = as_float_array(scan)
        check_shape(signal, found)
        tr = check_tr(tr)
        missing = np.asarray(np.isnan(signal).all(axis=0))
        present = found
        if missing.any():
            logger.warning(f"{missing.sum()} of the {len(found)} ROIs of {found.name!r} are missing in the scan")
            present = without(found, missing)
        check_finite(signal[:, ~missing], present)
        return MeasuredScan(signal, tr, found, confounds, censored)

    def num_patches(self, fmri_mask: np.ndarray | torch.Tensor) -> list[int]:
        """Patches per item, from the mask bool [batch, rois, time]; a tail counts as one."""
        frames = np.asarray(fmri_mask).any(axis=1).sum(axis=1)
        return [math.ceil(int(valid) / self.patch_length) for valid in frames]

    def _resolve_atlas(self, atlas: str | Atlas | None) -> Atlas:
        if isinstance(atlas, str):
            return self._known_atlas(atlas)
        if atlas is not None:
            return _as_atlas(atlas)
        if len(self.atlases) != 1:
            raise ValueError(f"which atlas are the scan's ROIs from? Give atlas=...; known: {self._known()}")
        return Atlas.from_dict(self.atlases[0])

    def _roi_signal(self, file: Any, atlas: Atlas, label_image: Any) -> np.ndarray:
        """Series [time, rois] of what `read_scan` found: its columns by name, or the means of its parcels."""
        if hasattr(file, "rois"):
            return file.values if file.rois is None else select_columns(file.values, file.rois, atlas)
        if label_image is not None:
            parcels = read_parcels(label_image)
        else:
            parcels = self._known_parcels(atlas.name) if atlas.parcels is None else atlas.parcels
        if parcels is None:
            raise ValueError(
                f"{file.name}: volumes and surfaces need parcels, and atlas {atlas.name!r} has none: use "
                f"Atlas.load({atlas.name!r}, parcels=True) or Atlas.from_image(...), or give label_image"
            )
        return parcellate(file, parcels, atlas.labels)

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
            values[i, : len(atlas), : len(signal)] = np.nan_to_num(signal.T)
            coordinates[i, : len(atlas)] = atlas.coordinates
            mask[i, : len(atlas), : len(signal)] = ~np.isnan(signal.T)
        return {"fmri_values": values, "roi_coordinates": coordinates, "fmri_mask": mask}


def _as_atlas(atlas: Any) -> Atlas:
    if isinstance(atlas, Atlas):
        return atlas
    # code loaded from a checkpoint has an Atlas class of its own: what counts is that it can be written down
    return Atlas.from_dict(atlas.to_dict(), atlas.parcels) if hasattr(atlas, "to_dict") else Atlas.from_dict(atlas)


def _check_window(window: str, window_stride: int | None) -> None:
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {WINDOWS}, got {window!r}")
    if window_stride is not None and window_stride < 1:
        raise ValueError(f"window_stride must be at least 1 frame, got {window_stride}")


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
