"""Finite scalar quantisation (Mentzer et al. 2024): a fixed grid in place of a learned codebook."""

import math
from collections.abc import Sequence

import torch
from torch import nn


class FiniteScalarQuantizer(nn.Module):
    """
    Each of a vector's few numbers is squashed and rounded to one of `levels[i]` values in -1..1. A code is the
    mixed-radix number of its digits, the first one counting least. Nothing is learned and nothing can die out.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [...] of the vectors z [..., len(levels)]."""
        return self._codes(self._bound(z).round())

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """The grid's vectors [..., len(levels)] of codes [...]."""
        levels, half_width, basis = self._grid(codes.device)
        return (codes[..., None] // basis % levels - half_width) / half_width

    def continuous(self, z: torch.Tensor) -> torch.Tensor:
        """What is rounded: vectors in -1..1 (float32)."""
        return self._bound(z) / self._grid(z.device)[1]

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounded vectors (gradient passed straight through), codes, and a loss of zero; see [`VectorQuantizer`]."""
        bounded = self._bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._grid(z.device)[1], self._codes(rounded.detach().round()), bounded.new_zeros(())

    def _grid(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        levels = torch.tensor(self.levels, device=device)
        basis = [math.prod(self.levels[:place]) for place in range(len(self.levels))]
        return levels, levels // 2, torch.tensor(basis, device=device)

    def _bound(self, z: torch.Tensor) -> torch.Tensor:
        """z so that rounding gives as many values as there are levels (the authors' `bound`)."""
        levels = self._grid(z.device)[0]
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = (levels % 2 == 0) * 0.5
        return (z.float() + (offset / half).tan()).tanh() * half - offset

    def _codes(self, rounded: torch.Tensor) -> torch.Tensor:
        _, half_width, basis = self._grid(rounded.device)
        return ((rounded.long() + half_width) * basis).sum(-1)


__all__ = ["FiniteScalarQuantizer"]
