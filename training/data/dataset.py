"""Scans on their way to the three stages: read from Parquet, standardised once, cut into windows, encoded once."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Array2D, Dataset, Features, Value, concatenate_datasets, load_dataset
from tqdm import tqdm

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.processors.descriptors.networks import membership
from fmrilm.processors.scan_io_fmrilm import warn_once

from .scan_sources import one_name_each
from .shards import content_version, read_atlases, write_arrays
from .splits import subject_folds


SIGNAL_COLUMNS = ("signal", "censored")
# windows that are encoded and kept together
SHARD = 256
BATCH = 16
# of the items of `MixedWindows`: windows as they are
PLAIN_SHARE = 0.3
# signals that `MixedWindows` keeps in memory
SIGNALS_READ = 512


class Scans:
    """
    Scans of folders that `fmrilm prepare` or `fmrilm describe` wrote. Signals stay on disk, memory-mapped.

    Attributes: `table` (a row a scan without its signal: subject, site, atlas, labels, and of a corpus its texts),
    `atlases` by name.
    """

    def __init__(self, parts: dict[str, Dataset], table: pd.DataFrame, atlases: dict[str, Atlas], patch_length: int):
        """parts: standardised signals by atlas. table: its columns atlas and row say where a scan's signal is."""
        self.parts, self.table, self.atlases, self.patch_length = parts, table, atlases, patch_length

    def __len__(self) -> int:
        return len(self.table)

    def select(self, rows: Sequence[int] | np.ndarray) -> "Scans":
        table = self.table.iloc[list(rows)].reset_index(drop=True)
        atlases = {name: self.atlases[name] for name in table["atlas"].unique()}
        return Scans(self.parts, table, atlases, self.patch_length)

    def signal(self, scan: int) -> np.ndarray:
        """Robust z-scores float32 [time, rois] at the codec's repetition time; NaN where a ROI is missing."""
        row: Any = self.parts[self.table.at[scan, "atlas"]][int(self.table.at[scan, "row"])]
        return np.asarray(row["signal"], np.float32)

    def atlas(self, scan: int) -> Atlas:
        return self.atlases[self.table.at[scan, "atlas"]]

    @property
    def main_atlas(self) -> str:
        """Name of the atlas that most scans have."""
        return str(self.table["atlas"].mode()[0])

    @property
    def fingerprint(self) -> str:
        """Changes with the signals and with which scans these are."""
        digest = hashlib.sha256(json.dumps(self.table[["atlas", "row"]].to_numpy().tolist()).encode())
        for name in sorted(self.atlases):
            # the datasets library's own fingerprint of what a part holds
            digest.update(self.parts[name]._fingerprint.encode())
        return digest.hexdigest()[:16]


def load_scans(folders: str | Path | Sequence[str | Path], extractor: FmriLMFeatureExtractor) -> Scans:
    """
    The scans of folders that `fmrilm prepare` or `fmrilm describe` wrote, standardised by the extractor once and kept
    in the cache of `datasets`. The column `dataset` names scans of one site, or without sites of one folder.
    """
    listed = [folders] if isinstance(folders, str | Path) else list(folders)
    if not listed:
        raise ValueError("expected a folder that `fmrilm prepare` or `fmrilm describe` wrote, got none")
    signals: dict[str, list[Dataset]] = {}
    tables, atlases = [], {}
    for number, folder in enumerate(map(Path, listed)):
        for atlas, shards in _shards(folder, extractor):
            if atlases.setdefault(atlas.name, atlas).checksum != atlas.checksum:
                raise ValueError(f"expected one atlas {atlas.name!r}, got another one of that name in {folder.name}")
            if atlases[atlas.name].parcels is None:
                atlases[atlas.name] = atlas
            rows = _read(shards)
            signals.setdefault(atlas.name, []).append(_standardised(rows, atlas, extractor))
            known = [name for name in rows.column_names if name not in SIGNAL_COLUMNS]
            table = pd.DataFrame(rows.select_columns(known).to_list())
            table["frames"] = signals[atlas.name][-1]["frames"][:]
            table["atlas"] = atlas.name
            # each corpus numbers its scans
            table["folder"] = number
            site = table["site"] if "site" in table else pd.Series([None] * len(table))
            table["dataset"] = site.where(site.notna(), folder.name)
            tables.append(table)
    parts = {name: part[0] if len(part) == 1 else concatenate_datasets(part) for name, part in signals.items()}
    table = pd.concat(tables, ignore_index=True)
    table["subject"] = one_name_each(table["subject"])
    # the parts of an atlas come in the order of their tables
    table["row"] = table.groupby("atlas").cumcount()
    scans, kept = Scans(parts, table, atlases, extractor.patch_length), table["frames"] >= extractor.patch_length
    if not kept.to_numpy().any():
        raise ValueError(f"expected scans of at least a patch, {extractor.patch_length} frames, got none")
    if kept.to_numpy().all():
        return scans
    warn_once(f"{len(scans) - kept.sum()} scans of less than a patch, {extractor.patch_length} frames, are left out")
    return scans.select(np.flatnonzero(kept))


def _shards(folder: Path, extractor: FmriLMFeatureExtractor) -> Iterator[tuple[Atlas, list[Path]]]:
    """Parquet files of a folder by atlas."""
    found = sorted(path.parent for path in folder.glob("*/*.parquet"))
    if not found:
        raise ValueError(
            f"no prepared scans in {folder}: expected a folder that `fmrilm prepare` or `fmrilm describe` wrote"
        )
    known = {atlas["name"]: Atlas.from_dict(atlas) for atlas in extractor.atlases} | read_atlases(folder)
    for place in dict.fromkeys(found):
        shards = sorted(place.glob("*.parquet"))
        name = _parquet(lambda first=shards[0]: pq.read_table(first, columns=["atlas"]), shards[0])["atlas"][0].as_py()
        yield known[name] if name in known else Atlas.load(name), shards


def _parquet(read: Any, path: Path) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is damaged: {error}") from error


def _read(shards: list[Path]) -> Dataset:
    """The rows of Parquet files, memory-mapped from the cache of `datasets`."""
    try:
        rows: Any = load_dataset(
            "parquet",
            # the same names in another folder, or written anew, are other rows
            name=f"scans-{content_version(shards)}",
            data_files=[str(path) for path in shards],
            split="train",
        )
        return rows
    except Exception as error:
        for path in shards:
            _parquet(lambda path=path: pq.read_table(path, page_checksum_verification=True), path)
        raise ValueError(f"{shards[0].parent} cannot be read: {error}") from error


def _standardised(rows: Dataset, atlas: Atlas, extractor: FmriLMFeatureExtractor) -> Dataset:
    """Signals as the codec takes them, {"signal", "frames"}, kept in the cache of `datasets`."""
    # `prepare` refused the scans that lack too much
    # what a signal depends on: not how it is cut afterwards, nor who holds the extractor
    kept = ("repetition_time", "detrend_order", "clip", "cleaning")
    known = extractor.to_dict()
    settings = {**{name: known[name] for name in kept}, "atlases": [atlas.to_dict()], "max_missing_rois": 1.0}
    own: Any = FmriLMFeatureExtractor.from_dict(settings)

    def standardise(row: dict[str, Any]) -> dict[str, Any]:
        scan = {name: row[name] for name in ("signal", "tr", "censored") if row.get(name) is not None}
        try:
            signal, _ = own.prepare_signal(scan, atlas=atlas)
        except ValueError as error:
            raise ValueError(f"scan of subject {row['subject']}: {error}") from error
        return {"signal": signal, "frames": len(signal)}

    digest = hashlib.sha256(json.dumps([rows._fingerprint, settings], default=str, sort_keys=True).encode())
    return (
        rows.with_format("numpy")
        .map(
            standardise,
            remove_columns=rows.column_names,
            features=Features({"signal": Array2D((None, len(atlas)), "float32"), "frames": Value("int64")}),
            new_fingerprint=digest.hexdigest()[:16],
            desc="standardising",
        )
        .with_format("numpy")
    )


@dataclass(frozen=True)
class Window:
    """A stretch of a scan. scan: row in `Scans`; start, length: frames."""

    scan: int
    start: int
    length: int


class Windows(Sequence[Window]):
    """Windows of scans, in the order of the scans."""

    def __init__(self, scans: Scans, windows: Sequence[Window]):
        self.scans, self.windows = scans, list(windows)
        self._read: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index):
        return self.windows[index]

    @property
    def fingerprint(self) -> str:
        places = [(window.scan, window.start, window.length) for window in self.windows]
        return hashlib.sha256(f"{self.scans.fingerprint} {places}".encode()).hexdigest()[:16]

    def signal(self, index: int) -> np.ndarray:
        """float32 [length, rois]; NaN where a ROI is missing."""
        window = self.windows[index]
        # the windows of a scan follow one another
        if self._read is None or self._read[0] != window.scan:
            self._read = window.scan, self.scans.signal(window.scan)
        return self._read[1][window.start : window.start + window.length]

    def item(self, index: int) -> dict[str, Any]:
        """{"signal": float32 [length, rois present], "coordinates": [rois present, 3]}."""
        return _item(self.signal(index), self.scans.atlas(self.windows[index].scan))

    def items(self) -> list[dict[str, Any]]:
        return [self.item(index) for index in range(len(self))]

    def descriptors(self) -> np.ndarray:
        """Core descriptors float64 [windows, names], NaN where absent."""
        return np.stack([core_descriptors(self.signal(i), self.scans.atlas(w.scan)) for i, w in enumerate(self)])


def cut_windows(scans: Scans, length: int, stride: int) -> Windows:
    """
    Every full window of `length` frames at each `stride` frames of each scan; of a shorter scan, all its whole
    patches. ValueError if no scan has a patch.
    """
    windows = []
    for scan, frames in enumerate(scans.table["frames"]):
        size = min(length, int(frames) // scans.patch_length * scans.patch_length)
        if size:
            windows += [Window(scan, start, size) for start in range(0, int(frames) - size + 1, stride)]
    if not windows and len(scans):
        raise ValueError(f"expected scans of at least one patch of {scans.patch_length} frames, got none")
    return Windows(scans, windows)


def _present(signal: np.ndarray, atlas: Atlas) -> tuple[np.ndarray, Atlas]:
    """The ROIs of a signal [time, rois] that are not missing, and the atlas of these alone."""
    missing = np.asarray(np.isnan(signal).any(0))
    return (signal[:, ~missing], atlas.without(missing)) if missing.any() else (signal, atlas)


def _item(signal: np.ndarray, atlas: Atlas) -> dict[str, Any]:
    signal, atlas = _present(signal, atlas)
    return {"signal": np.ascontiguousarray(signal, np.float32), "coordinates": atlas.coordinates}


def core_descriptors(signal: np.ndarray, atlas: Atlas) -> np.ndarray:
    """Core descriptors [names] of the ROIs of a signal [time, rois] that are not missing."""
    return describe(*_present(signal, atlas), CORE_MEASURES)


class MixedWindows(torch.utils.data.Dataset):
    """
    An endless supply of new connectivity patterns from few subjects: item i is sqrt(a) x one random window plus
    sqrt(1-a) x another of the same atlas plus white noise of random size in each ROI, or now and then a window as it
    is, with the descriptors computed from the result, as z-scores. At most `max_rois` ROIs of it, drawn at random, are
    given. Items depend on (seed, i) alone. Both windows, and all else, are of subjects of one fold of `subject_folds`;
    `subject` of an item is that of the first window, which has `length` frames or, of a shorter scan, all its whole
    patches.
    """

    def __init__(self, scans: Scans, length: int, cohort: Cohort, size: int, seed: int, max_rois: int | None = None):
        frames = scans.table["frames"].to_numpy() // scans.patch_length * scans.patch_length
        usable = np.flatnonzero(frames)
        if not len(usable):
            raise ValueError(f"expected a scan of at least {scans.patch_length} frames to mix windows of, got none")
        self.scans, self.frames = scans.select(usable), np.minimum(frames[usable], length)
        # a mixture is of one fold's subjects: what is fitted without this fold has seen nothing of it
        self.folds = subject_folds(scans.table["subject"].to_numpy(), seed)[usable]
        self.atlases = self.scans.table["atlas"].to_numpy()
        # the signals that were read last
        self._read: dict[int, np.ndarray] = {}
        self.cohort, self.size, self.seed, self.max_rois = cohort, size, seed, max_rois
        self._fingerprint = f"{scans.fingerprint} {length} {size} {seed} {max_rois} {cohort.mean.tobytes().hex()}"

    def __len__(self) -> int:
        return self.size

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._fingerprint.encode()).hexdigest()[:16]

    def item(self, index: int) -> dict[str, Any]:
        return self[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        scan = int(rng.integers(len(self.scans)))
        atlas = self.scans.atlas(scan)
        plain = rng.uniform() < PLAIN_SHARE
        mixed = self._window(scan, self.frames[scan], rng) if plain else self._mixture(scan, atlas, rng)
        # ROIs that either window has not are missing
        mixed, atlas = _present(mixed / mixed.std(0), atlas)
        chosen = np.sort(rng.permutation(mixed.shape[1])[: self.max_rois])
        return {
            "signal": mixed[:, chosen].astype(np.float32),
            "coordinates": atlas.coordinates[chosen],
            "descriptors": self.cohort.z_scores(core_descriptors(mixed, atlas)).astype(np.float32),
            "subject": self.scans.table.at[scan, "subject"],
        }

    def _mixture(self, scan: int, atlas: Atlas, rng: np.random.Generator) -> np.ndarray:
        length = self.frames[scan]
        # those that a window as long can be cut from, the scan itself among them
        others = np.flatnonzero((self.folds == self.folds[scan]) & (self.frames >= length))
        same = others[self.atlases[others] == atlas.name]
        share = rng.uniform() if rng.uniform() < 0.75 else 1.0
        mixed = np.sqrt(share) * self._window(scan, length, rng)
        mixed = mixed + np.sqrt(1 - share) * self._window(same[rng.integers(len(same))], length, rng)
        mixed += self._sources(others, length, atlas, rng)
        return mixed + rng.uniform(0, 0.5) * rng.uniform(0, 1, mixed.shape[1]) * rng.standard_normal(mixed.shape)

    def _sources(self, scans: np.ndarray, length: int, atlas: Atlas, rng: np.random.Generator) -> np.ndarray:
        """Zero to three series of ROIs of these scans, shared by the networks at random: [length, rois]."""
        count = rng.integers(4)
        series = np.zeros((length, count))
        for column in range(count):
            window = self._window(scans[rng.integers(len(scans))], length, rng)
            series[:, column] = np.nan_to_num(window[:, rng.integers(window.shape[1])])
        members = membership(atlas)
        weights = rng.normal(0, 0.4, (members.shape[1], count)) * (rng.uniform(size=(members.shape[1], count)) < 0.4)
        return series @ (members @ weights).T

    def _window(self, scan: int, length: int, rng: np.random.Generator) -> np.ndarray:
        signal = self._signal(int(scan))
        start = rng.integers(len(signal) - length + 1)
        return signal[start : start + length]

    def _signal(self, scan: int) -> np.ndarray:
        if scan not in self._read:
            if len(self._read) == SIGNALS_READ:
                del self._read[next(iter(self._read))]
            self._read[scan] = self.scans.signal(scan)
        return self._read[scan]


def collate_signals(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Codec inputs from items of differing lengths and numbers of ROIs (padded and masked), with their descriptors and
    the embeddings of their descriptions where the items have them.
    """
    time, rois = np.max([item["signal"].shape for item in items], axis=0).tolist()
    batch = {
        "fmri_values": torch.zeros(len(items), rois, time),
        "roi_coordinates": torch.zeros(len(items), rois, 3),
        "fmri_mask": torch.zeros(len(items), rois, time, dtype=torch.bool),
    }
    for row, item in enumerate(items):
        length, count = item["signal"].shape
        batch["fmri_values"][row, :count, :length] = torch.from_numpy(item["signal"].T)
        batch["roi_coordinates"][row, :count] = torch.tensor(item["coordinates"])
        batch["fmri_mask"][row, :count, :length] = True
    for name, target in (("descriptors", "descriptors"), ("text_embedding", "text_embeddings")):
        if name in items[0]:
            batch[target] = torch.from_numpy(np.stack([item[name] for item in items]))
    return batch


@dataclass(frozen=True)
class Encoded:
    """
    codes: int32 [tokens, levels] of each window; features: float32 [windows, features] of the codes; known: what else
    the items hold (of mixtures, "descriptors" and "subject"), arrays of a row each.
    """

    codes: list[np.ndarray]
    features: np.ndarray
    known: dict[str, np.ndarray]


def encode_windows(codec: FmriCodecModel, windows: Windows | MixedWindows, cache: Path) -> Encoded:
    """
    Codes of windows and their scan features, computed once, on an accelerator if there is one: kept in `cache` under a
    name that changes with the codec's weights and the windows, shard by shard, so that a run that was stopped goes on.
    """
    target = Path(cache) / f"codes-{codec_fingerprint(codec)[:12]}-{windows.fingerprint}"
    codes: list[np.ndarray] = []
    parts: list[dict[str, np.ndarray]] = []
    # for the time of it
    module: Any = codec
    device = codec.device
    module.to(torch.accelerator.current_accelerator() or device)
    starts = range(0, len(windows), SHARD)
    for start in tqdm(starts, desc="encoding", unit="shard", disable=None if len(starts) > 1 else True):
        path = target / f"part-{start // SHARD:05d}.npz"
        if not path.exists():
            found = encode_items(codec, [windows.item(i) for i in range(start, min(start + SHARD, len(windows)))])
            lengths = [len(rows) for rows in found.codes]
            rows = {"features": found.features, **found.known}
            write_arrays(path, codes=np.concatenate(found.codes), lengths=lengths, **rows)
        with np.load(path, allow_pickle=False) as kept:
            codes += np.split(kept["codes"], np.cumsum(kept["lengths"])[:-1])
            parts.append({name: kept[name] for name in kept.files if name not in ("codes", "lengths")})
    module.to(device)
    known = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Encoded(codes, known.pop("features"), known)


@torch.no_grad()
def encode_items(codec: FmriCodecModel, items: Sequence[dict[str, Any]]) -> Encoded:
    """Codes and scan features of items of any lengths, in batches of one length and similar numbers of ROIs."""
    order = sorted(range(len(items)), key=lambda i: items[i]["signal"].shape)
    codes: list[Any] = [None] * len(items)
    features = np.empty((len(items), codec.config.num_scan_features), np.float32)
    start = 0
    while start < len(order):
        length = len(items[order[start]]["signal"])
        rows = [row for row in order[start : start + BATCH] if len(items[row]["signal"]) == length]
        start += len(rows)
        batch = collate_signals([items[row] for row in rows])
        inputs = [batch[name].to(codec.device) for name in ("fmri_values", "roi_coordinates", "fmri_mask")]
        found = codec.encode(*inputs)
        features[rows] = codec.scan_features(found).cpu().numpy()
        for row, one in zip(rows, found.cpu().numpy().astype(np.int32), strict=True):
            codes[row] = one[one[:, 0] >= 0]
    known = [name for name in ("descriptors", "subject") if items and name in items[0]]
    return Encoded(codes, features, {name: np.array([item[name] for item in items]) for name in known})


def codec_fingerprint(codec: FmriCodecModel) -> str:
    """Changes with the configuration and the weights of a codec."""
    digest = hashlib.sha256(codec.config.to_json_string().encode())
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()
