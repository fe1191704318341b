"""The language model that reads fMRI: a frozen codec, a projector and any causal language model (stages 2 and 3)."""

import os
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput, can_return_tuple

from .autoregression_fmrilm import FmriLMAutoregression
from .backbones_fmrilm import check_backbone
from .configuration_fmrilm import FmriLMConfig
from .descriptors_fmrilm import FmriLMDescriptorTokens, descriptor_places
from .forecast_fmrilm import FmriLMForecastMixin
from .generation_fmrilm import FmriLMGenerationMixin
from .losses_fmrilm import IGNORED, FmriLMLossMixin
from .modeling_fmricodec import FmriCodecModel
from .modeling_original_fmrilm import FmriOriginalEncoder, FmriOriginalProjector
from .pipeline_fmrilm import CUSTOM_PIPELINES
from .projector_fmrilm import FmriLMProjector
from .steps_fmrilm import attention_masks, check_context, positions, step_ids


# what a saved folder can be opened with; register_for_auto_class alone writes one Auto class per class
AUTO_MAP = {
    "AutoConfig": "configuration_fmrilm.FmriLMConfig",
    "AutoModel": "modeling_fmrilm.FmriLMModel",
    "AutoModelForCausalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
}


@dataclass
class FmriLMOutput(ModelOutput):
    """
    loss: text_loss + fmri_loss_weight * fmri_loss, of those that have labels. text_loss: mean cross-entropy of the
    labelled text. fmri_loss: mean cross-entropy of the next step's codes. logits: [batch, length, vocabulary].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    fmri_loss: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# what reads a scan, and what carries it to the language model, by the model type of `codec_config`
CODECS = {
    "fmri_codec": (FmriCodecModel, FmriLMProjector),
    "fmri_original": (FmriOriginalEncoder, FmriOriginalProjector),
}


class FmriLMPreTrainedModel(PreTrainedModel):
    config: FmriLMConfig
    base_model_prefix = "model"
    input_modalities = ["text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FmriLMProjector):
            init.normal_(module.slots.weight, std=1.0)
        elif isinstance(module, FmriLMAutoregression | FmriLMDescriptorTokens):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        loaded = super().from_pretrained(*args, **kwargs)
        # loading makes anew what the constructor had frozen; with output_loading_info, it gives two things
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        return cast(Self, loaded)

    def freeze(self) -> None:
        """Of the codec and of what is fitted to its codes alone, nothing is trained here."""
        for module in self.modules():
            if isinstance(module, FmriCodecModel | FmriOriginalEncoder | FmriLMAutoregression):
                module.requires_grad_(False)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = dict(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)


class FmriLMModel(FmriLMPreTrainedModel):
    """Text and scans to hidden states. The codec is frozen here: its output is input, not something to train."""

    def __init__(self, config: FmriLMConfig):
        super().__init__(config)
        codec_class, projector_class = CODECS[config.codec_config.model_type]
        self.codec = codec_class._from_config(config.codec_config)
        self.projector = projector_class(config)
        self.descriptors = FmriLMDescriptorTokens(config) if config.descriptor_token_ids else None
        # the tokens around a scan: apart from the vocabulary, so that they can be trained where that is frozen
        self.boundaries = nn.Embedding(2, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def get_fmri_codes(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor | None, fmri_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes int64 [scans, tokens], -1 on padding, of the scans (see [`FmriCodecModel.encode`])."""
        codes = self.codec.encode(fmri_values, roi_coordinates, fmri_mask)
        config = self.config.codec_config
        if config.token_layout == "roi":
            # the language model knows a ROI by its slot
            rois = (codes >= 0).unflatten(1, (-1, fmri_values.shape[1])).sum(-1)
            if ((rois > 0) & (rois != config.tokens_per_step)).any() or fmri_values.shape[1] != config.tokens_per_step:
                raise ValueError(
                    "the roi layout takes scans of one parcellation: expected tokens_per_step="
                    f"{config.tokens_per_step} ROIs with data in each step, got between {int(rois[rois > 0].min())} "
                    f"and {int(rois.max())} of {fmri_values.shape[1]}"
                )
        return codes

    @torch.no_grad()
    def read_scans(
        self,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_features: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        What `fmri_input` says the language model reads of the scans: codes [scans, tokens], -1 on padding, or
        features [scans, tokens, dim], NaN on padding; None without a scan.
        """
        if self.config.fmri_input == "codes":
            if fmri_features is not None:
                raise ValueError('expected scans or codes of a model with fmri_input="codes", got fmri_features')
            if fmri_codes is None and fmri_values is not None:
                return self.get_fmri_codes(fmri_values, roi_coordinates, fmri_mask)
            return fmri_codes
        if fmri_features is None and fmri_values is not None:
            features, valid = self.codec.encode_features(fmri_values, roi_coordinates, fmri_mask)
            return features.masked_fill(~valid[..., None], float("nan"))
        if fmri_features is None and fmri_codes is not None:
            raise ValueError(
                'expected fmri_values or fmri_features, which a model with fmri_input="features" reads, got fmri_codes'
            )
        return fmri_features

    def scan_vectors(self, scans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [scans, tokens, dim] of codes or features, and where there is no padding [scans, tokens]."""
        if scans.is_floating_point():
            return scans.nan_to_num(), ~scans.isnan().any(-1)
        return self.codec.embed_codes(scans.clamp(min=0)), scans >= 0

    def describe_scans(self, scans: torch.Tensor) -> torch.Tensor:
        """Standardised descriptors [scans, descriptors] that the codec tells from what `read_scans` gives."""
        return self.codec.describe(*self.scan_vectors(scans))

    def get_fmri_features(self, scans: torch.Tensor) -> torch.Tensor:
        """
        Projected embeddings [valid tokens, hidden] of what `read_scans` gives, or of vectors between those of the
        codebook, scan after scan, no padding.
        """
        vectors, valid = self.scan_vectors(scans)
        vectors = vectors.to(self.projector.input_proj.weight.dtype)
        # padding follows the last step, so that no mean before it contains any
        steps = vectors.unflatten(1, (-1, self.config.codec_config.tokens_per_step))
        return self.projector(steps).flatten(1, 2)[valid]

    def embed(self, input_ids: torch.Tensor, scans: torch.Tensor | None) -> torch.Tensor:
        """
        Embeddings [batch, length, hidden] of text, at the placeholders of what `read_scans` gives, and at descriptor
        tokens of what the codec tells of the scan before them.
        """
        is_fmri = input_ids == self.config.fmri_token_id
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_fmri, 0))
        boundaries = (self.config.fmri_start_token_id, self.config.fmri_end_token_id)
        for token, embedding in zip(boundaries, self.boundaries.weight, strict=True):
            embeddings = torch.where((input_ids == token)[..., None], embedding.to(embeddings.dtype), embeddings)
        features = embeddings.new_zeros(0, 1) if scans is None else self.get_fmri_features(scans)
        if len(features) != is_fmri.sum():
            raise ValueError(
                f"expected {len(features)} fMRI placeholder tokens for the scans, got {int(is_fmri.sum())}"
            )
        if len(features):
            embeddings = embeddings.masked_scatter(is_fmri[..., None], features.to(embeddings.dtype))
        if self.descriptors is not None and self.config.descriptor_token_ids:
            rows, places, found, names = descriptor_places(input_ids, is_fmri, self.config.descriptor_token_ids)
            if scans is not None and len(rows):
                words = self.descriptors(self.describe_scans(scans))[found, names]
                embeddings = embeddings.index_put((rows, places), words.to(embeddings.dtype))
        return embeddings

    def step_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See [`step_ids`]."""
        return step_ids(input_ids, self.config.fmri_token_id, self.config.codec_config.tokens_per_step)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [batch, length] with one placeholder for each code.
            attention_mask: [batch, cached + length], or masks made already.
            fmri_values, roi_coordinates, fmri_mask: the scans in order of appearance, [scans, rois, time],
                [scans, rois, 3], [scans, rois, time]; or what `read_scans` makes of them in their place: fmri_codes
                [scans, tokens], or with `fmri_input="features"` fmri_features [scans, tokens, dim].
            inputs_embeds: [batch, length, hidden] in place of input_ids, scans and all.
            mm_token_type_ids: step ids of the cached and the given tokens; derived from input_ids when absent, which
                takes position_ids where something is cached.
        """
        if input_ids is not None and inputs_embeds is None:
            scans = self.read_scans(fmri_values, roi_coordinates, fmri_mask, fmri_codes, fmri_features)
            inputs_embeds = self.embed(input_ids, scans)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("expected either input_ids or inputs_embeds, got both or neither")
        elif any(scans is not None for scans in (fmri_values, fmri_codes, fmri_features)):
            raise ValueError("expected inputs_embeds with the scans in them, got inputs_embeds and scans")
        length = inputs_embeds.shape[1]
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if mm_token_type_ids is None:
            if cached and position_ids is None:
                raise ValueError(
                    f"expected mm_token_type_ids of the {cached} cached and the {length} given tokens, or "
                    "position_ids: the cache does not tell which tokens share a position"
                )
            if input_ids is None:
                mm_token_type_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
            else:
                mm_token_type_ids = self.step_ids(input_ids)
            mm_token_type_ids = F.pad(mm_token_type_ids, (cached, 0))
        if not isinstance(attention_mask, dict) and (attention_mask is None or attention_mask.ndim == 2):
            if attention_mask is None:
                # generation hands over the step ids of the new tokens alone, and no mask where all would be ones
                attention_mask = mm_token_type_ids.new_ones(len(mm_token_type_ids), cached + length)
            if position_ids is None:
                position_ids = positions(mm_token_type_ids, attention_mask)[:, -length:]
            text_config = self.config.get_text_config()
            check_context(text_config, position_ids, mm_token_type_ids)
            attention_mask = attention_masks(
                text_config, inputs_embeds, attention_mask, past_key_values, position_ids, mm_token_type_ids
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class FmriLMForConditionalGeneration(
    FmriLMPreTrainedModel, FmriLMLossMixin, FmriLMGenerationMixin, FmriLMForecastMixin
):
    """
    Text about scans, and codes of the next step. `lm_head` speaks words. At slot k of step t, the code that slot k of
    step t+1 will hold is predicted: by `fmri_autoregression` from the codes, to which `fmri_head` adds what the
    language model makes of them.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FmriLMConfig):
        super().__init__(config)
        self.model = FmriLMModel(config)
        hidden_size = config.text_config.hidden_size
        self.lm_head = nn.Linear(hidden_size, config.text_config.vocab_size, bias=False)
        codebook_size = config.codec_config.codebook_size
        self.fmri_head = nn.Linear(hidden_size, codebook_size, bias=False) if codebook_size else None
        self.fmri_autoregression = FmriLMAutoregression(config) if codebook_size else None
        if config.tie_word_embeddings:
            embeddings = self.get_input_embeddings()
            name = next(name for name, module in self.model.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()
        self.freeze()

    @classmethod
    def from_parts(
        cls, codec: FmriCodecModel, language_model: PreTrainedModel, config: FmriLMConfig
    ) -> "FmriLMForConditionalGeneration":
        """
        A new joint model from a trained codec and a pretrained causal language model (both are copied). ValueError for
        a language model that cannot read scans.
        """
        check_backbone(language_model)
        head = language_model.get_output_embeddings()
        if head is None:
            raise ValueError(f"expected a causal language model, got {type(language_model).__name__}, without a head")
        joint = cls(config)
        joint.model.codec.load_state_dict(codec.state_dict())
        joint.model.language_model.load_state_dict(language_model.base_model.state_dict())
        joint.lm_head.load_state_dict(head.state_dict())
        joint.tie_weights()
        # what a scan brings enters at the size of word embeddings
        words = joint.get_input_embeddings().get_parameter("weight").detach()
        with torch.no_grad():
            joint.model.projector.output_norm.weight.fill_(words.pow(2).mean().sqrt())
            joint.model.boundaries.weight.copy_(words.mean(0))
        return joint

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_fmri_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> FmriLMOutput:
        """
        labels: [batch, length], -100 where text carries no loss. The codes of the next step are predicted whenever
        labels are given with a scan or its codes. num_items_in_batch, num_fmri_items_in_batch: labels of text and of
        next codes in the whole of an accumulated batch, of which this is a part; without the second, the first one's
        share goes for both. The other arguments are those of [`FmriLMModel.forward`]. In training mode with labels
        there are no logits: only labelled positions meet the vocabulary, most of the head's work is saved.
        """
        predicts_codes = labels is not None and self.fmri_head is not None
        if predicts_codes and fmri_codes is None and fmri_values is not None:
            fmri_codes = self.model.get_fmri_codes(fmri_values, roi_coordinates, fmri_mask)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            fmri_values=fmri_values,
            roi_coordinates=roi_coordinates,
            fmri_mask=fmri_mask,
            fmri_codes=fmri_codes,
            fmri_features=fmri_features,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = text_loss = fmri_loss = logits = None
        if labels is not None:
            text_loss = self.text_loss(hidden, labels)
            # a part's share of an accumulated batch: the shares sum to one
            share = fmri_share = 1.0
            if num_items_in_batch is not None and num_items_in_batch > 0:
                share = fmri_share = (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
            loss = share * text_loss
            # scans come with input_ids: `FmriLMModel` has seen to it
            if predicts_codes and fmri_codes is not None and input_ids is not None:
                fmri_loss = self.next_step_loss(hidden, input_ids, fmri_codes)
                if num_fmri_items_in_batch is not None:
                    fmri_share = self.next_codes(fmri_codes).numel() / num_fmri_items_in_batch
                loss = loss + self.config.fmri_loss_weight * fmri_share * fmri_loss
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        return FmriLMOutput(
            loss=loss,
            logits=logits,
            text_loss=text_loss,
            fmri_loss=fmri_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMModel.register_for_auto_class("AutoModel")
FmriLMForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["FmriLMForConditionalGeneration", "FmriLMModel", "FmriLMOutput", "FmriLMPreTrainedModel"]
