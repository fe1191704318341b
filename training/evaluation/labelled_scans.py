"""Prepared scans with the labels of a task, as everything that answers it takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import FmriLMFeatureExtractor

from ..codec.trainer import encode_items
from ..data.dataset import PreparedScan, load_prepared
from ..data.scan_windows import encode_by_length, scan_items
from ..data.tasks import Task, labels_of
from .baselines import connectivity_features


@dataclass(frozen=True)
class LabelledScans:
    """
    A row for each scan that has a label.

    subjects, groups: [rows], whose scan and of what dataset, site and atlas. truth: int [rows] index into the task's
    choice words, or float [rows]. answers: what is to be said of it. codes: int [windows, tokens] of each scan.
    features: functional connectivity [rows, pairs]. unlabelled: scans that were left out.
    """

    subjects: np.ndarray
    groups: np.ndarray
    truth: np.ndarray
    answers: list[str]
    codes: list[np.ndarray]
    features: np.ndarray
    unlabelled: int

    def __len__(self) -> int:
        return len(self.truth)


def load_labelled(folder: Path, task: Task, extractor: FmriLMFeatureExtractor, codec: FmriCodecModel) -> LabelledScans:
    """What `fmrilm prepare` wrote, with the task's column among its labels."""
    rows = _label_rows(folder)
    labels = labels_of(task, rows)
    scans = load_prepared(folder, extractor)
    known = [index for index, label in enumerate(labels) if label is not None]
    answers = [task.answer(labels[index]) for index in known]
    if task.choices is None:
        truth = np.array([labels[index] for index in known], float)
    else:
        truth = np.array([task.choice_words.index(answer) for answer in answers])
    scans = [scans[index] for index in known]
    return LabelledScans(
        subjects=np.array([scan.subject for scan in scans]),
        groups=np.array([f"{scan.dataset} {scan.atlas.name}" for scan in scans]),
        truth=truth,
        answers=answers,
        codes=scan_codes(codec, scans, extractor.window_length),
        features=connectivity_features(scans),
        unlabelled=len(labels) - len(known),
    )


def scan_codes(codec: FmriCodecModel, scans: Sequence[PreparedScan], window_length: int) -> list[np.ndarray]:
    """Codes int [windows, tokens] of every full window of each scan side by side, or of all of a shorter one."""
    windows = [
        scan_items(scan.signal, scan.atlas, codec.config.patch_length, window_length, window_length) for scan in scans
    ]
    return [np.stack(codes) for codes in encode_by_length(windows, partial(encode_items, codec))]


def _label_rows(folder: Path) -> list[dict]:
    """All but the signals of a prepared folder, in the order in which `load_prepared` gives the scans."""
    rows = []
    for table in sorted((folder / "atlases").glob("*.json")):
        for shard in sorted((folder / table.stem).glob("*.parquet")):
            columns = [name for name in pq.read_schema(shard).names if name not in ("signal", "censored")]
            rows += pq.read_table(shard, columns=columns).to_pylist()
    return rows
