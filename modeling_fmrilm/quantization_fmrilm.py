"""Vector quantisation with a codebook that is learned by moving averages."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .ranks_fmrilm import gather_rows, random_rows, same_on_all_ranks, sum_over_ranks


class VectorQuantizer(nn.Module):
    """
    Cosine vector quantisation with a codebook that follows its vectors by moving averages (NormEMA, as in LaBraM
    and the paper), a k-means start and revival of dead codes. Processes that train together hold one codebook: the
    one that a single process would have on all their vectors.

    The codebook changes only through `collect` and `update`, which `forward` calls in training mode; `encode` and
    evaluation never change a statistic.
    """

    KMEANS_ITERATIONS = 10
    # the k-means start gives up after this many vectors for each code
    START_PATIENCE = 8

    codebook: torch.Tensor
    usage: torch.Tensor
    started: torch.Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, decay: float, revival_threshold: float):
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.decay = decay
        self.revival_threshold = revival_threshold
        self.register_buffer("codebook", self.initial_codebook())
        self.register_buffer("usage", torch.zeros(codebook_size))
        self.register_buffer("started", torch.tensor(False))
        self._waiting: list[torch.Tensor] = []

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "VectorQuantizer":
        """Follows the model to other devices, but stays in float32: rounded averages would stop moving."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        return super()._apply(moved, recurse)

    def initial_codebook(self) -> torch.Tensor:
        """The same unit vectors in every process: what an untrained model quantises with."""
        generator = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(self.codebook_size, self.codebook_dim, generator=generator), dim=-1)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [...] of the vectors z [..., codebook_dim]: the nearest by cosine."""
        # in half precision the nearest of thousands of codes is anyone's guess
        with torch.autocast(z.device.type, enabled=False):
            return (self.continuous(z) @ self.codebook.T).argmax(-1)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors [..., codebook_dim] of codes [...]."""
        return F.embedding(codes, self.codebook)

    def continuous(self, z: torch.Tensor) -> torch.Tensor:
        """What is rounded to codes: vectors of unit length (float32)."""
        return F.normalize(z.float(), dim=-1)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            z: [..., codebook_dim]; mask: bool [...], False where the vector is padding.

        Returns:
            quantised vectors (gradient passed straight through), codes, commitment loss (mean over valid vectors).
            Until the k-means start has seen enough vectors, training gets them back unrounded.
        """
        z = self.continuous(z)
        valid = z.detach()[mask]
        if self.training and not self.started:
            self.collect(valid)
        codes = self.encode(z)
        if self.training and not self.started:
            return z, codes, z.new_zeros(())
        # Looked up before the update: the loss and the output belong to the codebook that chose the codes.
        quantized = self.embed(codes)
        loss = F.mse_loss(z[mask], quantized[mask])
        if self.training:
            self.update(valid, codes[mask])
        return z + (quantized - z).detach(), codes, loss

    @torch.no_grad()
    def collect(self, vectors: torch.Tensor) -> None:
        """Keeps vectors [n, codebook_dim] of the first batches, until there is one for each code to start from."""
        self._waiting.append(gather_rows(vectors)[0])
        vectors = torch.cat(self._waiting)
        if len(vectors) < self.codebook_size:
            return
        distinct = vectors.unique(dim=0)
        if len(distinct) >= self.codebook_size:
            self._waiting.clear()
            self.start(vectors, distinct)
        elif len(vectors) >= self.START_PATIENCE * self.codebook_size:
            raise ValueError(
                f"the k-means start needs as many distinct vectors as codes: expected {self.codebook_size}, got "
                f"{len(distinct)} among the first {len(vectors)}; use a smaller codebook or check that scans differ"
            )

    @torch.no_grad()
    def start(self, vectors: torch.Tensor, distinct: torch.Tensor) -> None:
        """k-means (cosine Lloyd iterations) of vectors [n, codebook_dim] of all ranks, from as many distinct ones."""
        candidates = vectors if len(distinct) == len(vectors) else distinct
        self.codebook.copy_(candidates[torch.randperm(len(candidates))[: self.codebook_size]])
        same_on_all_ranks(self.codebook)
        for _ in range(self.KMEANS_ITERATIONS):
            sums, counts = self._totals(vectors, self.encode(vectors))
            self.codebook.copy_(torch.where(counts[:, None] > 0, self._centers(sums, counts), self.codebook))
        # each rank got here by the same steps; the last bits may differ from one kind of machine to another
        same_on_all_ranks(self.codebook)
        self.usage.fill_(1.0)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """One moving-average step towards the batch, then dead codes move onto vectors of the batch."""
        sums, counts = (sum_over_ranks(total) for total in self._totals(vectors, codes))
        moved = F.normalize(self.decay * self.codebook + (1 - self.decay) * self._centers(sums, counts), dim=-1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        # usage is 1 for a code that takes its equal share of the vectors
        self.usage.lerp_(counts * (self.codebook_size / counts.sum()), 1 - self.decay)
        dead = (self.usage < self.revival_threshold).nonzero()[:, 0]
        if len(dead):
            revived = random_rows(vectors, len(dead))
            # a batch may hold fewer vectors than there are dead codes
            rows = dead[: len(revived)]
            self.codebook[rows] = revived
            self.usage[rows] = 1.0

    def _totals(self, vectors: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the vectors of each code: [codebook_size, codebook_dim], [codebook_size]."""
        counts = torch.bincount(codes, minlength=self.codebook_size).to(vectors.dtype)
        return torch.zeros_like(self.codebook).index_add_(0, codes, vectors), counts

    @staticmethod
    def _centers(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)


__all__ = ["VectorQuantizer"]
