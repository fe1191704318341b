"""Codes of many scans: prepared, cut into windows and encoded shard by shard, each only once."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import Atlas, FmriLMFeatureExtractor

from .code_cache import cached_codes


SHARD = 64
SIGNAL_COLUMNS = ("signal", "tr", "atlas", "censored")


@dataclass(frozen=True)
class EncodedScans:
    """rows: what is known about each scan, without its signal. codes: of each scan's windows, int64 [tokens] each."""

    rows: list[dict]
    codes: list[list[np.ndarray]]

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Scan and number of each window."""
        return [(scan, window) for scan, codes in enumerate(self.codes) for window in range(len(codes))]


def encode_scans(
    codec: FmriCodecModel,
    parts: Sequence[Dataset],
    atlases: dict[str, Atlas],
    extractor: FmriLMFeatureExtractor,
    stride: int,
    cache: Path,
) -> EncodedScans:
    """
    Windows of `extractor.window_length` frames at each `stride` frames of each scan; of a shorter scan, all its whole
    steps. Codes are kept in `cache`. ValueError for a scan that cannot be read.

    parts: rows of scans, those of one part with equally many ROIs.
    """
    known: list[dict] = []
    codes: list[list[np.ndarray]] = []
    with tqdm(desc="codes", unit="scan", total=sum(map(len, parts))) as progress:
        for part in parts:
            names = [name for name in part.column_names if name not in ("signal", "censored")]
            known += part.select_columns(names).to_list()
            signals = part.select_columns([name for name in SIGNAL_COLUMNS if name in part.column_names])
            for start in range(0, len(part), SHARD):
                shard: Any = signals.skip(start).take(SHARD).with_format("numpy")
                windows = [_windows(row, atlases, extractor, stride) for row in shard]
                codes += encode_by_length(windows, lambda items: cached_codes(codec, items, cache))
                progress.update(len(shard))
    return EncodedScans(known, codes)


def _windows(
    row: dict, atlases: dict[str, Atlas], extractor: FmriLMFeatureExtractor, stride: int
) -> list[dict[str, np.ndarray]]:
    atlas = atlases[str(row["atlas"])]
    scan = {name: row[name] for name in ("signal", "tr", "censored") if name in row}
    signal, _ = extractor.prepare_signal(scan, atlas=atlas)
    return scan_items(signal, atlas, extractor.patch_length, extractor.window_length, stride)


def scan_items(
    signal: np.ndarray, atlas: Atlas, patch_length: int, window_length: int, stride: int
) -> list[dict[str, np.ndarray]]:
    """Windows of a scan [time, rois] as `collate_signals` takes them; of a shorter one, all its whole steps."""
    present = ~np.isnan(signal).any(0)
    length = min(window_length, len(signal) // patch_length * patch_length)
    return [
        {
            "signal": signal[first : first + length, present],
            "coordinates": atlas.coordinates[present],
            "descriptors": np.zeros(0, np.float32),
        }
        for first in range(0, len(signal) - length + 1, stride)
    ]


def encode_by_length(
    scans: Sequence[list[dict[str, np.ndarray]]], encode: Callable[[list[dict[str, np.ndarray]]], np.ndarray]
) -> list[list[np.ndarray]]:
    """Codes int64 [tokens] of each scan's windows, those of one length encoded together."""
    by_length = defaultdict(list)
    for scan, windows in enumerate(scans):
        for window in windows:
            by_length[len(window["signal"])].append((scan, window))
    codes: list[list[np.ndarray]] = [[] for _ in scans]
    for members in by_length.values():
        rows = encode([window for _, window in members])
        for (scan, _), row in zip(members, rows, strict=True):
            codes[scan].append(row[row >= 0])
    return codes
