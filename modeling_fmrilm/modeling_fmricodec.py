"""The codec: fMRI to discrete tokens and back (stage 1, the paper's neural tokenizer)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .alignment_fmricodec import FmriCodecAlignment
from .configuration_fmrilm import FmriCodecConfig
from .connectivity_fmricodec import FmriCodecConnectivity
from .fsq_fmrilm import FiniteScalarQuantizer
from .functions_fmricodec import FmriCodecFunctions
from .latent_fmricodec import LatentDecoder, LatentEncoder
from .layers_fmricodec import FmriCodecCoordinates, FmriCodecLayer, Places, hiding
from .pooling_fmricodec import FmriCodecPooling, pooling_places
from .quantization_fmrilm import VectorQuantizer
from .roi_fmricodec import RoiDecoder, RoiEncoder


@dataclass
class FmriCodecOutput(ModelOutput):
    """
    loss: weighted sum of the parts below. reconstruction: [batch, rois, time]. codes: int64 [batch, tokens],
    -1 on padding. descriptors: [batch, descriptors], in the units the head was trained on. scan_embeddings:
    [batch, alignment_size], unit vectors to compare with the alignment head's embeddings of texts.
    codebook_usage: share of the codebook that occurs in this batch. perplexity: exp of the entropy of its codes.
    hidden_states: on request, input and outputs of the encoder's `num_hidden_layers`, [batch, tokens, hidden] each.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    descriptor_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    domain_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    descriptors: torch.Tensor | None = None
    scan_embeddings: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class FmriCodecPreTrainedModel(PreTrainedModel):
    config: FmriCodecConfig
    base_model_prefix = "codec"
    main_input_name = "fmri_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FmriCodecLayer"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": OutputRecorder(FmriCodecLayer, layer_name="encoder.layers")}
    # moving averages in half precision would stop moving
    _keep_in_fp32_modules_strict = ["quantizer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VectorQuantizer):
            init.copy_(module.codebook, module.initial_codebook())
            init.zeros_(module.usage)
            init.zeros_(module.started)
        elif isinstance(module, FmriCodecAlignment | FmriCodecConnectivity | FmriCodecFunctions | FmriCodecPooling):
            module.init_weights()
        elif isinstance(module, FmriCodecModel):
            embeddings = [module.encoder_steps, module.decoder_steps]
            if self.config.token_layout == "latent":
                embeddings = [module.encoder.queries, *embeddings, module.decoder.slots]
            for embedding in embeddings:
                init.normal_(embedding, std=self.config.initializer_range)


class FmriCodecModel(FmriCodecPreTrainedModel):
    """
    Cuts a scan into steps of `patch_length` frames and each step into codes: `tokens_per_step` of them, or one for
    each ROI, by the token layout. Tokens are time-major: index = step * tokens of a step + slot (or ROI). A code
    depends on its own and earlier steps alone, so that predicting the next one is not looking it up.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__(config)
        latent = config.token_layout == "latent"
        self.coordinates = FmriCodecCoordinates(config)
        self.functions = FmriCodecFunctions(config) if latent else None
        self.encoder_steps = nn.Parameter(torch.zeros(config.max_steps, config.hidden_size))
        self.encoder = LatentEncoder(config) if latent else RoiEncoder(config)
        if config.fsq_levels:
            self.quantizer = FiniteScalarQuantizer(config.fsq_levels)
        else:
            self.quantizer = VectorQuantizer(
                config.codebook_size, config.codebook_dim, config.ema_decay, config.revival_threshold
            )
        self.decoder_steps = nn.Parameter(torch.zeros(config.max_steps, config.hidden_size))
        self.decoder = LatentDecoder(config) if latent else RoiDecoder(config)
        self.pooling = FmriCodecPooling() if latent else None
        pooled_size = config.codebook_dim if self.pooling is None else self.pooling.size
        self.descriptor_head = (
            nn.Linear(pooled_size, len(config.descriptor_names)) if config.descriptor_names else None
        )
        self.alignment = FmriCodecAlignment(config, pooled_size) if config.text_hidden_size else None
        self.post_init()

    def encode(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor | None,
        fmri_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Codes int64 [batch, tokens] of fmri_values [batch, rois, time] (robust z-scores) at roi_coordinates
        [batch, rois, 3] (MNI mm); -1 on tokens without any data by fmri_mask [batch, rois, time] (False is padding):
        on padding steps, in the roi layout on padding ROIs as well.
        """
        vectors, token_mask = self._vectors(fmri_values, roi_coordinates, fmri_mask)
        return self.quantizer.encode(vectors).masked_fill(~token_mask, -1)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors [..., codebook_dim] of codes [...]."""
        return self.quantizer.embed(codes)

    def decode(self, codes: torch.Tensor, roi_coordinates: torch.Tensor) -> torch.Tensor:
        """
        Signal [batch, rois, time] of codes [batch, tokens] at any coordinates [batch, rois, 3] (MNI mm); in the roi
        layout at those that were encoded.
        """
        return self.decode_vectors(self.embed_codes(codes.clamp(min=0)), roi_coordinates, codes >= 0)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
        descriptors: torch.Tensor | None = None,
        text_embeddings: torch.Tensor | None = None,
        word_embeddings: torch.Tensor | None = None,
        reversal: float = 1.0,
        quantize: bool = True,
        **kwargs,
    ) -> FmriCodecOutput:
        """
        Args:
            descriptors: standardised targets [batch, descriptors] of the descriptor head, NaN where unknown.
            text_embeddings: frozen embeddings [batch, text_hidden_size] of the scans' descriptions.
            word_embeddings: rows [words, text_hidden_size] of the frozen language model's input embeddings.
            reversal: factor of the domain loss's reversed gradient (see `reversal_strength`).
            quantize: False lets the vectors through unrounded, for the first steps of training.
        """
        vectors, token_mask = self._vectors(fmri_values, roi_coordinates, fmri_mask)
        if quantize:
            vectors, codes, commitment_loss = self.quantizer(vectors, token_mask)
        else:
            vectors = self.quantizer.continuous(vectors)
            codes, commitment_loss = self.quantizer.encode(vectors), vectors.new_zeros(())
        reconstruction = self.decode_vectors(vectors, roi_coordinates, token_mask)[..., : fmri_values.shape[-1]]
        error = (reconstruction - fmri_values).pow(2)
        reconstruction_loss = error.mean() if fmri_mask is None else error[fmri_mask].mean()
        loss = reconstruction_loss + self.config.commitment_weight * commitment_loss
        pooled = self.pool(vectors, token_mask)
        described = descriptor_loss = alignment_loss = domain_loss = scan_embeddings = None
        if self.descriptor_head is not None:
            described = self.descriptor_head(pooled.to(self.dtype)).float()
            if descriptors is not None:
                known = ~descriptors.isnan()
                # a batch may know none of them
                descriptor_loss = (described - descriptors)[known].pow(2).sum() / known.sum().clamp(min=1)
                loss = loss + self.config.descriptor_weight * descriptor_loss
        if self.alignment is not None:
            scan_embeddings = self.alignment.embed_scans(pooled)
            if text_embeddings is not None:
                alignment_loss = self.alignment.siglip(scan_embeddings, text_embeddings)
                loss = loss + self.config.alignment_weight * alignment_loss
            if word_embeddings is not None:
                domain_loss = self.alignment.tell_apart(vectors[token_mask], word_embeddings, reversal)
                loss = loss + self.config.domain_weight * domain_loss
        counts = torch.bincount(codes[token_mask], minlength=self.config.codebook_size).float()
        entropy = torch.special.entr(counts / counts.sum()).sum()
        return FmriCodecOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            commitment_loss=commitment_loss,
            descriptor_loss=descriptor_loss,
            alignment_loss=alignment_loss,
            domain_loss=domain_loss,
            reconstruction=reconstruction,
            codes=codes.masked_fill(~token_mask, -1),
            descriptors=described,
            scan_embeddings=scan_embeddings,
            codebook_usage=(counts > 0).float().mean(),
            perplexity=entropy.exp(),
        )

    def _vectors(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor | None, fmri_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is quantised, [batch, tokens, codebook_dim], and the tokens that hold data, bool [batch, tokens]."""
        batch, rois, time = fmri_values.shape
        expected = (batch, rois, 3)
        if roi_coordinates is None or roi_coordinates.shape != expected:
            got = None if roi_coordinates is None else tuple(roi_coordinates.shape)
            raise ValueError(f"expected roi_coordinates of shape {expected}, got {got}")
        if fmri_mask is not None:
            if fmri_mask.shape != fmri_values.shape:
                raise ValueError(f"expected fmri_mask of shape {(batch, rois, time)}, got {tuple(fmri_mask.shape)}")
            # a question about values would cut a compiled graph in two
            if not torch.compiler.is_compiling() and not fmri_mask.flatten(1).any(-1).all():
                raise ValueError("expected data in every scan of the batch, got a scan whose fmri_mask is all False")
        steps = math.ceil(time / self.config.patch_length)
        if steps > self.config.max_steps:
            raise ValueError(f"expected at most max_steps={self.config.max_steps} steps, got {steps}")
        padding = (0, steps * self.config.patch_length - time)
        if fmri_mask is None:
            encoder_mask, roi_mask = None, fmri_values.new_ones(batch, steps, rois, dtype=torch.bool)
        else:
            fmri_values = fmri_values.masked_fill(~fmri_mask, 0)
            roi_mask = F.pad(fmri_mask, padding).unflatten(-1, (steps, -1)).any(-1).transpose(1, 2)
            encoder_mask = hiding(roi_mask)
        patches = F.pad(fmri_values, padding).unflatten(-1, (steps, -1)).transpose(1, 2).to(self.dtype)
        vectors = self.encoder(patches, self._places(roi_coordinates), self.encoder_steps[:steps], encoder_mask)
        return vectors, self.encoder.token_mask(roi_mask)

    def _places(self, roi_coordinates: torch.Tensor) -> Places:
        embedded = self.coordinates(roi_coordinates)
        return Places(embedded, embedded[..., :0] if self.functions is None else self.functions(roi_coordinates))

    def decode_vectors(
        self, vectors: torch.Tensor, roi_coordinates: torch.Tensor, token_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        As `decode`, of vectors [batch, tokens, codebook_dim], which may lie between those of the codebook; token_mask
        bool [batch, tokens]: tokens that hold data.
        """
        patches = self.decoder(vectors.to(self.dtype), self.decoder_steps, self._places(roi_coordinates), token_mask)
        return patches.transpose(1, 2).flatten(-2)

    def describe(self, vectors: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """
        Standardised descriptors float32 [batch, descriptors] of scans as the head reads them from vectors
        [batch, tokens, codebook_dim], of codes or unrounded; token_mask [batch, tokens] is False on padding.
        """
        if self.descriptor_head is None:
            raise ValueError("expected a codec with descriptor_names, got one that describes nothing")
        # correlations in half precision are half as good
        with maybe_autocast(vectors.device.type, enabled=False):
            return self.descriptor_head(self.pool(vectors, token_mask).to(self.dtype)).float()

    def pool(self, vectors: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """
        One vector a scan of vectors [batch, tokens, codebook_dim]: in the latent layout by `FmriCodecPooling`, in the
        roi layout their mean; token_mask [batch, tokens] is False on padding.
        """
        if self.pooling is not None:
            return self.pooling(*self.decode_at_pooling_places(vectors, token_mask))
        weights = token_mask.to(vectors.dtype)
        return torch.einsum("bn,bnd->bd", weights / weights.sum(1, keepdim=True), vectors)

    def decode_at_pooling_places(
        self, vectors: torch.Tensor, token_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pooling takes: signals [batch, places, time], and the frames bool [batch, time] that hold data."""
        places = pooling_places().to(vectors.device).expand(len(vectors), -1, -1)
        frames = token_mask[:, :: self.config.tokens_per_step].repeat_interleave(self.config.patch_length, dim=1)
        return self.decode_vectors(vectors, places, token_mask), frames

    def encode_features(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor | None,
        fmri_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What `encode` rounds to codes: vectors float32 [batch, tokens, codebook_dim] (of unit length for "vq", in -1..1
        for "fsq") and the mask bool [batch, tokens] of the tokens that hold data.
        """
        vectors, token_mask = self._vectors(fmri_values, roi_coordinates, fmri_mask)
        return self.quantizer.continuous(vectors), token_mask


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriCodecModel.register_for_auto_class("AutoModel")

__all__ = ["FmriCodecModel", "FmriCodecOutput", "FmriCodecPreTrainedModel"]
