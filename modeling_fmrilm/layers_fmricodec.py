"""Layers that both token layouts of the codec are made of."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fmrilm import FmriCodecConfig


# MNI coordinates are divided by this many mm before the Fourier features: it spans the brain once.
COORDINATE_SCALE = 100.0


class Places(NamedTuple):
    """
    What a codec knows of where ROIs are. embedded: [batch, rois, hidden]; functions: the values float32
    [batch, rois, functions] of its functions of place, which the roi layout does without.
    """

    embedded: torch.Tensor
    functions: torch.Tensor


def hiding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, or None where it hides nothing: attention without one is faster."""
    # a compiled graph cannot look at values, and keeps the mask it was given
    if mask is None or torch.compiler.is_compiling() or not mask.all():
        return mask
    return None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FmriCodecAttention(nn.Module):
    """
    Attention of states [batch, queries, hidden] to context [batch, keys, hidden] under a boolean mask.

    Both may consist of `steps` equal parts: a part then sees itself and the parts before it. One call for each part
    costs half the work of a causal mask over all of them, and no matrix of all queries by all keys is ever made.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, steps: int = 1
    ) -> torch.Tensor:
        """mask: what may be seen, bool [batch, steps, queries of a step or 1, keys]."""
        query, key, value = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.q_proj, states), (self.k_proj, context), (self.v_proj, context))
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        length = key.shape[2] // steps
        outputs = []
        for step, part in enumerate(query.chunk(steps, dim=2)):
            end = (step + 1) * length
            visible = None if mask is None else mask[:, step : step + 1, :, :end]
            output, _ = attend(
                self, part, key[:, :, :end], value[:, :, :end], visible,
                dropout=0.0, scaling=self.scaling, is_causal=False,
            )  # fmt: skip
            outputs.append(output)
        return self.o_proj(torch.cat(outputs, dim=1).flatten(-2))


class FmriCodecLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer; with a context it attends to that in place of itself."""

    def __init__(self, config: FmriCodecConfig, cross: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if cross else nn.Identity()
        self.attention = FmriCodecAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        steps: int = 1,
    ) -> torch.Tensor:
        normed = self.attention_norm(states)
        context = normed if context is None else self.context_norm(context)
        states = states + self.attention(normed, context, mask, steps)
        return states + self.mlp(self.mlp_norm(states))


def fourier_features(coordinates: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """Sines and cosines float32 [..., 6 * num_frequencies] of MNI coordinates [..., 3] in mm."""
    # half an octave apart, from a wavelength of 400 mm downwards
    octaves = torch.arange(num_frequencies, device=coordinates.device, dtype=torch.float32) / 2
    angles = coordinates.float()[..., None] / COORDINATE_SCALE * (0.5 * math.pi * 2**octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class FmriCodecCoordinates(nn.Module):
    """Fourier features of MNI coordinates [..., 3] in mm, projected to [..., hidden]: any parcellation has them."""

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.num_frequencies = config.num_frequencies
        self.projection = nn.Linear(6 * config.num_frequencies, config.hidden_size)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        features = fourier_features(coordinates, self.num_frequencies)
        return self.projection(features.to(self.projection.weight.dtype))


__all__ = ["FmriCodecAttention", "FmriCodecCoordinates", "FmriCodecLayer", "Places", "fourier_features", "hiding"]
