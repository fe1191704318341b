"""Token layout "latent": each step of a scan is read into, and written from, a fixed number of slots."""

import torch
from torch import nn

from .configuration_fmrilm import FmriCodecConfig
from .connectivity_fmricodec import FmriCodecConnectivity
from .functions_fmricodec import FmriCodecFunctions
from .layers_fmricodec import FmriCodecLayer, Places, hiding


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
    A linear map of a step's coefficients on functions of place gives each slot a vector. The latents start from these,
    read the ROIs, which have attended to each other, are told the connectivity, go through a transformer that is
    causal over steps, and correct the vectors.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        slots = config.tokens_per_step
        self.analysis = nn.Linear(config.num_functions * config.patch_length, slots * config.codebook_dim)
        self.from_analysis = nn.Linear(config.codebook_dim, config.hidden_size)
        self.patch_embedding = nn.Linear(config.patch_length, config.hidden_size)
        self.connectivity = FmriCodecConnectivity(config)
        self.roi_layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_roi_layers))
        self.queries = nn.Parameter(torch.zeros(slots, config.hidden_size))
        self.read_layers = nn.ModuleList(FmriCodecLayer(config, cross=True) for _ in range(2))
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.to_codebook = nn.Linear(config.hidden_size, config.codebook_dim)

    def token_mask(self, roi_mask: torch.Tensor) -> torch.Tensor:
        """Tokens that hold data, bool [batch, tokens], by the ROIs that do [batch, steps, rois]."""
        return roi_mask.any(-1).repeat_interleave(len(self.queries), dim=1)

    def forward(
        self, patches: torch.Tensor, places: Places, times: torch.Tensor, roi_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        What is quantised, [batch, tokens, codebook_dim], of patches [batch, steps, rois, patch_length], zero where
        there are no data; times [steps, hidden]: embedding of each step; roi_mask bool [batch, steps, rois]: ROIs that
        hold data, None if all do.
        """
        batch, steps = patches.shape[:2]
        step_mask = keys = None
        if roi_mask is not None:
            step_mask = roi_mask.any(-1)
            # a step without data still needs something to attend to: its own zeros, masked out later
            keys = (roi_mask | ~step_mask[..., None]).flatten(0, 1)[:, None, None, :]
        states = (self.patch_embedding(patches) + places.embedded[:, None]).flatten(0, 1)
        for layer in self.roi_layers:
            states = layer(states, keys)
        coefficients = FmriCodecFunctions.coefficients(places.functions, patches, roi_mask)
        vectors = self.analysis(coefficients.flatten(2).to(patches.dtype)).unflatten(-1, (len(self.queries), -1))
        latents = self.queries + self.from_analysis(vectors).flatten(0, 1)
        for layer in self.read_layers:
            latents = layer(latents, keys, states)
        connectivity = self.connectivity(patches, places.embedded, roi_mask)
        latents = (latents.unflatten(0, (batch, steps)) + times[:, None] + connectivity).flatten(1, 2)
        mask = causal_mask(steps, len(self.queries), step_mask, states.device)
        for layer in self.layers:
            latents = layer(latents, mask)
        return vectors.flatten(1, 2) + self.to_codebook(self.norm(latents))


class LatentDecoder(nn.Module):
    """
    A linear map of a step's vectors gives the coefficients of the functions of place, to which a transformer over the
    latents, causal over steps, adds; a patch is the functions' sum at its place.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        slots, coefficients = config.tokens_per_step, config.num_functions * config.patch_length
        self.synthesis = nn.Linear(slots * config.codebook_dim, coefficients)
        self.from_codebook = nn.Linear(config.codebook_dim, config.hidden_size)
        self.slots = nn.Parameter(torch.zeros(slots, config.hidden_size))
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.to_coefficients = nn.Linear(config.hidden_size, coefficients)

    def forward(
        self, vectors: torch.Tensor, times: torch.Tensor, places: Places, token_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Patches [batch, steps, rois, patch_length] of vectors [batch, tokens, codebook_dim]; times [max_steps, hidden]:
        embedding of each step.
        """
        slots = len(self.slots)
        steps = vectors.shape[1] // slots
        vectors = vectors.unflatten(1, (steps, -1))
        states = (self.from_codebook(vectors) + self.slots + times[:steps, None]).flatten(1, 2)
        mask = causal_mask(steps, slots, hiding(token_mask[:, ::slots]), states.device)
        for layer in self.layers:
            states = layer(states, mask)
        corrections = self.to_coefficients(self.norm(states).unflatten(1, (steps, -1)).mean(2))
        coefficients = self.synthesis(vectors.flatten(2)) + corrections
        functions = places.functions[:, None].to(coefficients.dtype)
        return functions @ coefficients.unflatten(-1, (functions.shape[-1], -1))


__all__ = ["LatentDecoder", "LatentEncoder"]
