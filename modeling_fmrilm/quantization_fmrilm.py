"""Vector quantisers: each maps vectors to a (quantized, codes, loss) triple."""

import torch
import torch.nn.functional as F
from torch import nn


class VectorQuantizer(nn.Module):
    """
    Cosine vector quantisation with a codebook that follows its vectors by moving averages (NormEMA, as in LaBraM
    and the paper), a k-means start and revival of dead codes.

    The codebook changes only through `update`, which `forward` calls in training mode; `encode` and evaluation
    never change a statistic.
    """

    KMEANS_ITERATIONS = 10

    def __init__(self, codebook_size: int, codebook_dim: int, decay: float, revival_threshold: float):
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.decay = decay
        self.revival_threshold = revival_threshold
        self.register_buffer("codebook", self.initial_codebook())
        self.register_buffer("usage", torch.zeros(codebook_size))
        self.register_buffer("started", torch.tensor(False))

    def initial_codebook(self) -> torch.Tensor:
        """The same unit vectors in every process: what an untrained model quantises with."""
        generator = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(self.codebook_size, self.codebook_dim, generator=generator), dim=-1)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [...] of the vectors z [..., codebook_dim]: the nearest by cosine."""
        return (F.normalize(z.float(), dim=-1) @ self.codebook.T).argmax(-1)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors [..., codebook_dim] of codes [...]."""
        return F.embedding(codes, self.codebook)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            z: [..., codebook_dim]; mask: bool [...], False where the vector is padding.

        Returns:
            quantised vectors (gradient passed straight through), codes, commitment loss (mean over valid vectors).
        """
        z = F.normalize(z.float(), dim=-1)
        valid = z.detach()[mask]
        if self.training and not self.started:
            self.start(valid)
        codes = self.encode(z)
        # Looked up before the update: the loss and the output belong to the codebook that chose the codes.
        quantized = self.embed(codes)
        loss = F.mse_loss(z[mask], quantized[mask])
        if self.training:
            self.update(valid, codes[mask])
        return z + (quantized - z).detach(), codes, loss

    @torch.no_grad()
    def start(self, vectors: torch.Tensor) -> None:
        """k-means (cosine Lloyd iterations) from distinct vectors [n, codebook_dim] of a first batch."""
        if len(vectors) < self.codebook_size:
            raise ValueError(
                f"the k-means start needs at least as many vectors as codes: expected {self.codebook_size}, "
                f"got {len(vectors)}; use a larger batch or a smaller codebook"
            )
        self.codebook.copy_(vectors[torch.randperm(len(vectors))[: self.codebook_size]])
        for _ in range(self.KMEANS_ITERATIONS):
            centers, counts = self._centers(vectors, self.encode(vectors))
            self.codebook.copy_(torch.where(counts[:, None] > 0, centers, self.codebook))
        self.usage.fill_(1.0)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """One moving-average step towards the batch, then dead codes move onto vectors of the batch."""
        centers, counts = self._centers(vectors, codes)
        moved = F.normalize(self.decay * self.codebook + (1 - self.decay) * centers, dim=-1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        # usage is 1 for a code that takes its equal share of the vectors
        self.usage.lerp_(counts * (self.codebook_size / counts.sum()), 1 - self.decay)
        dead = self.usage < self.revival_threshold
        count = min(int(dead.sum()), len(vectors))
        rows = dead.nonzero()[:count, 0]
        self.codebook[rows] = vectors[torch.randperm(len(vectors))[:count]]
        self.usage[rows] = 1.0

    def _centers(self, vectors: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.bincount(codes, minlength=self.codebook_size).to(vectors.dtype)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, vectors)
        return F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1), counts


__all__ = ["VectorQuantizer"]
