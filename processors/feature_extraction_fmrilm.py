"""FmriLMFeatureExtractor: scans in any usual form -> z-scored, windowed, padded tensors with ROI coordinates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file

from .atlases_fmrilm import Atlas, Parcels, fitting_atlases
from .cleaning_fmrilm import (
    Cleaning,
    clean,
    interquartile_range,
    nearest_frames,
    resample,
    resampled_length,
    robust_zscore,
    window_bounds,
)
from .scan_io_fmrilm import is_scan_file, parcellate, read_scan, warn_once


PARCELS_FOLDER = "atlases"
# what decides which file of a checkpoint is found, and how it is fetched
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "subfolder", "token", "local_files_only", "revision")
WINDOWS = ("first", "sliding", "full")
# plausible repetition times, s: what lies outside is another unit or nothing at all
TR_RANGE = (0.1, 10.0)
# how the calls of this package and its commands take it
GIVE_TR = "give it in seconds (tr=..., or --tr)"
# relative to the largest value of a ROI: below it, what varies is float32 rounding
CONSTANT_BELOW = 1e-6
# columns of a table that count its frames; an index that pandas writes has no name
FRAME_COLUMNS = ("", "Unnamed: 0", "index", "frame", "time")


@dataclass(frozen=True, eq=False)
class MeasuredScan:
    """A scan as it was measured. signal: float64 [time, rois], missing ROIs NaN; tr: s; the others as given."""

    signal: np.ndarray
    tr: float
    atlas: Atlas
    confounds: Any = None
    censored: Any = None

    @property
    def missing(self) -> np.ndarray:
        """Missing ROIs: bool [rois]."""
        return np.asarray(np.isnan(self.signal).all(axis=0))


class FmriLMFeatureExtractor(FeatureExtractionMixin):
    """Turns scans into model inputs.

    Args:
        atlases: the atlases this extractor knows. They are saved with it, so a checkpoint brings its own, parcels
            included: `atlases/NAME.npz` beside its configuration.
        repetition_time: seconds between two frames of the output.
        patch_length: frames of a patch; time is padded to a multiple of it.
        window_length: frames of a window.
        window: "first", "sliding" (every full window) or "full" (the whole scan).
        window_stride: frames from one sliding window to the next; `window_length` unless given.
        detrend_order: order of the polynomial drift that is removed; 0 removes the mean only.
        clip: largest absolute z-score.
        cleaning: settings of `Cleaning` as a dict: high_pass and low_pass in Hz.
        max_missing_rois: largest share of an atlas' ROIs that a scan may lack.
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
        cleaning: dict[str, Any] | None = None,
        max_missing_rois: float = 0.2,
        parcel_files: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # kept as plain dicts, because attributes are what is saved
        self.atlases = []
        # not saved as attributes: paths are read when a volume or a surface comes
        self._parcels: dict[str, Parcels | str] = dict(parcel_files or {})
        for atlas in atlases or []:
            self.add_atlas(atlas)
        if not TR_RANGE[0] < repetition_time < TR_RANGE[1]:
            raise ValueError(f"repetition_time must be in {TR_RANGE} seconds, got {repetition_time}")
        if patch_length < 1 or window_length < patch_length:
            raise ValueError(f"expected 1 <= patch_length <= window_length, got {patch_length} and {window_length}")
        if detrend_order < 0 or clip <= 0:
            raise ValueError(f"expected detrend_order >= 0 and clip > 0, got {detrend_order} and {clip}")
        if not 0 <= max_missing_rois <= 1:
            raise ValueError(f"expected max_missing_rois from 0 to 1, got {max_missing_rois}")
        Cleaning.from_dict(cleaning)
        _check_window(window, window_stride)
        self.repetition_time = repetition_time
        self.patch_length = patch_length
        self.window_length = window_length
        self.window = window
        self.window_stride = window_stride
        self.detrend_order = detrend_order
        self.clip = clip
        self.cleaning = cleaning
        self.max_missing_rois = max_missing_rois

    def add_atlas(self, atlas: Atlas | dict[str, Any]) -> None:
        """From now on this extractor knows the atlas, and saves it."""
        known = Atlas.resolve(atlas)
        names = [*(each["name"] for each in self.atlases), known.name]
        if len(set(names)) < len(names):
            raise ValueError(f"expected atlases of different names, got {names}")
        checksum = atlas.get("parcels_checksum") if isinstance(atlas, dict) else None
        if known.parcels is not None:
            self._parcels[known.name], checksum = known.parcels, known.parcels.checksum
        self.atlases.append(known.to_dict() | ({} if checksum is None else {"parcels_checksum": checksum}))

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
            atlas["name"]: cached_file(source, f"{PARCELS_FOLDER}/{Atlas.from_dict(atlas).name}.npz", **options)
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
        known = next((atlas for atlas in self.atlases if atlas["name"] == name), None)
        if known is None:
            raise ValueError(f"unknown atlas {name!r}; this feature extractor knows: {_sized(self.atlases)}")
        return Atlas.from_dict(known, self._known_parcels(name))

    def __call__(
        self,
        scans: Any,
        tr: float | None = None,
        atlas: str | Atlas | None = None,
        label_image: Any = None,
        window: str | None = None,
        window_stride: int | None = None,
        return_tensors: str | None = "pt",
        return_windows: bool = False,
    ) -> BatchFeature:
        """Prepare one scan, a list of scans, or a batch of rows of a dataset (`dataset[:2]`, a dict of columns).

        A scan is a path, a nibabel image, a value of `datasets.Nifti`, an array or tensor [time, rois], or a dict
        with "signal" (one of these, or a pair of paths: left and right hemisphere), "tr" and "atlas". A dict may
        bring "confounds" (array [time, confounds], table or its path), which are regressed out, and "censored" (bool
        [time]), frames to do without: they are interpolated and left out of every estimate. They stay True in
        `fmri_mask`, where holes would shift patches. A ROI whose series is NaN or constant throughout, such as one
        outside of a volume's field of view, or that a table with names lacks, is missing: it is masked.

        Args:
            tr: repetition time of the scans in seconds; goes before the one in a file's sidecar or header.
            atlas: name of a known or well-known atlas, path of its table, or an Atlas. May be left out if only one is
                known; and of a volume or surface, for which the first one is taken that has parcels there.
            label_image: the atlas' parcels in the scan's own space, in place of its own; see `read_parcels`.
            return_windows: also return what was read.

        Returns:
            `fmri_values` float32 [batch, rois, time]; `roi_coordinates` float32 [batch, rois, 3] (MNI, mm);
            `fmri_mask` bool [batch, rois, time], False where ROIs are missing or padding, or frames are padding
            (values 0 there); `scan_index` int64 [batch] with sliding windows; and on demand `windows`, a dict of each
            item: "scan" (its index), "atlas", "start", "stop" and "scan_seconds" (s), "frames", "rois" (how many were
            read) and "missing_rois" (names).
        """
        window = self.window if window is None else window
        window_stride = self.window_stride if window_stride is None else window_stride
        _check_window(window, window_stride)
        if _is_batch(scans):
            scans = _rows(scans)
        scans = list(scans) if isinstance(scans, (list, tuple)) else [scans]
        if not scans:
            raise ValueError("expected at least one scan, got an empty list")

        items: list[tuple[np.ndarray, Atlas]] = []
        windows: list[dict[str, Any]] = []
        for number, scan in enumerate(scans):
            signal, scan_atlas = self.prepare_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
            missing = np.flatnonzero(np.isnan(signal).all(axis=0))
            interval, seconds = self.repetition_time, len(signal) * self.repetition_time
            read = {
                "scan": number,
                "scan_seconds": seconds,
                "atlas": scan_atlas.name,
                "rois": len(scan_atlas) - len(missing),
                "missing_rois": [scan_atlas.rois[roi] for roi in missing],
            }
            if window == "first" and len(signal) > self.window_length:
                first = self.window_length * interval
                warn_once(f"of scans of {seconds:g} s, the first {first:g} s are read, window='first'")
            stride = self.window_length if window_stride is None else window_stride
            for start, stop in window_bounds(len(signal), window, self.window_length, stride):
                items.append((signal[start:stop], scan_atlas))
                windows.append({**read, "start": start * interval, "stop": stop * interval, "frames": stop - start})

        data = self._pad(items)
        if window == "sliding":
            data["scan_index"] = np.array([item["scan"] for item in windows], dtype=np.int64)
        features = BatchFeature(data, tensor_type=return_tensors)
        if return_windows:
            features["windows"] = windows
        return features

    def prepare_signal(
        self, scan: Any, tr: float | None = None, atlas: str | Atlas | None = None, label_image: Any = None
    ) -> tuple[np.ndarray, Atlas]:
        """One scan before windowing: float32 [time, rois] at `repetition_time`, robust z-scores; and its atlas.

        Missing ROIs are NaN.
        """
        read = self.read_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
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
        # also what was a drift and nothing else
        constant = _is_constant(interquartile_range(cleaned[kept]), read.signal)
        self._check_missing(read.missing | constant, read.atlas)
        return robust_zscore(np.where(constant, np.nan, cleaned), self.clip, kept).astype(np.float32), read.atlas

    def read_signal(
        self, scan: Any, tr: float | None = None, atlas: str | Atlas | None = None, label_image: Any = None
    ) -> MeasuredScan:
        """One scan as it was measured, parcellated but not cleaned; missing ROIs are NaN."""
        confounds, censored = None, None
        # rows that `map` hands out are no dicts
        while isinstance(scan, Mapping) and not is_scan_file(scan):
            if _is_batch(scan):
                raise ValueError(
                    f"expected one scan, got a batch of rows: a dict with the columns {', '.join(map(str, scan))}; "
                    "give a list of rows, or the batch to the feature extractor"
                )
            if scan.get("signal") is None:
                raise ValueError(f"a scan given as dict needs 'signal', got keys {sorted(scan)}")
            tr = _agree("tr", tr, scan.get("tr"))
            atlas = _agree("atlas", atlas, scan.get("atlas"))
            confounds = scan.get("confounds") if confounds is None else confounds
            censored = scan.get("censored") if censored is None else censored
            scan = scan["signal"]

        file = read_scan(scan) if is_scan_file(scan) else None
        if file is not None:
            # before a large file is read
            tr = _file_tr(file, tr)
        found = self._resolve_atlas(atlas, label_image, scan if file is None else file)
        signal = _as_float_array(scan if file is None else self._roi_signal(file, found))
        self._check_shape(signal, found)
        tr = _check_tr(tr)
        with np.errstate(invalid="ignore"):
            missing = np.isnan(signal).all(axis=0) | _is_constant(np.ptp(signal, axis=0), signal)
        signal[:, missing] = np.nan
        self._check_missing(missing, found)
        _check_finite(signal, missing, found)
        return MeasuredScan(signal, tr, found, confounds, censored)

    def num_patches(self, fmri_mask: np.ndarray | torch.Tensor) -> list[int]:
        """Patches per item, from the mask bool [batch, rois, time]; a tail counts as one."""
        frames = np.asarray(fmri_mask).any(axis=1).sum(axis=1)
        return [math.ceil(int(valid) / self.patch_length) for valid in frames]

    def _resolve_atlas(self, atlas: Any, label_image: Any, scan: Any) -> Atlas:
        """The atlas of what `read_scan` found, or of an array."""
        on_grid = hasattr(scan, "tr") and not hasattr(scan, "rois")
        if atlas is None:
            atlas = self._only_atlas(scan, on_grid)
        known = next((known for known in self.atlases if isinstance(atlas, str) and known["name"] == atlas), atlas)
        try:
            return Atlas.resolve(known, label_image, parcels=on_grid)
        except ValueError as error:
            if known is not atlas or not isinstance(atlas, str):
                raise
            message = str(error).rstrip(".")
            raise ValueError(f"{message}. This feature extractor knows: {_sized(self.atlases)}") from error

    def _only_atlas(self, scan: Any, on_grid: bool) -> dict[str, Any]:
        """The known atlas of a scan that comes without one."""
        if len(self.atlases) == 1:
            return self.atlases[0]
        if on_grid:
            what, fitting = "with parcels there", [atlas for atlas in self.atlases if self._lies_in(atlas, scan)]
            if fitting:
                others = f"; it also has: {_sized(fitting[1:])}" if fitting[1:] else ""
                warn_once(f"using the atlas {fitting[0]['name']!r}, whose parcels this model has{others}")
                return fitting[0]
        else:
            rois = np.shape(getattr(scan, "values", scan))[-1:]
            what, fitting = "that fit the scan", [atlas for atlas in self.atlases if (len(atlas["rois"]),) == rois]
        raise ValueError(
            f"which atlas are the scan's ROIs from? Give it (atlas=..., or --atlas); known: {_sized(self.atlases)}; "
            f"{what}: {_sized(fitting)}; well-known ones that fit: {', '.join(fitting_atlases(scan)) or 'none'}"
        )

    def _lies_in(self, atlas: dict[str, Any], scan: Any) -> bool:
        """Whether the parcels of a known atlas are labels of a volume, or of the mesh of a surface scan."""
        parcels = self._known_parcels(atlas["name"])
        if parcels is None or hasattr(scan, "stored"):
            return parcels is not None and parcels.volume is not None
        return any(parcels.left is not None and part.mesh == len(parcels.left) for part in scan.structures)

    def _roi_signal(self, file: Any, atlas: Atlas) -> np.ndarray:
        """Series [time, rois] of what `read_scan` found: its columns by name, or the means of its parcels."""
        if hasattr(file, "rois"):
            if file.rois is not None:
                return _select_columns(file, atlas)
            if not file.name.endswith(".npy"):
                warn_once(f"tables without ROI names are taken in the order of the atlas {atlas.name!r}")
            return file.values
        parcels = self._known_parcels(atlas.name) if atlas.parcels is None else atlas.parcels
        if parcels is None:
            raise ValueError(
                f"{file.name}: volumes and surfaces need parcels, and atlas {atlas.name!r} has none: use "
                f"Atlas.load({atlas.name!r}, parcels=True) or Atlas.from_image(...), or give a label image "
                f"(label_image=..., or --label-image); known with "
                f"parcels: {_sized([known for known in self.atlases if known.get('parcels_checksum')])}"
            )
        return parcellate(file, parcels, atlas.labels)

    def _check_shape(self, signal: np.ndarray, atlas: Atlas) -> None:
        expected = f"expected [time, rois] = [*, {len(atlas)}] for atlas {atlas.name!r}, got {signal.shape}"
        if signal.ndim != 2:
            raise ValueError(f"{expected}: not two-dimensional")
        if signal.shape[1] != len(atlas):
            if signal.shape[0] == len(atlas):
                raise ValueError(f"{expected}: transposed?")
            known = [known["name"] for known in self.atlases if len(known["rois"]) == signal.shape[1]]
            names = ", ".join(sorted({*known, *Atlas.names_of(signal.shape[1])})) or "none"
            raise ValueError(
                f"{expected}: {signal.shape[1]} ROIs instead of {len(atlas)}; known atlases of that many: {names}"
            )
        if len(signal) == 0:
            raise ValueError(f"{expected}: no frames")

    def _check_missing(self, missing: np.ndarray, atlas: Atlas) -> None:
        if missing.all() or missing.mean() > self.max_missing_rois:
            first = atlas.rois[int(np.flatnonzero(missing)[0])]
            raise ValueError(
                f"{missing.sum()} of the {len(atlas)} ROIs of {atlas.name!r} are missing, such as {first} (absent, "
                f"NaN or constant throughout); expected at most {self.max_missing_rois:.0%} (max_missing_rois)"
            )
        if missing.any():
            warn_once(f"scans lack ROIs of {atlas.name!r} (absent, NaN or constant throughout): they are masked")

    def clean_signal(self, read: MeasuredScan) -> tuple[np.ndarray, np.ndarray]:
        """Cleaned at its own repetition time, float64 [time, rois], and the frames that were kept, bool [time]."""
        settings = Cleaning.from_dict(self.cleaning)
        return clean(read.signal, read.tr, self.detrend_order, settings, read.confounds, read.censored)

    def _pad(self, items: list[tuple[np.ndarray, Atlas]]) -> dict[str, np.ndarray]:
        rois = max(len(atlas) for _, atlas in items)
        patches = max(math.ceil(len(signal) / self.patch_length) for signal, _ in items)
        values = np.zeros((len(items), rois, patches * self.patch_length), dtype=np.float32)
        coordinates = np.zeros((len(items), rois, 3), dtype=np.float32)
        mask = np.zeros(values.shape, dtype=bool)
        for i, (signal, atlas) in enumerate(items):
            values[i, : len(atlas), : len(signal)] = np.nan_to_num(signal.T)
            coordinates[i, : len(atlas)] = atlas.coordinates
            mask[i, : len(atlas), : len(signal)] = ~np.isnan(signal.T)
        return {"fmri_values": values, "roi_coordinates": coordinates, "fmri_mask": mask}


def _is_column(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0


def _is_batch(scan: Any) -> bool:
    """Whether it is a batch of rows as a dict of columns: where one scan has a TR, an atlas, a signal, it has many."""
    if not isinstance(scan, Mapping):
        return False
    signals: Any = scan.get("signal")
    first: Any = signals[0] if _is_column(signals) and len(signals) else None
    given_by_row = _is_column(scan.get("tr")) or _is_column(scan.get("atlas"))
    return given_by_row or isinstance(first, dict) or np.ndim(first) == 2


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {name: len(column) if _is_column(column) else None for name, column in batch.items()}
    (size, *others) = set(sizes.values())
    if others or size is None:
        raise ValueError(f"expected a batch of rows with columns of one length, got {sizes}")
    return [{name: column[row] for name, column in batch.items()} for row in range(size)]


def _agree(what: str, argument: Any, own: Any) -> Any:
    """The value that is given, once or twice alike; a scan's own value and the call's must not contradict."""
    if argument is None or own is None:
        return own if argument is None else argument
    # as a checkpoint or a row of a dataset holds it
    argument, own = (Atlas.from_dict(value) if isinstance(value, dict) else value for value in (argument, own))
    if isinstance(argument, str) != isinstance(own, str):
        # a name and an atlas of that name agree; the atlas has the ROIs
        argument, own = sorted((argument, own), key=lambda value: isinstance(value, str))
        same = argument.name == own
    else:
        same = argument.checksum == own.checksum if isinstance(argument, Atlas) else argument == own
    if not same:
        raise ValueError(f"{what} given twice and differently: {argument!r} and {own!r}")
    return argument


def _check_tr(tr: float | None, what: str = "tr") -> float:
    if tr is None:
        raise ValueError(f"the scan's repetition time is not known: {GIVE_TR}")
    if not TR_RANGE[0] < tr < TR_RANGE[1]:
        hint = "; milliseconds?" if tr >= TR_RANGE[1] else ""
        raise ValueError(f"{what} must be in {TR_RANGE} seconds, got {tr:g}{hint}")
    # a tensor of a dataset's row
    return float(tr)


def _as_float_array(scan: Any) -> np.ndarray:
    if isinstance(scan, torch.Tensor):
        scan = scan.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(scan)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected a signal of real numbers, got {type(scan).__name__} of dtype {array.dtype}")
    return array.astype(np.float64)


def _select_columns(table: Any, atlas: Atlas) -> np.ndarray:
    """
    Columns of a table in the atlas' order, found by name or label. Those that are not in the atlas are left out; ROIs
    that a table of ROIs of this atlas lacks are NaN.
    """
    position = {name: i for i, name in enumerate(table.rois)}
    if len(position) < len(table.rois):
        raise ValueError(f"{table.name}: expected {len(table.rois)} different column names, got {len(position)}")
    names = atlas.rois
    numbered = {name: i for name, i in position.items() if name not in FRAME_COLUMNS}
    if not set(names) <= set(position) and numbered and all(name.isdecimal() for name in numbered):
        values = table.values[:, list(numbered.values())]
        if len(numbered) != len(atlas):
            # the labels of a part of the columns could be those of another atlas
            return values
        names = tuple(str(label) for label in atlas.labels)
        if set(names) != set(numbered):
            warn_once(f"tables whose columns have numbers that are no labels of {atlas.name!r} are taken in its order")
            return values
    if missing := [name for name in names if name not in position]:
        unknown = [name for name in table.rois if name not in {*names, *FRAME_COLUMNS}]
        if unknown or len(missing) == len(names):
            raise ValueError(
                f"{table.name}: {len(missing)} of the {len(atlas)} ROIs of {atlas.name!r} are not among the "
                f"{len(table.rois)} columns: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; columns "
                f"that the atlas does not have: {', '.join(unknown[:5]) or 'none'}"
                f"{', ...' if len(unknown) > 5 else ''}"
            )
    absent = np.full(len(table.values), np.nan, table.values.dtype)
    return np.stack([table.values[:, position[name]] if name in position else absent for name in names], axis=1)


def _is_constant(spread: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """bool [rois]: whether the spread [rois] of what [time, rois] was is rounding."""
    return np.isfinite(spread) & (spread <= CONSTANT_BELOW * np.abs(signal).max(axis=0))


def _file_tr(file: Any, tr: float | None) -> float:
    """The given TR, else that of the file, in s."""
    if tr is None:
        if file.tr_from == "header" and (not file.tr or not TR_RANGE[0] < file.tr < TR_RANGE[1]):
            found = f"no usable one ({file.tr:g} s)" if file.tr else "none"
            raise ValueError(
                f"{file.name}: the scan's repetition time is not known: its header has {found}, and no sidecar "
                f"(.json) with RepetitionTime is beside it; {GIVE_TR}"
            )
        return _check_tr(file.tr, f"{file.tr_from}: RepetitionTime")
    if file.tr is not None and abs(tr - file.tr) > 1e-3:
        warn_once(f"using tr={tr:g} s as given, although the file's {file.tr_from} has {file.tr:g} s")
    return _check_tr(tr)


def _sized(atlases: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{atlas['name']} ({len(atlas['rois'])} ROIs)" for atlas in atlases) or "none"


def _check_finite(signal: np.ndarray, missing: np.ndarray, atlas: Atlas) -> None:
    bad = ~np.isfinite(signal) & ~missing
    if bad.any():
        first = int(np.flatnonzero(bad.any(axis=0))[0])
        raise ValueError(
            f"{int(bad.sum())} of {signal.size} values are NaN or infinite, the first ROI with one is "
            f"{atlas.rois[first]!r} (column {first}); expected finite numbers"
        )


def _check_window(window: str, window_stride: int | None) -> None:
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {WINDOWS}, got {window!r}")
    if window_stride is not None and window_stride < 1:
        raise ValueError(f"window_stride must be at least 1 frame, got {window_stride}")


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
