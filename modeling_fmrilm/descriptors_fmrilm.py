"""What the codec tells of a scan on the whole, said to the language model in words of its own vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_fmrilm import FmriLMConfig


class FmriLMDescriptorTokens(nn.Module):
    """
    Standardised descriptors, which the codec's head reads from the codes, to embeddings of the words low, typical and
    high: the mean of the three, weighted by their probabilities (an ordinal logistic model for each descriptor). A
    language model looks such words up in its context from its pretraining on; it would have to learn first to find
    what is spread over hundreds of codes.
    """

    LEVELS = 3

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        count = len(config.codec_config.descriptor_names)
        self.levels = nn.Embedding(self.LEVELS, config.text_config.hidden_size)
        # the levels part at middle - exp(log_width) and middle + exp(log_width), the more clearly the sharper
        self.middle = nn.Parameter(torch.empty(count))
        self.log_width = nn.Parameter(torch.empty(count))
        self.log_sharpness = nn.Parameter(torch.empty(count))

    def init_weights(self) -> None:
        """Levels are thirds of a normal distribution."""
        init.zeros_(self.middle)
        init.constant_(self.log_width, math.log(0.43))
        init.constant_(self.log_sharpness, math.log(2.0))

    def probabilities(self, z_scores: torch.Tensor) -> torch.Tensor:
        """Of the levels, [scans, descriptors, levels], low first, of z_scores [scans, descriptors]."""
        width, sharpness = self.log_width.exp(), self.log_sharpness.exp()
        above_low = (sharpness * (z_scores - self.middle + width)).sigmoid()
        high = (sharpness * (z_scores - self.middle - width)).sigmoid()
        return torch.stack([1 - above_low, above_low - high, high], dim=-1)

    def forward(self, z_scores: torch.Tensor) -> torch.Tensor:
        """Embeddings [scans, descriptors, hidden]."""
        return self.probabilities(z_scores).to(self.levels.weight.dtype) @ self.levels.weight


def descriptor_places(
    input_ids: torch.Tensor, is_fmri: torch.Tensor, descriptor_token_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Row, place, scan (over the whole batch, in order) and descriptor of each descriptor token of input_ids
    [batch, length]: it is about the scan before it. is_fmri: where the scans' placeholders are.
    """
    is_descriptor = input_ids[..., None] == input_ids.new_tensor(descriptor_token_ids)
    rows, places, descriptors = is_descriptor.nonzero(as_tuple=True)
    ends = is_fmri & ~F.pad(is_fmri[:, 1:], (0, 1))
    before = ends.cumsum(-1)
    if not before[rows, places].all():
        raise ValueError("expected a scan before each descriptor token, got a row without one")
    earlier_rows = F.pad(ends.sum(-1).cumsum(0)[:-1], (1, 0))
    return rows, places, earlier_rows[rows] + before[rows, places] - 1, descriptors


__all__ = ["FmriLMDescriptorTokens", "descriptor_places"]
