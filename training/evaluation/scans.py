"""The scans of an evaluation: cut into windows and encoded once for everything that is asked about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import FmriLMFeatureExtractor

from ..data.dataset import Scans, Windows, collate_signals, cut_windows, encode_windows
from ..data.tasks import Label, Task, labels_of
from .ask import EncodedWindow


@dataclass(frozen=True)
class Labelled:
    """
    A task and its labels in every scan. rows: int, scans that have one. labels: cells of the column; truth: int
    index into the choices (-1 without a label), or float; numbers: float labels where choices are ranges of numbers.
    """

    task: Task
    rows: np.ndarray
    labels: list[Label | None]
    truth: np.ndarray
    numbers: np.ndarray | None

    @classmethod
    def read(cls, task: Task, scans: Scans) -> "Labelled":
        """ValueError for what is no label, and for labels that contradict each other (see `labels_of`)."""
        labels = labels_of(task, scans.table.to_dict("records"))
        rows = np.array([row for row, label in enumerate(labels) if label is not None])
        numbers = None
        if task.choices is None or task.cuts is not None:
            numbers = np.array([np.nan if label is None else float(label) for label in labels])
        if task.choices is None and numbers is not None:
            return cls(task, rows, labels, numbers, numbers)
        words = task.choice_words
        truth = np.array([-1 if label is None else words.index(task.answer(label)) for label in labels])
        return cls(task, rows, labels, truth, numbers)

    @property
    def choices(self) -> int:
        return len(self.task.choice_words)

    def known(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that have a label."""
        return rows[np.isin(rows, self.rows)]


@dataclass(frozen=True)
class EvaluationScans:
    """windows: of every scan; encoded: codes and features of each window; of_window: int [windows], its scan."""

    scans: Scans
    windows: Windows
    encoded: list[EncodedWindow]
    of_window: np.ndarray

    def __len__(self) -> int:
        return len(self.scans)

    @cached_property
    def subjects(self) -> np.ndarray:
        return self.scans.table["subject"].astype(str).to_numpy()

    @cached_property
    def sites(self) -> np.ndarray | None:
        table = self.scans.table
        if "site" not in table or table["site"].isna().all():
            return None
        return table["site"].fillna("").astype(str).to_numpy()

    @cached_property
    def groups(self) -> np.ndarray:
        """Site and atlas of each scan: within a group, scans differ by subject alone."""
        sites = [""] * len(self) if self.sites is None else self.sites
        return np.array([f"{site} {self.scans.atlas(row).name}" for row, site in enumerate(sites)])

    @cached_property
    def descriptors(self) -> np.ndarray:
        """Of every window, [windows, descriptors], NaN where absent."""
        return self.windows.descriptors()

    @cached_property
    def features(self) -> np.ndarray:
        """Mean over each scan's windows, float32 [scans, num_scan_features]."""
        return self.mean_over_windows(np.stack([window.features for window in self.encoded]))

    def windows_of(self, rows: Sequence[int] | np.ndarray) -> list[list[EncodedWindow]]:
        """The windows of each of these scans."""
        return [[self.encoded[place] for place in np.flatnonzero(self.of_window == row)] for row in rows]

    def mean_over_windows(self, values: np.ndarray) -> np.ndarray:
        """[scans, ...] of values [windows, ...]."""
        totals = np.zeros((len(self), *values.shape[1:]), values.dtype)
        np.add.at(totals, self.of_window, values)
        counts = np.bincount(self.of_window, minlength=len(self))
        return totals / counts.reshape(-1, *[1] * (values.ndim - 1))


def encode_scans(
    codec: FmriCodecModel, extractor: FmriLMFeatureExtractor, scans: Scans, stride: int, cache: Path
) -> EvaluationScans:
    """Windows at each `stride` frames; codes and features are kept in `cache`."""
    windows = cut_windows(scans, extractor.window_length, stride)
    encoded = encode_windows(codec, windows, cache)
    pairs = [EncodedWindow(np.asarray(codes), row) for codes, row in zip(encoded.codes, encoded.features, strict=True)]
    return EvaluationScans(scans, windows, pairs, np.array([window.scan for window in windows]))


@torch.no_grad()
def encode_noise(codec: FmriCodecModel, windows: Windows, rows: Sequence[int], seed: int) -> list[EncodedWindow]:
    """White noise in the shape of each of these windows, encoded."""
    rng = np.random.default_rng(seed)
    found = []
    for row in rows:
        item = windows.item(row)
        noise = {**item, "signal": rng.standard_normal(item["signal"].shape).astype(np.float32)}
        batch = {name: value.to(codec.device) for name, value in collate_signals([noise]).items()}
        codes = codec.encode(*(batch[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask")))
        found.append(EncodedWindow(codes[0].cpu().numpy(), codec.scan_features(codes)[0].cpu().numpy()))
    return found


def pseudonyms(scans: EvaluationScans, rows: Sequence[int] | np.ndarray) -> dict[str, str]:
    """What the subjects of these scans are called in reports: their site and a number."""
    sites = scans.sites
    site_of = {scans.subjects[row]: "subject" if sites is None else sites[row] for row in rows}
    counts: dict[str, int] = {}
    names = {}
    for subject in sorted(site_of):
        site = site_of[subject]
        counts[site] = counts.get(site, 0) + 1
        names[subject] = f"{site} {counts[site]}"
    return names
