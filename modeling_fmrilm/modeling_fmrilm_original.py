"""
The paper's official checkpoints, converted (`fmrilm convert-original`): model, configuration and processor in one
file, which ships with converted folders alone. They read continuous features of exactly one scan in a prompt, with
the attention mask and the position ids of the official code.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pipeline_fmrilm import CUSTOM_PIPELINES


FMRI_PAD = "<|fmri_pad|>"
AUTO_MAP = {
    "AutoConfig": "modeling_fmrilm_original.FmriOriginalConfig",
    "AutoModelForCausalLM": "modeling_fmrilm_original.FmriOriginalForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fmrilm_original.FmriOriginalForConditionalGeneration",
}


class FmriOriginalConfig(PreTrainedConfig):
    """
    Configuration of [`FmriOriginalForConditionalGeneration`]. The defaults are the released base size.

    Args:
        text_config: the causal language model.
        fmri_token_id: the added token in whose place the model puts a scan's features.
        median, iqr: centre and spread of all signals in the units of the scans; what the encoder reads is
            (signal - median) / iqr.
        num_rois: ROIs of the one atlas that the weights know.
        patch_length: frames in one patch.
        num_patches: patches of a scan; a scan has exactly `num_patches * patch_length` frames.
        feature_dim: dimension of the features; None for those of the encoder itself, else the output of the layers
            that lead to the codebook.
        encoder_width, encoder_mlp_width, encoder_layers, encoder_heads: sizes of the encoder.
    """

    model_type = "fmrilm_original"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3")}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    fmri_token_id: int | None = None
    median: float | int = 0.0
    iqr: float | int = 1.0
    num_rois: int = 450
    patch_length: int = 160
    num_patches: int = 1
    feature_dim: int | None = None
    encoder_width: int = 768
    encoder_mlp_width: int = 3072
    encoder_layers: int = 12
    encoder_heads: int = 12
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.iqr <= 0:
            raise ValueError(f"expected iqr > 0, got {self.iqr}")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


class FmriOriginalEncoder(nn.Module):
    """
    A vision transformer over patches in time, one token for each ROI and patch, with one learned vector for each ROI
    and no position in time. Tokens are ROI-major, as the weights were trained: index = ROI * num_patches + patch.
    """

    def __init__(self, config: FmriOriginalConfig):
        super().__init__()
        width = config.encoder_width
        self.patch_embedding = nn.Linear(config.patch_length, width)
        self.roi_embedding = nn.Parameter(torch.zeros(config.num_rois, width))
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        options |= {"dropout": 0.0, "layer_norm_eps": config.layer_norm_eps}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, config.encoder_heads, config.encoder_mlp_width, **options)
            for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Identity()
        if config.feature_dim is not None:
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.feature_dim))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Features [scans, rois * num_patches, dim] of patches [scans, rois, num_patches, patch_length]."""
        states = (self.patch_embedding(patches) + self.roi_embedding[:, None]).flatten(1, 2)
        for layer in self.layers:
            states = layer(states)
        return self.head(self.norm(states))


class FmriOriginalForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config: FmriOriginalConfig
    input_modalities = ["text"]
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: FmriOriginalConfig):
        super().__init__(config)
        text_config: Any = config.text_config
        self.encoder = FmriOriginalEncoder(config)
        self.input_proj = nn.Linear(config.feature_dim or config.encoder_width, text_config.hidden_size)
        self.roi_embedding = nn.Embedding(config.num_rois, text_config.hidden_size)
        self.causal_lm = AutoModelForCausalLM.from_config(text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FmriOriginalEncoder):
            init.normal_(module.roi_embedding, std=1.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = dict(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)

    def get_fmri_features(self, fmri_values: torch.Tensor) -> torch.Tensor:
        """Embeddings [scans, rois * num_patches, hidden] of scans [scans, rois, time] in their own units."""
        config = self.config
        expected = [config.num_rois, config.num_patches * config.patch_length]
        if list(fmri_values.shape[1:]) != expected:
            raise ValueError(f"expected scans [rois, time] of {expected}, got {list(fmri_values.shape[1:])}")
        patches = ((fmri_values.float() - config.median) / config.iqr).unflatten(-1, (config.num_patches, -1))
        rois = self.roi_embedding.weight.repeat_interleave(config.num_patches, dim=0)
        return F.gelu(self.input_proj(self.encoder(patches.to(self.dtype)))) + rois

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        fmri_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        position_ids: None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        input_ids [batch, length] with `num_rois * num_patches` fMRI tokens in each row; fmri_values [batch, rois,
        time]. Tokens of text attend causally and count positions one by one; the first `num_rois` fMRI tokens, the
        next ones, and so on, see each other and share one position. With `past_key_values`, the scans are cached.
        """
        config = self.config
        is_fmri = input_ids == config.fmri_token_id
        tokens = config.num_rois * config.num_patches
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_fmri, 0))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        mask = mask if attention_mask is None else attention_mask
        # what follows a scan is as many positions earlier as tokens of the scan share one
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0) - (tokens - config.num_patches if past else 0)
        positions = positions[:, -input_ids.shape[1] :]
        if not past:
            if fmri_values is None or len(fmri_values) != len(is_fmri) or (is_fmri.sum(-1) != tokens).any():
                raise ValueError(f"expected one scan and its {tokens} fMRI tokens in each row, got others")
            features = self.get_fmri_features(fmri_values).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_fmri[..., None], features)
            index = is_fmri.long().cumsum(-1)
            block = ((index - 1) // config.num_rois).masked_fill(~is_fmri, -1)
            after = index // tokens * (tokens - config.num_patches)
            positions = positions - torch.where(is_fmri, index - 1 - block, after)
            seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
            seen = seen | (block[:, :, None] == block[:, None]) & is_fmri[:, None]
            # a padding token sees itself: a row of nothing has no softmax
            seen = seen & mask[:, None].bool() | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
            mask = torch.zeros_like(seen, dtype=embeddings.dtype)
            mask = mask.masked_fill(~seen, torch.finfo(embeddings.dtype).min)[:, None]
        if labels is not None:
            labels = labels.masked_fill(labels == config.fmri_token_id, -100)
        return self.causal_lm(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def score_choices(self, inputs: dict[str, torch.Tensor], choices: list[list[int]]) -> torch.Tensor:
        """Log-likelihood [batch, choices] of each allowed answer (token ids) after prompts padded on the left."""
        totals = []
        for choice in choices:
            answer = torch.tensor(choice, device=self.device).expand(len(inputs["input_ids"]), -1)
            values = dict(inputs, input_ids=torch.cat([inputs["input_ids"], answer], 1))
            if "attention_mask" in inputs:
                values["attention_mask"] = F.pad(inputs["attention_mask"], (0, len(choice)), value=1)
            logits = self(**values).logits[:, -len(choice) - 1 : -1].float().log_softmax(-1)
            totals.append(logits.gather(-1, answer[..., None]).sum((1, 2)))
        return torch.stack(totals, 1)

    def answer_probabilities(self, scores: torch.Tensor, question: str, choices: Sequence[str]) -> torch.Tensor:
        """Of answers to a question, of their log-likelihoods [..., choices]; the paper calibrates none."""
        return scores.softmax(-1)


class FmriOriginalProcessor(ProcessorMixin):
    """
    Chats that hold one scan each, in the official prompt, and the scans: the first `window_length` frames at
    `repetition_time` of the feature extractor, in their own units.
    """

    def __init__(self, feature_extractor: Any, tokenizer: Any, chat_template: str | None = None, **kwargs: Any):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        files = super().save_pretrained(save_directory) + self.feature_extractor.save_parcels(save_directory)
        if push_to_hub:
            # the base class would upload before the parcels are there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "fmri_values"]

    def decode_answers(self, ids: torch.Tensor) -> list[str]:
        """Texts of generated ids [batch, tokens] without special tokens."""
        texts: Any = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def apply_chat_template(
        self,
        conversation: list,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding_side: str = "left",
        tr: float | None = None,
        atlas: Any = None,
        label_image: Any = None,
        window: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Model inputs, or the text, of one chat or a list; a scan is a block {"type": "fmri", "fmri": scan}."""
        if window not in (None, "first"):
            raise ValueError(f"expected window first, which the checkpoint was trained on, got {window!r}")
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        texts: Any = self.tokenizer.apply_chat_template(
            chats, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if not tokenize:
            return texts if isinstance(conversation[0], list) else texts[0]
        blocks = [
            block
            for chat in chats
            for message in chat
            if isinstance(message["content"], list)
            for block in message["content"]
            if block["type"] == "fmri"
        ]
        values = [self._values(block, tr=tr, atlas=atlas, label_image=label_image) for block in blocks]
        inputs = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side=padding_side, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        return BatchFeature({**{name: inputs[name] for name in names}, "fmri_values": torch.stack(values)})

    def _values(self, block: dict[str, Any], **options: Any) -> torch.Tensor:
        """float32 [rois, window_length] of a block's scan."""
        extractor = self.feature_extractor
        scan = {"signal": block["fmri"], "tr": block.get("tr"), "atlas": block.get("atlas")}
        read = extractor.read_signal(scan, **options)
        # the mean is taken out for the filters alone
        signal = extractor.clean_signal(read)[0] + read.signal.mean(axis=0)
        # linear interpolation, as the official code resamples: without a filter, to about the repetition time
        last = len(signal) - 1
        places = np.linspace(0, last, round(read.tr * last / extractor.repetition_time) + 1)
        before = np.minimum(places.astype(int), last - 1)
        share = (places - before)[:, None]
        signal = (1 - share) * signal[before] + share * signal[before + 1]
        signal = signal[: extractor.window_length]
        if len(signal) < extractor.window_length or np.isnan(signal).any():
            raise ValueError(
                f"expected {extractor.window_length} frames of every ROI at {extractor.repetition_time} s, got "
                f"{len(signal)} frames and {int(np.isnan(signal).any(0).sum())} missing ROIs"
            )
        return torch.tensor(signal.T, dtype=torch.float32)

    def encode_choices(self, choices: Sequence[str], question: str | None = None) -> list[list[int]]:
        """Token ids of each allowed answer, which begins with a space, as in training; the same to any question."""
        return [self.tokenizer(f" {choice.strip()}", add_special_tokens=False)["input_ids"] for choice in choices]


FmriOriginalConfig.register_for_auto_class()
FmriOriginalForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
FmriOriginalProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["FmriOriginalConfig", "FmriOriginalForConditionalGeneration", "FmriOriginalProcessor"]
