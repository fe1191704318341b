"""From the codec's vectors to what a language model takes for words."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_fmrilm import FmriLMConfig


class FmriLMProjector(nn.Module):
    """
    Codebook vectors [scans, steps, slots, codebook_dim] to token embeddings [scans, steps, slots, hidden].

    Each token brings its own vector and the mean of its slot's vectors so far: a language model finds what a scan is
    like on the whole in the last step, and no token knows the future. A learned vector tells the slots apart. The
    output starts at the size of a word's embedding.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        codec = config.codec_config
        self.norm = nn.LayerNorm(2 * codec.codebook_dim)
        self.slots = nn.Embedding(codec.tokens_per_step, config.projector_hidden_size)
        self.input_proj = nn.Linear(2 * codec.codebook_dim, config.projector_hidden_size)
        self.output_proj = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)
        self.output_norm = nn.LayerNorm(config.text_config.hidden_size)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, vectors.shape[1] + 1, device=vectors.device, dtype=vectors.dtype)
        means = vectors.cumsum(1) / steps[:, None, None]
        states = self.norm(torch.cat([vectors, means], dim=-1))
        return self.output_norm(self.output_proj(F.gelu(self.input_proj(states) + self.slots.weight)))


__all__ = ["FmriLMProjector"]
