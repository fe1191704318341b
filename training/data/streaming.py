"""Training on more scans than memory holds: one shard of a prepared folder at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset
from transformers.utils import logging

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort

from .dataset import DamagedShard, MixedWindows, PreparedScan, prepared_shards, read_shard
from .held_out import held_out_people


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ShardRows:
    """Some rows of one Parquet file, all of one atlas."""

    path: Path
    atlas: Atlas
    rows: np.ndarray


class ShardedScans:
    """
    The scans of a prepared folder, which stay on disk: which rows are to train on and which are held out.

    Args:
        held_out_share: of the subjects, see `held_out_people`.
        skip_broken: report a shard that cannot be read and go on without it, in place of `DamagedShard`.
    """

    def __init__(
        self, folder: Path, extractor: FmriLMFeatureExtractor, held_out_share: float, skip_broken: bool = False
    ):
        self.extractor = extractor
        self.skip_broken = skip_broken
        self.broken: set[Path] = set()
        sides: tuple[list[ShardRows], list[ShardRows]] = ([], [])
        for path, atlas in prepared_shards(folder):
            try:
                subjects = pq.read_table(path, columns=["subject"])["subject"].to_pylist()
            except (pa.ArrowException, OSError) as error:
                self.report(path, DamagedShard(f"{path.parent.name}/{path.name} is damaged: {error}"))
                continue
            is_away = np.isin(subjects, list(held_out_people(subjects, held_out_share)))
            for side, chosen in zip(sides, (~is_away, is_away), strict=True):
                if chosen.any():
                    side.append(ShardRows(path, atlas, np.flatnonzero(chosen)))
        self.training, self.held_out = sides

    def read(self, shard: ShardRows, frames: int) -> list[PreparedScan]:
        """Those of a shard's scans that have so many frames; none of a broken one that is skipped."""
        if shard.path in self.broken:
            return []
        try:
            scans = read_shard(shard.path, shard.atlas, self.extractor, shard.rows)
        except DamagedShard as error:
            self.report(shard.path, error)
            return []
        return [scan for scan in scans if len(scan.signal) >= frames]

    def sample(self, shards: Sequence[ShardRows], scans: int, frames: int, seed: int) -> list[PreparedScan]:
        """Up to so many scans, shard after shard in random order."""
        chosen: list[PreparedScan] = []
        for place in np.random.default_rng(seed).permutation(len(shards)):
            chosen += self.read(shards[place], frames)
            if len(chosen) >= scans:
                break
        return chosen[:scans]

    def report(self, path: Path, error: DamagedShard) -> None:
        if not self.skip_broken:
            raise error
        self.broken.add(path)
        logger.warning(f"skipped: {error}")


class StreamedMixtures(Dataset):
    """
    Items as `MixedWindows` makes them, the first part of which are the training scans in turn; the other parts are of
    scans of the same shard. Each epoch has an order of shards, and of scans within each, of its own.

    An item depends on the seed and its number alone, and neighbours are of one shard. So items are to be asked for in
    their order, and a run that was stopped goes on at the right scan without reading what came before: the Trainer
    skips numbers (the state of an iterable dataset it cannot restore).
    """

    def __init__(
        self, scans: ShardedScans, cohort: Cohort, window_length: int, max_rois: int | None, size: int, seed: int
    ):
        self.scans = scans
        self.cohort = cohort
        self.window_length = window_length
        self.max_rois = max_rois
        self.size = size
        self.seed = seed
        self.counts = np.array([len(shard.rows) for shard in scans.training])
        # what this process holds: the order of an epoch, and the scans of a shard
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self._mixtures: tuple[int, MixedWindows] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, int(self.counts.sum()))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
            self._order = epoch, order, np.cumsum(self.counts[order])
        _, order, ends = self._order
        turn = int(np.searchsorted(ends, place, side="right"))
        number, mixtures = self._shard(np.roll(order, -turn))
        # each scan of the shard once, in an order of this epoch
        scans = np.random.default_rng((self.seed, epoch, number)).permutation(len(mixtures.scans))
        scan = mixtures.scans[scans[int(ends[turn] - place - 1) % len(scans)]]
        return mixtures.mix(scan, np.random.default_rng((self.seed, index)))

    def _shard(self, order: np.ndarray) -> tuple[int, MixedWindows]:
        """The first shard in this order that can be read, and its mixtures."""
        for number in order:
            if self._mixtures is None or self._mixtures[0] != number:
                scans = self.scans.read(self.scans.training[number], self.window_length)
                if not scans:
                    continue
                made = MixedWindows(scans, self.cohort, self.window_length, self.max_rois, self.size, self.seed)
                self._mixtures = int(number), made
            return self._mixtures
        raise ValueError(f"expected scans of at least {self.window_length} frames to train on, got none")
