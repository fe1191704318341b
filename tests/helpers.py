"""Scans and codes that several test files make."""


import numpy as np
from datasets import Dataset

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.training.chats import instruction_dataset
from fmrilm.training.data import PreparedScan


def atlas(name: str = "small", rois: int = 9) -> Atlas:
    return Atlas(
        name=name,
        rois=tuple(f"{name}_{i}" for i in range(rois)),
        networks=tuple(("Vis", "SomMot", "Default")[i % 3] for i in range(rois)),
        coordinates=np.random.default_rng(rois).uniform(-60, 60, (rois, 3)),
    )


# ROIs per network: one has a single ROI, the last of all networks has none
SIZES = {"Vis": 8, "SomMot": 6, "DorsAttn": 5, "SalVentAttn": 1, "Limbic": 4, "Cont": 6, "Default": 10}


def labelled_atlas(sizes: dict[str, int] | None = None, name: str = "made-up") -> Atlas:
    """An atlas with so many ROIs of each network, in random order."""
    networks = [network for network, size in (sizes or SIZES).items() for _ in range(size)]
    rois = tuple(f"roi{i}" for i in range(len(networks)))
    shuffled = tuple(np.random.default_rng(1).permutation(networks).tolist())
    return Atlas(name, rois, shuffled, np.zeros((len(networks), 3)))


def slow_series(seed: int, time: int, rois: int, batch: tuple[int, ...] = ()) -> np.ndarray:
    """Correlated slow series [*batch, time, rois] on a large mean, as BOLD is."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(*batch, time, rois)) + rng.normal(size=(*batch, time, 3)) @ rng.normal(size=(3, rois))
    return 1000 + 10 * sum(np.roll(noise, lag, axis=-2) for lag in range(5))


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
    return codes, rng.integers(-1, 3, size=(windows, len(CORE_NAMES)))


def chats(rows: int = 8, statements: int = 1) -> Dataset:
    weights = [0.4, 0.3, 0.3]
    return instruction_dataset(*random_scans(8), rows, questions=2, statements=statements, weights=weights, seed=0)
