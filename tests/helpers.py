"""Scans and codes that several test files make."""


import numpy as np
from datasets import Dataset

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import DESCRIPTOR_NAMES
from fmrilm.training.chats import instruction_dataset
from fmrilm.training.data import PreparedScan


def atlas(name: str = "small", rois: int = 9) -> Atlas:
    return Atlas(
        name=name,
        rois=tuple(f"{name}_{i}" for i in range(rois)),
        networks=tuple(("Vis", "SomMot", "Default")[i % 3] for i in range(rois)),
        coordinates=np.random.default_rng(rois).uniform(-60, 60, (rois, 3)),
    )


def prepared(subject: str, dataset: str = "study", frames: int = 40, of: Atlas | None = None, seed: int = 0):
    """A scan of noise with some memory: [frames, rois]."""
    of = of or atlas()
    noise = np.random.default_rng(seed + sum(map(ord, subject))).standard_normal((frames + 3, len(of)))
    signal = sum(noise[lag : lag + frames] for lag in range(4)) / 2
    return PreparedScan(signal.astype(np.float32), of, dataset, subject, "1")


def random_scans(windows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes [windows, tokens] whose first two say which window they are of, and levels with unknown ones."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(16, size=(windows, 8))
    codes[:, 0], codes[:, 1] = np.divmod(np.arange(windows), 16)
    return codes, rng.integers(-1, 3, size=(windows, len(DESCRIPTOR_NAMES)))


def chats(rows: int = 8, statements: int = 1) -> Dataset:
    weights = [0.4, 0.3, 0.3]
    return instruction_dataset(*random_scans(8), rows, questions=2, statements=statements, weights=weights, seed=0)
