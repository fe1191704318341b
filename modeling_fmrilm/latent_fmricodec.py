"""Token layout "latent": each step of a scan is read into, and written from, a fixed number of slots."""

import math

import torch
from torch import nn

from .configuration_fmrilm import FmriCodecConfig
from .connectivity_fmricodec import FmriCodecConnectivity
from .layers_fmricodec import FmriCodecBasis, FmriCodecLayer, hiding


def causal_mask(
    steps: int, tokens_per_step: int, step_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """
    What tokens may see, bool [batch or 1, 1, tokens, tokens]: their own step and earlier ones that hold data, by
    step_mask [batch, steps] (None: all do). A step of padding sees itself as well, as softmax needs something, but no
    other step sees it. None where everything may be seen.
    """
    if steps == 1:
        return None
    step = torch.arange(steps * tokens_per_step, device=device) // tokens_per_step
    past, own = step[None, :] < step[:, None], step[None, :] == step[:, None]
    if step_mask is None:
        return (past | own)[None, None]
    return (past & step_mask.repeat_interleave(tokens_per_step, dim=1)[:, None, :] | own)[:, None]


class LatentEncoder(nn.Module):
    """
    The latents of a step start from its signals' projections on functions of place, and read the ROIs, which have
    attended to each other; with the connectivity of the projections they go through a transformer that is causal
    over steps.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_length, config.hidden_size)
        # signed sums over all ROIs, which attention, a mean with positive weights, is slow to learn
        self.basis = FmriCodecBasis(config)
        self.functions = config.functions_per_token
        self.from_projections = nn.Linear(self.functions * config.patch_length, config.hidden_size)
        self.connectivity = FmriCodecConnectivity(config)
        self.roi_layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_roi_layers))
        self.queries = nn.Parameter(torch.zeros(config.tokens_per_step, config.hidden_size))
        self.read_layers = nn.ModuleList(FmriCodecLayer(config, cross=True) for _ in range(2))
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def token_mask(self, roi_mask: torch.Tensor) -> torch.Tensor:
        """Tokens that hold data, bool [batch, tokens], by the ROIs that do [batch, steps, rois]."""
        return roi_mask.any(-1).repeat_interleave(len(self.queries), dim=1)

    def forward(
        self, patches: torch.Tensor, places: torch.Tensor, times: torch.Tensor, roi_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Encoder states [batch, tokens, hidden] of patches [batch, steps, rois, patch_length], zero where there are no
        data, at embedded places [batch, rois, hidden]; times [steps, hidden]: embedding of each step; roi_mask bool
        [batch, steps, rois]: ROIs that hold data, None if all do.
        """
        batch, steps, rois = patches.shape[:3]
        step_mask = keys = None
        if roi_mask is not None:
            step_mask = roi_mask.any(-1)
            # a step without data still needs something to attend to: its own zeros, masked out later
            keys = (roi_mask | ~step_mask[..., None]).flatten(0, 1)[:, None, None, :]
        states = (self.patch_embedding(patches) + places[:, None]).flatten(0, 1)
        for layer in self.roi_layers:
            states = layer(states, keys)
        count = rois if roi_mask is None else roi_mask.sum(-1).clamp(min=1)[..., None, None].to(patches.dtype)
        projections = self.basis(places).mT[:, None] @ patches * (math.sqrt(self.functions) / count)
        connectivity = self.connectivity(patches, places, roi_mask)
        projections = projections.unflatten(2, (-1, self.functions)).flatten(3).flatten(0, 1)
        latents = self.queries + self.from_projections(projections)
        for layer in self.read_layers:
            latents = layer(latents, keys, states)
        latents = (latents.unflatten(0, (batch, steps)) + times[:, None] + connectivity).flatten(1, 2)
        mask = causal_mask(steps, len(self.queries), step_mask, states.device)
        for layer in self.layers:
            latents = layer(latents, mask)
        return self.norm(latents)


class LatentDecoder(nn.Module):
    """
    A transformer over the latents, causal over steps. Each latent weighs its functions of place, frame by frame; a
    patch is their sum at its place.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.slots = nn.Parameter(torch.zeros(config.tokens_per_step, config.hidden_size))
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.basis = FmriCodecBasis(config)
        self.functions = config.functions_per_token
        self.to_weights = nn.Linear(config.hidden_size, self.functions * config.patch_length)

    def forward(
        self, states: torch.Tensor, times: torch.Tensor, places: torch.Tensor, token_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Patches [batch, steps, rois, patch_length] at embedded places [batch, rois, hidden], of states
        [batch, tokens, hidden]; times [max_steps, hidden]: embedding of each step.
        """
        slots = len(self.slots)
        steps = states.shape[1] // slots
        states = (states.unflatten(1, (steps, -1)) + self.slots + times[:steps, None]).flatten(1, 2)
        mask = causal_mask(steps, slots, hiding(token_mask[:, ::slots]), states.device)
        for layer in self.layers:
            states = layer(states, mask)
        weights = self.to_weights(self.norm(states)).unflatten(-1, (self.functions, -1))
        weights = weights.flatten(1, 2).unflatten(1, (steps, -1))
        return self.basis(places)[:, None] @ weights / math.sqrt(weights.shape[2])


__all__ = ["LatentDecoder", "LatentEncoder"]
