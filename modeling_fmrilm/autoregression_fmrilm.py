"""What the codes of a scan say of its next step by themselves, before any language model has read them."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fmrilm import FmriLMConfig


class FmriLMAutoregression(nn.Module):
    """
    Logits of the next step's codes: how common each is in its slot, and how near it is to the vector that a linear map
    of low rank expects there, given the vectors of the present step and their means over all steps so far. It starts
    at nothing, is fitted to codes alone, and stays as it is while the language model learns what is left.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        codec = config.codec_config
        size = codec.tokens_per_step * codec.codebook_dim
        self.slots = codec.tokens_per_step
        self.scale = codec.codebook_dim**0.5
        self.frequencies = nn.Parameter(torch.zeros(codec.tokens_per_step, codec.codebook_size))
        self.input_proj = nn.Linear(2 * size, config.autoregression_rank, bias=False)
        self.output_proj = nn.Linear(config.autoregression_rank, size, bias=False)

    def init_weights(self) -> None:
        init.zeros_(self.frequencies)
        init.zeros_(self.output_proj.weight)

    def forward(self, vectors: torch.Tensor, codebook: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """
        Logits [n, codes] of what follows the `n` tokens chosen, bool [scans, tokens] (whole steps): vectors [scans,
        tokens, codebook_dim] of all tokens, any after a scan's last; codebook [codes, codebook_dim].
        """
        steps = vectors.to(self.input_proj.weight.dtype).unflatten(1, (-1, self.slots)).flatten(2)
        counts = torch.arange(1, steps.shape[1] + 1, device=steps.device, dtype=steps.dtype)
        means = steps.cumsum(1) / counts[:, None]
        expected = self.output_proj(self.input_proj(torch.cat([steps, means], dim=-1)))
        expected = expected.view(vectors.shape)[chosen].unflatten(0, (-1, self.slots))
        logits = self.scale * expected @ codebook.to(expected.dtype).T + self.frequencies
        return logits.flatten(0, 1)


__all__ = ["FmriLMAutoregression"]
