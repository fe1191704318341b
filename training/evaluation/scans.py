"""The scans of an evaluation: cut into windows and encoded once for everything that is asked about them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import FmriLMFeatureExtractor

from ..codec.metrics import decoded, fc_correlation, r_squared
from ..data.dataset import Scans, Windows, cut_windows, encode_items, encode_windows
from ..data.tasks import Label, Task, labels_of
from .ask import EncodedWindow
from .metrics import bootstrap, mean


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
        table: Any = self.scans.table
        if "site" not in table or table["site"].isna().all():
            return None
        return table["site"].fillna("").astype(str).to_numpy()

    @cached_property
    def groups(self) -> np.ndarray:
        """Dataset (or site) and atlas of each scan: within a group, scans differ by subject alone."""
        return (self.scans.table["dataset"] + " " + self.scans.table["atlas"]).to_numpy(str)

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


def encode_noise(codec: FmriCodecModel, windows: Windows, rows: Sequence[int], seed: int) -> list[EncodedWindow]:
    """White noise in the shape of each of these windows, encoded."""
    rng = np.random.default_rng(seed)
    found = []
    for row in rows:
        item = windows.item(row)
        noise = {**item, "signal": rng.standard_normal(item["signal"].shape).astype(np.float32)}
        encoded = encode_items(codec, [noise])
        found.append(EncodedWindow(encoded.codes[0], encoded.features[0]))
    return found


def pseudonyms(scans: EvaluationScans, rows: Sequence[int] | np.ndarray) -> dict[str, str]:
    """What the subjects of these scans are called in reports: their dataset and a number."""
    datasets = scans.scans.table["dataset"].to_numpy(str)
    counts: Counter[str] = Counter()
    names = {}
    for subject, dataset in sorted({scans.subjects[row]: datasets[row] for row in rows}.items()):
        counts[dataset] += 1
        names[subject] = f"{dataset} {counts[dataset]}"
    return names


@torch.no_grad()
def reconstruction_results(codec: FmriCodecModel, scans: EvaluationScans, rows: np.ndarray, show: bool) -> dict:
    """
    What the codes keep of these scans: R2 of the decoded signal and correlation of its connectivity, mean over
    subjects with intervals; and bits. show: each subject under a pseudonym.
    """
    config, places = codec.config, np.flatnonzero(np.isin(scans.of_window, rows))
    signals: dict[str, list] = {}
    guesses: dict[str, list] = {}
    for place in places.tolist():
        item, subject = scans.windows.item(place), str(scans.subjects[scans.of_window[place]])
        signals.setdefault(subject, []).append(item["signal"])
        guesses.setdefault(subject, []).append(decoded(codec, item, scans.encoded[place].codes))
    found = [
        {
            "r_squared": r_squared(signals[one], guesses[one]),
            "fc_correlation": fc_correlation(signals[one], guesses[one]),
        }
        for one in signals
    ]
    bits = config.tokens_per_patch * config.num_quantizers * float(np.log2(config.codebook_size))
    results: dict[str, Any] = {"bits_per_patch": bits}
    for name in ("r_squared", "fc_correlation"):
        values = np.array([np.nan if one[name] is None else one[name] for one in found])
        results[name] = bootstrap(lambda weights, values=values: mean(values, weights), np.arange(len(values)))
    if show:
        names = pseudonyms(scans, rows)
        results["subjects"] = [{"subject": names[one], **values} for one, values in zip(signals, found, strict=True)]
    return results
