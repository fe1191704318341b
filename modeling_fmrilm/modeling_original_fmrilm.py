"""The encoder and the projector of the paper's official checkpoints, for weights that are converted from them."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_fmrilm import FmriLMConfig, FmriOriginalConfig


class FmriOriginalEncoder(PreTrainedModel):
    """
    A vision transformer over patches in time, one token for each ROI and patch, with one learned vector for each ROI
    and no position in time. Tokens are ROI-major, as the weights were trained: index = ROI * num_patches + patch.
    """

    config: FmriOriginalConfig
    base_model_prefix = "codec"
    main_input_name = "fmri_values"
    _no_split_modules = ["TransformerEncoderLayer"]
    # torch's own layers, which choose their kernel themselves
    _supports_sdpa = True

    def __init__(self, config: FmriOriginalConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(config.patch_length, config.hidden_size)
        self.roi_embedding = nn.Parameter(torch.zeros(config.num_rois, config.hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=config.layer_norm_eps,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Identity()
        if config.feature_dim is not None:
            self.head = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, config.feature_dim),
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FmriOriginalEncoder):
            init.normal_(module.roi_embedding, std=1.0)

    def encode_features(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Features [batch, tokens, dim] of fmri_values [batch, rois, time], and the mask [batch, tokens], all True: the
        weights know neither padding nor any ROIs but their own, whose coordinates they need not be told.
        """
        batch, *shape = fmri_values.shape
        expected = [self.config.num_rois, self.config.num_patches * self.config.patch_length]
        if shape != expected:
            raise ValueError(f"expected scans [rois, time] of {expected}, got {shape}")
        if fmri_mask is not None and not fmri_mask.all():
            raise ValueError(f"expected scans without padding, got a mask with {int((~fmri_mask).sum())} frames of it")
        patches = fmri_values.to(self.dtype).unflatten(-1, (self.config.num_patches, -1))
        states = (self.patch_embedding(patches) + self.roi_embedding[:, None]).flatten(1, 2)
        for layer in self.layers:
            states = layer(states)
        features = self.head(self.norm(states))
        return features, features.new_ones(features.shape[:2], dtype=torch.bool)


class FmriOriginalProjector(nn.Module):
    """Features [scans, num_patches, rois, dim], ROI-major tokens in rows of `rois`, to token embeddings."""

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        codec = config.codec_config
        self.num_patches = codec.num_patches
        self.input_proj = nn.Linear(codec.feature_dim or codec.hidden_size, config.text_config.hidden_size)
        self.roi_embedding = nn.Embedding(codec.num_rois, config.text_config.hidden_size)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        rois = self.roi_embedding.weight.repeat_interleave(self.num_patches, dim=0)
        return F.gelu(self.input_proj(vectors)) + rois.unflatten(0, vectors.shape[1:3])


__all__ = ["FmriOriginalEncoder", "FmriOriginalProjector"]
