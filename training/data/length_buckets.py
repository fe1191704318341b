"""Rows of similar length in one step, so that little of a batch is padding."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


# steps whose rows are sorted together: more make steps of more equal rows, fewer make more random ones
POOL_STEPS = 50


class LengthBuckets(Sampler[int]):
    """
    The rows of an epoch in an order in which those of one step, that is of all its processes and accumulated batches,
    are of similar length. The order depends on the arguments and the epoch alone: it is the same in every process,
    after a resume, and however a step is divided.

    Args:
        lengths: tokens of each row.
        per_step: rows of one optimiser step.
        epoch: asked at the begin of each epoch for its number.
    """

    def __init__(self, lengths: Sequence[int], per_step: int, seed: int, epoch: Callable[[], int]):
        self.lengths = np.asarray(lengths)
        self.per_step = per_step
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch()))
        order = rng.permutation(len(self.lengths))
        # rows that do not fill a step come last
        whole = len(order) // self.per_step * self.per_step
        pool = POOL_STEPS * self.per_step
        steps = []
        for start in range(0, whole, pool):
            rows = order[start : min(start + pool, whole)]
            steps.append(rows[self.lengths[rows].argsort(kind="stable")].reshape(-1, self.per_step))
        if steps:
            yield from rng.permutation(np.concatenate(steps)).ravel().tolist()
        yield from order[whole:].tolist()
