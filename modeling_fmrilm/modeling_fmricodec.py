"""The codec: fMRI to discrete tokens and back (stage 1, the paper's neural tokenizer)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_fmrilm import FmriCodecConfig
from .quantization_fmrilm import VectorQuantizer


# MNI coordinates are divided by this many mm before the Fourier features: it spans the brain once.
COORDINATE_SCALE = 100.0


@dataclass
class FmriCodecOutput(ModelOutput):
    """
    loss: weighted sum of the parts below. reconstruction: [batch, rois, time]. codes: int64 [batch, tokens],
    -1 on padding steps. descriptors: [batch, descriptors], in the units the head was trained on.
    codebook_usage: share of the codebook that occurs in this batch. perplexity: exp of the entropy of its codes.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    descriptor_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    descriptors: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FmriCodecAttention(nn.Module):
    """Attention of states [batch, queries, hidden] to context [batch, keys, hidden] under a boolean mask."""

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

    def forward(self, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.q_proj, states), (self.k_proj, context), (self.v_proj, context))
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(output.flatten(-2))


class FmriCodecLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer; with a context it attends to that in place of itself."""

    def __init__(self, config: FmriCodecConfig, cross: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if cross else None
        self.attention = FmriCodecAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor | None = None, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = self.attention_norm(states)
        states = states + self.attention(normed, normed if context is None else self.context_norm(context), mask)
        return states + self.mlp(self.mlp_norm(states))


class FmriCodecCoordinates(nn.Module):
    """Fourier features of MNI coordinates [..., 3] in mm, projected to [..., hidden]: any parcellation has them."""

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.num_frequencies = config.num_frequencies
        self.projection = nn.Linear(6 * config.num_frequencies, config.hidden_size)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        # half an octave apart: wavelengths from 400 mm down to the size of a parcel
        octaves = torch.arange(self.num_frequencies, device=coordinates.device, dtype=torch.float32) / 2
        angles = coordinates.float()[..., None] / COORDINATE_SCALE * (0.5 * math.pi * 2**octaves)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return self.projection(features.to(self.projection.weight.dtype))


class FmriCodecPreTrainedModel(PreTrainedModel):
    config: FmriCodecConfig
    base_model_prefix = "codec"
    main_input_name = "fmri_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FmriCodecLayer"]
    _supports_sdpa = True
    # moving averages in half precision would stop moving
    _keep_in_fp32_modules_strict = ["quantizer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VectorQuantizer):
            init.copy_(module.codebook, module.initial_codebook())
            init.zeros_(module.usage)
            init.zeros_(module.started)
        elif isinstance(module, FmriCodecModel):
            for embedding in (module.latent_queries, module.encoder_steps, module.decoder_steps, module.decoder_slots):
                init.normal_(embedding, std=self.config.initializer_range)


class FmriCodecModel(FmriCodecPreTrainedModel):
    """
    Cuts a scan into steps of `patch_length` frames and each step into `tokens_per_step` codes. Tokens are
    time-major: index = step * tokens_per_step + slot. A code depends on its own and earlier steps alone, so that
    predicting the next one is not looking it up.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(config.patch_length, config.hidden_size)
        self.coordinates = FmriCodecCoordinates(config)
        self.roi_layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_roi_layers))
        self.latent_queries = nn.Parameter(torch.zeros(config.tokens_per_step, config.hidden_size))
        self.read_layers = nn.ModuleList(FmriCodecLayer(config, cross=True) for _ in range(2))
        self.encoder_steps = nn.Parameter(torch.zeros(config.max_steps, config.hidden_size))
        self.encoder_layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.to_codebook = nn.Linear(config.hidden_size, config.codebook_dim)
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.codebook_dim, config.ema_decay, config.revival_threshold
        )
        self.from_codebook = nn.Linear(config.codebook_dim, config.hidden_size)
        self.decoder_slots = nn.Parameter(torch.zeros(config.tokens_per_step, config.hidden_size))
        self.decoder_steps = nn.Parameter(torch.zeros(config.max_steps, config.hidden_size))
        self.decoder_layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(config.num_decoder_layers))
        self.write_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.write_attention = FmriCodecAttention(config)
        self.decoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.to_patch = nn.Linear(config.hidden_size, config.patch_length)
        self.descriptor_head = None
        if config.descriptor_names:
            self.descriptor_head = nn.Sequential(
                nn.Linear(config.tokens_per_step * config.codebook_dim, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, len(config.descriptor_names)),
            )
        self.post_init()

    def encode(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Codes int64 [batch, tokens] of fmri_values [batch, rois, time] (robust z-scores) at roi_coordinates
        [batch, rois, 3] (MNI mm); -1 on steps that fmri_mask [batch, rois, time] declares padding.
        """
        latents, step_mask = self._latents(fmri_values, roi_coordinates, fmri_mask)
        codes = self.quantizer.encode(self.to_codebook(latents))
        return codes.masked_fill(~self._token_mask(step_mask), -1)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors [..., codebook_dim] of codes [...]."""
        return self.quantizer.embed(codes)

    def decode(self, codes: torch.Tensor, roi_coordinates: torch.Tensor) -> torch.Tensor:
        """Signal [batch, rois, time] of codes [batch, tokens] at any coordinates [batch, rois, 3] (MNI mm)."""
        step_mask = codes[:, :: self.config.tokens_per_step] >= 0
        return self._signal(self.embed_codes(codes.clamp(min=0)), roi_coordinates, step_mask)

    def forward(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
        descriptors: torch.Tensor | None = None,
        quantize: bool = True,
        **kwargs,
    ) -> FmriCodecOutput:
        """
        Args:
            descriptors: standardised targets [batch, descriptors] of the descriptor head, NaN where unknown.
            quantize: False lets the unit-length latents through unrounded, for the first steps of training.
        """
        latents, step_mask = self._latents(fmri_values, roi_coordinates, fmri_mask)
        token_mask = self._token_mask(step_mask)
        vectors = self.to_codebook(latents)
        if quantize:
            vectors, codes, commitment_loss = self.quantizer(vectors, token_mask)
        else:
            vectors = F.normalize(vectors.float(), dim=-1)
            codes, commitment_loss = self.quantizer.encode(vectors), vectors.new_zeros(())
        reconstruction = self._signal(vectors, roi_coordinates, step_mask)[..., : fmri_values.shape[-1]]
        error = (reconstruction - fmri_values).pow(2)
        reconstruction_loss = error.mean() if fmri_mask is None else error[fmri_mask].mean()
        loss = reconstruction_loss + self.config.commitment_weight * commitment_loss
        described, descriptor_loss = None, None
        if self.descriptor_head is not None:
            described = self._describe(vectors, step_mask)
            if descriptors is not None:
                known = ~descriptors.isnan()
                # a batch may know none of them
                descriptor_loss = (described - descriptors)[known].pow(2).sum() / known.sum().clamp(min=1)
                loss = loss + self.config.descriptor_weight * descriptor_loss
        counts = torch.bincount(codes[token_mask], minlength=self.config.codebook_size).float()
        entropy = torch.special.entr(counts / counts.sum()).sum()
        return FmriCodecOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            commitment_loss=commitment_loss,
            descriptor_loss=descriptor_loss,
            reconstruction=reconstruction,
            codes=codes.masked_fill(~token_mask, -1),
            descriptors=described,
            codebook_usage=(counts > 0).float().mean(),
            perplexity=entropy.exp(),
        )

    def _token_mask(self, step_mask: torch.Tensor) -> torch.Tensor:
        return step_mask.repeat_interleave(self.config.tokens_per_step, dim=1)

    def _attention_mask(self, step_mask: torch.Tensor) -> torch.Tensor:
        """
        What tokens may see, bool [batch, 1, tokens, tokens]: their own step and earlier ones that hold data. A step
        of padding sees itself as well, as softmax needs something, but no other step sees it.
        """
        tokens = step_mask.shape[1] * self.config.tokens_per_step
        step = torch.arange(tokens, device=step_mask.device) // self.config.tokens_per_step
        past, own = step[None, :] < step[:, None], step[None, :] == step[:, None]
        return (past & self._token_mask(step_mask)[:, None, :] | own)[:, None]

    def _latents(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor, fmri_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states [batch, tokens, hidden] and the mask [batch, steps] of the steps that hold data."""
        batch, rois, time = fmri_values.shape
        if roi_coordinates.shape != (batch, rois, 3):
            raise ValueError(
                f"expected roi_coordinates of shape {(batch, rois, 3)}, got {tuple(roi_coordinates.shape)}"
            )
        if fmri_mask is None:
            fmri_mask = torch.ones_like(fmri_values, dtype=torch.bool)
        if fmri_mask.shape != fmri_values.shape:
            raise ValueError(f"expected fmri_mask of shape {(batch, rois, time)}, got {tuple(fmri_mask.shape)}")
        if not fmri_mask.flatten(1).any(-1).all():
            raise ValueError("expected data in every scan of the batch, got a scan whose fmri_mask is all False")
        steps = math.ceil(time / self.config.patch_length)
        if steps > self.config.max_steps:
            raise ValueError(f"expected at most max_steps={self.config.max_steps} steps, got {steps}")
        padding = (0, steps * self.config.patch_length - time)
        values = F.pad(fmri_values.masked_fill(~fmri_mask, 0), padding).unflatten(-1, (steps, -1)).transpose(1, 2)
        roi_mask = F.pad(fmri_mask, padding).unflatten(-1, (steps, -1)).any(-1).transpose(1, 2)
        step_mask = roi_mask.any(-1)
        # a step without data still needs something to attend to: its own zeros, masked out later
        keys = (roi_mask | ~step_mask[..., None]).flatten(0, 1)[:, None, None, :]
        states = self.patch_embedding(values.to(self.dtype)) + self.coordinates(roi_coordinates)[:, None]
        states = states.flatten(0, 1)
        for layer in self.roi_layers:
            states = layer(states, keys)
        latents = self.latent_queries.expand(batch * steps, -1, -1)
        for layer in self.read_layers:
            latents = layer(latents, keys, states)
        latents = (latents.unflatten(0, (batch, steps)) + self.encoder_steps[:steps, None]).flatten(1, 2)
        mask = self._attention_mask(step_mask)
        for layer in self.encoder_layers:
            latents = layer(latents, mask)
        return self.encoder_norm(latents), step_mask

    def _signal(
        self, vectors: torch.Tensor, roi_coordinates: torch.Tensor, step_mask: torch.Tensor
    ) -> torch.Tensor:
        batch, tokens, _ = vectors.shape
        steps = tokens // self.config.tokens_per_step
        states = self.from_codebook(vectors.to(self.dtype)).unflatten(1, (steps, -1))
        states = (states + self.decoder_slots + self.decoder_steps[:steps, None]).flatten(1, 2)
        mask = self._attention_mask(step_mask)
        for layer in self.decoder_layers:
            states = layer(states, mask)
        queries = self.write_norm(self.coordinates(roi_coordinates))
        queries = queries[:, None].expand(-1, steps, -1, -1).flatten(0, 1)
        context = states.unflatten(1, (steps, -1)).flatten(0, 1)
        # attention alone: each ROI is a coordinate-dependent mixture of what the slots hold
        patches = self.to_patch(self.write_attention(queries, self.decoder_norm(context), None))
        return patches.unflatten(0, (batch, steps)).transpose(1, 2).flatten(-2)

    def _describe(self, vectors: torch.Tensor, step_mask: torch.Tensor) -> torch.Tensor:
        weights = step_mask.to(vectors.dtype) / step_mask.sum(1, keepdim=True)
        slots = vectors.unflatten(1, (step_mask.shape[1], -1))
        pooled = torch.einsum("bs,bskd->bkd", weights, slots).flatten(1)
        return self.descriptor_head(pooled.to(self.dtype)).float()

    def encode_features(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor, fmri_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What `encode` rounds to codes: unit vectors [batch, tokens, codebook_dim], and the mask [batch, tokens] of
        the tokens that hold data.
        """
        latents, step_mask = self._latents(fmri_values, roi_coordinates, fmri_mask)
        return F.normalize(self.to_codebook(latents).float(), dim=-1), self._token_mask(step_mask)


__all__ = ["FmriCodecModel", "FmriCodecOutput", "FmriCodecPreTrainedModel"]
