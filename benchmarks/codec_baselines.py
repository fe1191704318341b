"""What the codec is measured against: principal components at the same bits, and interpolation between ROIs."""

import heapq
from collections.abc import Sequence

import numpy as np


class QuantizedPCA:
    """
    Patches [patch_length x rois] as bits: principal components of training patches, each coefficient rounded by a
    Lloyd-Max quantiser of its own training distribution, each bit given to the coefficient whose error it lowers most.
    """

    MOST_BITS = 8
    LLOYD_ITERATIONS = 60

    def __init__(self, signals: Sequence[np.ndarray], patch_length: int, components: int = 320):
        """signals: training scans [time, rois] of one atlas."""
        self.patch_length = patch_length
        starts = [(signal, start) for signal in signals for start in range(0, len(signal) - patch_length + 1, 4)]
        patches = np.stack([signal[start : start + patch_length].ravel() for signal, start in starts])
        self.mean = patches.mean(0)
        _, vectors = np.linalg.eigh(np.cov(patches.T))
        self.vectors = vectors[:, ::-1][:, :components]
        self.coefficients = (patches - self.mean) @ self.vectors
        self.levels: dict[tuple[int, int], np.ndarray] = {}

    def reconstruct(self, window: np.ndarray, bits: int) -> np.ndarray:
        """The window [time, rois] after `bits` for each of its patches."""
        coefficients = (window.reshape(-1, len(self.mean)) - self.mean) @ self.vectors
        rounded = np.zeros_like(coefficients)
        for index, share in enumerate(self.allocation(bits)):
            if share:
                rounded[:, index] = _round(coefficients[:, index], self._levels(index, share))
        return (rounded @ self.vectors.T + self.mean).reshape(window.shape)

    def allocation(self, bits: int) -> np.ndarray:
        """Bits of each coefficient, int [components]; the errors are those of the training patches."""
        given = np.zeros(self.coefficients.shape[1], int)
        gains = [(-self._gain(index, 0), index) for index in range(len(given))]
        heapq.heapify(gains)
        for _ in range(bits):
            _, index = heapq.heappop(gains)
            given[index] += 1
            if given[index] < self.MOST_BITS:
                heapq.heappush(gains, (-self._gain(index, given[index]), index))
        return given

    def _gain(self, index: int, bits: int) -> float:
        return self._error(index, bits) - self._error(index, bits + 1)

    def _error(self, index: int, bits: int) -> float:
        values = self.coefficients[:, index]
        return float(((values - _round(values, self._levels(index, bits))) ** 2).mean())

    def _levels(self, index: int, bits: int) -> np.ndarray:
        if (index, bits) not in self.levels:
            self.levels[index, bits] = _lloyd_max(self.coefficients[:, index], 2**bits, self.LLOYD_ITERATIONS)
        return self.levels[index, bits]


def _lloyd_max(values: np.ndarray, count: int, iterations: int) -> np.ndarray:
    """The `count` numbers that values [n] are best rounded to, from their quantiles."""
    levels = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(iterations):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        members = np.bincount(nearest, minlength=count)
        means = np.bincount(nearest, values, minlength=count) / np.maximum(members, 1)
        levels = np.sort(np.where(members > 0, means, levels))
    return levels


def _round(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]


def nearest_neighbour(signal: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Series [..., time, wanted] at places [wanted, 3] from series [..., time, known] at places [known, 3] in mm."""
    return signal[..., _distances(wanted, known).argmin(1)]


def inverse_distance(signal: np.ndarray, known: np.ndarray, wanted: np.ndarray, power: float) -> np.ndarray:
    """As `nearest_neighbour`, but the mean of all known series weighted by distance to the power of -`power`."""
    weights = _distances(wanted, known) ** -power
    return signal @ (weights / weights.sum(1, keepdims=True)).T


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first[:, None] - second[None], axis=-1).clip(min=1e-3)
