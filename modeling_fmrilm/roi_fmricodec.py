"""Token layout "roi": one token for each ROI and step, as in the paper. Token index = step * rois + roi."""

import torch
from torch import nn

from .configuration_fmrilm import FmriCodecConfig
from .layers_fmricodec import FmriCodecLayer, Places, hiding


def key_mask(token_mask: torch.Tensor, steps: int) -> torch.Tensor:
    """
    What the tokens of each step may see of their own step and earlier ones, bool [batch, steps, 1, tokens], by
    token_mask [batch, tokens]. A step of padding sees itself, as softmax needs something; no other step sees it.
    """
    roi_mask = token_mask.unflatten(1, (steps, -1))
    own = torch.eye(steps, dtype=torch.bool, device=token_mask.device)[None, :, :, None]
    empty = ~roi_mask.any(-1)[:, :, None, None]
    return (roi_mask[:, None] | own & empty).flatten(2)[:, :, None]


class RoiLayers(nn.Module):
    """A transformer over the tokens of all ROIs and steps, causal over steps."""

    def __init__(self, config: FmriCodecConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: torch.Tensor, times: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """
        states [batch, steps, rois, hidden] to [batch, tokens, hidden]; times [steps, hidden]: embedding of each step;
        token_mask bool [batch, tokens]: tokens that hold data, None if all do.
        """
        steps = states.shape[1]
        states = (states + times[:, None]).flatten(1, 2)
        mask = None if token_mask is None else key_mask(token_mask, steps)
        for layer in self.layers:
            states = layer(states, mask, steps=steps)
        return self.norm(states)


class RoiEncoder(RoiLayers):
    def __init__(self, config: FmriCodecConfig):
        super().__init__(config, config.num_hidden_layers)
        self.patch_embedding = nn.Linear(config.patch_length, config.hidden_size)
        self.to_codebook = nn.Linear(config.hidden_size, config.codebook_dim)

    def token_mask(self, roi_mask: torch.Tensor) -> torch.Tensor:
        """Tokens that hold data, bool [batch, tokens], by the ROIs that do [batch, steps, rois]."""
        return roi_mask.flatten(1)

    def forward(
        self, patches: torch.Tensor, places: Places, times: torch.Tensor, roi_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        What is quantised, [batch, tokens, codebook_dim], of patches [batch, steps, rois, patch_length]; times
        [steps, hidden]: embedding of each step; roi_mask bool [batch, steps, rois]: ROIs that hold data, None if all
        do.
        """
        states = self.patch_embedding(patches) + places.embedded[:, None]
        states = super().forward(states, times, None if roi_mask is None else self.token_mask(roi_mask))
        return self.to_codebook(states)


class RoiDecoder(RoiLayers):
    """Decodes where the tokens are from: at the places of the scan's own ROIs, in their order."""

    def __init__(self, config: FmriCodecConfig):
        super().__init__(config, config.num_decoder_layers)
        self.from_codebook = nn.Linear(config.codebook_dim, config.hidden_size)
        self.to_patch = nn.Linear(config.hidden_size, config.patch_length)

    def forward(
        self, vectors: torch.Tensor, times: torch.Tensor, places: Places, token_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Patches [batch, steps, rois, patch_length] of vectors [batch, tokens, codebook_dim]; times [max_steps, hidden]:
        embedding of each step.
        """
        rois = places.embedded.shape[1]
        if vectors.shape[1] % rois:
            raise ValueError(
                f"the roi layout has one token for each ROI and step: expected a multiple of {rois} tokens, got "
                f"{vectors.shape[1]}"
            )
        states = self.from_codebook(vectors).unflatten(1, (-1, rois)) + places.embedded[:, None]
        states = super().forward(states, times[: states.shape[1]], hiding(token_mask))
        return self.to_patch(states).unflatten(1, (-1, rois))


__all__ = ["RoiDecoder", "RoiEncoder"]
