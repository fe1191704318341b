"""Codes of many scans: prepared, cut into windows and encoded shard by shard, each only once."""

from collections import defaultdict
from collections.abc import Sequence
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
    steps. Codes are kept in `cache`. ValueError for a scan that cannot be read,.

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
                codes += _encode(codec, [_windows(row, atlases, extractor, stride) for row in shard], cache)
                progress.update(len(shard))
    return EncodedScans(known, codes)


def _windows(
    row: dict, atlases: dict[str, Atlas], extractor: FmriLMFeatureExtractor, stride: int
) -> list[dict[str, np.ndarray]]:
    """Windows of a scan as `collate_signals` takes them."""
    atlas = atlases[str(row["atlas"])]
    scan = {name: row[name] for name in ("signal", "tr", "censored") if name in row}
    signal, _ = extractor.prepare_signal(scan, atlas=atlas)
    present = ~np.isnan(signal).any(0)
    length = min(extractor.window_length, len(signal) // extractor.patch_length * extractor.patch_length)
    return [
        {
            "signal": signal[first : first + length, present],
            "coordinates": atlas.coordinates[present],
            "descriptors": np.zeros(0, np.float32),
        }
        for first in range(0, len(signal) - length + 1, stride)
    ]


def _encode(
    codec: FmriCodecModel, scans: Sequence[list[dict[str, np.ndarray]]], cache: Path
) -> list[list[np.ndarray]]:
    """Codes of the scans' windows, those of one length together."""
    by_length = defaultdict(list)
    for scan, windows in enumerate(scans):
        for window in windows:
            by_length[len(window["signal"])].append((scan, window))
    codes: list[list[np.ndarray]] = [[] for _ in scans]
    for members in by_length.values():
        rows = cached_codes(codec, [window for _, window in members], cache)
        for (scan, _), row in zip(members, rows, strict=True):
            codes[scan].append(row[row >= 0])
    return codes
