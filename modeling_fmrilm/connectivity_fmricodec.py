"""What the regions of a brain do together, as an input of the slots of the latent layout."""

from itertools import combinations_with_replacement

import torch
from torch import nn
from transformers import initialization as init

from .configuration_fmrilm import FmriCodecConfig


# deviation of a ROI's logits at the start: groups then differ, and a group is more than one ROI or two
ASSIGNMENT_RANGE = 2.0


class FmriCodecConnectivity(nn.Module):
    """
    Functional connectivity is a product of signals, which attention and MLPs are slow to learn. Here it is given: by
    their places, ROIs are averaged to `num_roi_groups` series; every slot sees the products of all pairs of them, and
    of each with its own previous frame, averaged over its step and over all steps so far.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        groups = config.num_roi_groups
        self.tokens_per_step = config.tokens_per_step
        self.place_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.assignment = nn.Linear(config.hidden_size, groups, bias=False)
        # no tensor: there are none with values where a model is only counted
        self.pairs = [list(part) for part in zip(*combinations_with_replacement(range(groups), 2), strict=True)]
        size = 2 * (len(self.pairs[0]) + groups)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.output_proj = nn.Linear(size, config.tokens_per_step * config.hidden_size)

    def init_weights(self) -> None:
        init.normal_(self.assignment.weight, std=ASSIGNMENT_RANGE * self.assignment.in_features**-0.5)

    def forward(self, patches: torch.Tensor, places: torch.Tensor, roi_mask: torch.Tensor | None) -> torch.Tensor:
        """
        States [batch, steps, slots, hidden] of patches [batch, steps, rois, patch_length], zero where there are no
        data, at embedded places [batch, rois, hidden]; roi_mask bool [batch, steps, rois], None if all hold data.
        """
        logits = self.assignment(self.place_norm(places))[:, None]
        if roi_mask is not None:
            logits = logits.masked_fill(~roi_mask[..., None], torch.finfo(logits.dtype).min)
        series = logits.softmax(2).mT @ patches
        products = (series @ series.mT)[..., self.pairs[0], self.pairs[1]]
        lagged = (series[..., 1:] * series[..., :-1]).sum(-1)
        here = torch.cat([products, lagged], dim=-1)
        steps = torch.arange(1, here.shape[1] + 1, device=here.device, dtype=here.dtype)
        so_far = here.cumsum(1) / steps[:, None]
        states = self.output_proj(self.norm(torch.cat([here, so_far], dim=-1)))
        return states.unflatten(-1, (self.tokens_per_step, -1))


__all__ = ["FmriCodecConnectivity"]
