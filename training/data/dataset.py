"""Scans on their way to the three stages: preparation, split by subject, windows, mixing augmentation."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.processors.descriptors.networks import membership

from .open_data import Scan


# of the items of `MixedWindows`: scans as they are
PLAIN_SHARE = 0.3


class DamagedShard(ValueError):
    """A Parquet file that cannot be read."""


@dataclass(frozen=True)
class PreparedScan:
    """A scan as the models see it. signal: float32 [time, rois], robust z-scores at the codec's repetition time."""

    signal: np.ndarray
    atlas: Atlas
    dataset: str
    subject: str
    session: str


@dataclass(frozen=True)
class Window:
    """A stretch of a scan. signal: [window_length, rois]; descriptors: `CORE_NAMES`, NaN where absent."""

    signal: np.ndarray
    descriptors: np.ndarray
    scan: PreparedScan
    start: int


def prepare_scans(scans: Sequence[Scan], extractor: FmriLMFeatureExtractor) -> list[PreparedScan]:
    prepared = []
    for scan in scans:
        signal, atlas = extractor.prepare_signal(scan.signal, tr=scan.tr, atlas=scan.atlas)
        prepared.append(PreparedScan(signal, atlas, scan.dataset, scan.subject, scan.session))
    return prepared


def load_prepared(folder: Path, extractor: FmriLMFeatureExtractor) -> list[PreparedScan]:
    """Scans that `fmrilm prepare` wrote. Those of one site are one dataset; without sites, all of the folder are."""
    return [scan for shard, atlas in prepared_shards(folder) for scan in read_shard(shard, atlas, extractor)]


def prepared_shards(folder: Path) -> list[tuple[Path, Atlas]]:
    """The Parquet files of a folder that `fmrilm prepare` wrote, each with the atlas of its scans."""
    shards = []
    for table in sorted((folder / "atlases").glob("*.json")):
        atlas = Atlas.from_dict(json.loads(table.read_text(encoding="utf-8")))
        shards += [(shard, atlas) for shard in sorted((folder / atlas.name).glob("*.parquet"))]
    if not shards:
        raise ValueError(f"no prepared scans in {folder}: expected a folder that `fmrilm prepare` wrote")
    return shards


def read_shard(
    shard: Path, atlas: Atlas, extractor: FmriLMFeatureExtractor, rows: np.ndarray | None = None
) -> list[PreparedScan]:
    """Scans of one Parquet file of a prepared folder, or those in the given rows; a damaged one is named."""
    try:
        table = pq.read_table(shard, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DamagedShard(f"{shard.parent.name}/{shard.name} is damaged: {error}") from error
    prepared = []
    row: Any
    for row in datasets.Dataset(table if rows is None else table.take(rows)).with_format("numpy"):
        scan = {key: row[key] for key in ("signal", "tr", "censored")}
        signal, _ = extractor.prepare_signal(scan, atlas=atlas)
        dataset = row["site"] or shard.parents[1].name
        prepared.append(PreparedScan(signal, atlas, dataset, row["subject"], row["session"] or ""))
    return prepared


def split_subjects(
    scans: Sequence[PreparedScan], held_out: dict[str, int]
) -> tuple[list[PreparedScan], list[PreparedScan]]:
    """Training and held-out scans of few people: the last subjects of each dataset by name, `held_out[dataset]`."""
    subjects = defaultdict(set)
    for scan in scans:
        subjects[scan.dataset].add(scan.subject)
    away = set()
    for dataset, members in subjects.items():
        count = held_out.get(dataset, 0)
        if count > len(members):
            raise ValueError(f"expected at most {len(members)} subjects to hold out of {dataset!r}, got {count}")
        away.update((dataset, subject) for subject in sorted(members)[len(members) - count :])
    training = [scan for scan in scans if (scan.dataset, scan.subject) not in away]
    return training, [scan for scan in scans if (scan.dataset, scan.subject) in away]


def cut_windows(scans: Sequence[PreparedScan], length: int, stride: int) -> list[Window]:
    """Every full window of `length` frames at each `stride` frames, with its descriptors."""
    windows = []
    for scan in scans:
        for start in range(0, len(scan.signal) - length + 1, stride):
            signal = scan.signal[start : start + length]
            windows.append(Window(signal, describe(signal, scan.atlas, CORE_MEASURES), scan, start))
    return windows


class MixedWindows(Dataset):
    """
    An endless supply of new connectivity patterns from few subjects: item i is sqrt(a) x one random window plus
    sqrt(1-a) x another of the same atlas plus white noise of random size in each ROI, or now and then a window as it
    is, with the descriptors computed from the result. At most `max_rois` ROIs of it, drawn at random, are given. Items
    depend on (seed, i) alone.
    """

    def __init__(
        self,
        scans: Sequence[PreparedScan],
        cohort: Cohort,
        window_length: int,
        max_rois: int | None,
        size: int,
        seed: int,
    ):
        self.groups = defaultdict(list)
        for scan in scans:
            self.groups[scan.atlas.name].append(scan)
        self.scans = list(scans)
        self.cohort = cohort
        self.window_length = window_length
        self.max_rois = max_rois
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        return self.mix(self.scans[rng.integers(len(self.scans))], rng)

    def mix(self, scan: PreparedScan, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An item whose first part is of this scan."""
        mixed = self._window(scan, rng) if rng.uniform() < PLAIN_SHARE else self._mixture(scan, rng)
        mixed = mixed / mixed.std(0)
        chosen = np.sort(rng.permutation(mixed.shape[1])[: self.max_rois])
        return {
            "signal": mixed[:, chosen].astype(np.float32),
            "coordinates": scan.atlas.coordinates[chosen],
            "descriptors": self.cohort.z_scores(self.cohort.describe(mixed, scan.atlas)).astype(np.float32),
        }

    def _mixture(self, scan: PreparedScan, rng: np.random.Generator) -> np.ndarray:
        group = self.groups[scan.atlas.name]
        share = rng.uniform() if rng.uniform() < 0.75 else 1.0
        mixed = np.sqrt(share) * self._window(scan, rng)
        mixed += np.sqrt(1 - share) * self._window(group[rng.integers(len(group))], rng)
        mixed += self._sources(scan, rng)
        return mixed + rng.uniform(0, 0.5) * rng.uniform(0, 1, mixed.shape[1]) * rng.standard_normal(mixed.shape)

    def _sources(self, scan: PreparedScan, rng: np.random.Generator) -> np.ndarray:
        """Zero to three series of other scans' ROIs, shared by the networks at random: [window_length, rois]."""
        count = rng.integers(4)
        series = np.zeros((self.window_length, count))
        for column in range(count):
            window = self._window(self.scans[rng.integers(len(self.scans))], rng)
            series[:, column] = window[:, rng.integers(window.shape[1])]
        members = membership(scan.atlas)
        weights = rng.normal(0, 0.4, (members.shape[1], count)) * (rng.uniform(size=(members.shape[1], count)) < 0.4)
        return series @ (members @ weights).T

    def _window(self, scan: PreparedScan, rng: np.random.Generator) -> np.ndarray:
        start = rng.integers(len(scan.signal) - self.window_length + 1)
        return scan.signal[start : start + self.window_length]


def collate_signals(items: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """
    Codec inputs from windows of one length and differing numbers of ROIs (padded and masked), with the embeddings of
    their descriptions where the items have them.
    """
    rois, time = max(item["signal"].shape[1] for item in items), len(items[0]["signal"])
    batch = {
        "fmri_values": torch.zeros(len(items), rois, time),
        "roi_coordinates": torch.zeros(len(items), rois, 3),
        "fmri_mask": torch.zeros(len(items), rois, time, dtype=torch.bool),
        "descriptors": torch.from_numpy(np.stack([item["descriptors"] for item in items])),
    }
    for row, item in enumerate(items):
        count = item["signal"].shape[1]
        batch["fmri_values"][row, :count] = torch.from_numpy(item["signal"].T)
        batch["roi_coordinates"][row, :count] = torch.tensor(item["coordinates"])
        batch["fmri_mask"][row, :count] = True
    if "text_embedding" in items[0]:
        batch["text_embeddings"] = torch.from_numpy(np.stack([item["text_embedding"] for item in items]))
    return batch
