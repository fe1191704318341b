"""The paper's official checkpoints (one .pt file) as a model and a processor of this package."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fmrilm.configuration_fmrilm import FmriLMConfig, FmriOriginalConfig
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import (
    FMRI_END,
    FMRI_PAD,
    FMRI_START,
    Atlas,
    FmriLMFeatureExtractor,
    FmriLMProcessor,
    add_fmri_tokens,
)

from .original_checkpoint import load_checkpoint, setting


# the official code trains and tests on the first 160 frames
SCAN_FRAMES = 160
# all its encoders have heads of this size; no tensor tells
HEAD_DIM = 64
DELIMITERS = ["<fmri>", "</fmri>"]
ENCODER = "tokenizer.encoder."
BLOCK_PARTS = {
    "norm1": "norm1",
    "attn.qkv": "self_attn.in_proj",
    "attn.proj": "self_attn.out_proj",
    "norm2": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}
# The prompt of instruction tuning. `delimiters`, `chat_ml` and `scan_in_turn` are set in front of it.
CHAT_TEMPLATE = """\
{%- macro scans(content) -%}
    {%- for block in content if content is not string and block['type'] == 'fmri' -%}
        {{- delimiters[0] + '<|fmri_pad|>' * (block['tokens'] or 1) + delimiters[1] -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for block in content if block['type'] == 'text' -%}{{- block['text'] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set reply = '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' if chat_ml else '' -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'assistant' -%}
        {{- reply -}}{%- generation -%}{{- words(content) + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '' if scan_in_turn else scans(content) -}}
        {{- '<|im_start|>user\\n' if chat_ml else '' -}}
        {{- scans(content) if scan_in_turn else '' -}}
        {{- '### Question: ' + words(content) + '\\n### Answer:' -}}
        {{- '<|im_end|>\\n' if chat_ml else '' -}}
    {%- else -%}
        {{- raise_exception('expected messages of user and assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- reply -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Layout:
    """Where a version of the official code keeps what has moved since, and the scan in the prompt."""

    norm: str
    codebook_layers: str
    scan_in_turn: bool


LAYOUTS = {
    "december-2025": Layout(ENCODER + "norm", "tokenizer.encode_task_layer", scan_in_turn=False),
    "released": Layout(ENCODER + "ln_post", ENCODER + "conv_out", scan_in_turn=True),
}


class Conversion:
    """
    Takes tensors out of an official checkpoint one by one; what is left in the end is unused, what was not there is
    missing.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.unused = set(tensors)
        self.missing: list[str] = []
        layouts = [name for name, layout in LAYOUTS.items() if f"{layout.norm}.weight" in tensors]
        if len(layouts) != 1:
            expected = " or ".join(f"{layout.norm}.weight ({name})" for name, layout in LAYOUTS.items())
            raise ValueError(f"expected a checkpoint with {expected}, got {' and '.join(layouts) or 'neither'}")
        self.layout = layouts[0]

    def take(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor in float32 and in this shape, which may drop or add axes of one."""
        if name not in self.tensors:
            self.missing.append(name)
            return torch.zeros(shape)
        self.unused.discard(name)
        tensor = self.tensors[name]
        if [size for size in tensor.shape if size > 1] != [size for size in shape if size > 1]:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        return tensor.reshape(shape).float()

    def encoder_config(self) -> FmriOriginalConfig:
        """Sizes, read off the tensors."""
        sizes = {}
        for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
            if ENCODER + name not in self.tensors:
                raise ValueError(f"the checkpoint lacks {ENCODER}{name}")
            sizes[name] = self.tensors[ENCODER + name].shape
        num_rois, hidden_size = sizes["pos_embed"][-2:]
        patch_length = sizes["patch_embed.proj.weight"][-1]
        if hidden_size % HEAD_DIM or SCAN_FRAMES % patch_length:
            raise ValueError(
                f"expected an encoder width that is a multiple of {HEAD_DIM} and patches that divide {SCAN_FRAMES} "
                f"frames, got {hidden_size} and {patch_length}"
            )
        # the projector tells which features it reads
        if "encode_transform_layer.0.weight" not in self.tensors:
            raise ValueError("the checkpoint lacks encode_transform_layer.0.weight")
        feature_dim = self.tensors["encode_transform_layer.0.weight"].shape[1]
        blocks = {match[1] for name in self.tensors if (match := re.match(rf"{ENCODER}blocks\.(\d+)\.", name))}
        return FmriOriginalConfig(
            num_rois=num_rois,
            patch_length=patch_length,
            num_patches=SCAN_FRAMES // patch_length,
            feature_dim=None if feature_dim == hidden_size else feature_dim,
            hidden_size=hidden_size,
            intermediate_size=sizes["blocks.0.mlp.fc1.weight"][0],
            num_hidden_layers=len(blocks),
            num_attention_heads=hidden_size // HEAD_DIM,
        )

    def fmri_name(self, ours: str) -> str:
        """Official name of a tensor of our encoder ("codec.*") or projector ("projector.*")."""
        layout = LAYOUTS[self.layout]
        fixed = {
            "codec.roi_embedding": ENCODER + "pos_embed",
            "projector.roi_embedding.weight": "pos_embed.weight",
        }
        if ours in fixed:
            return fixed[ours]
        prefixes = {
            "codec.patch_embedding.": ENCODER + "patch_embed.proj.",
            "codec.norm.": layout.norm + ".",
            "codec.head.": layout.codebook_layers + ".",
            "projector.input_proj.": "encode_transform_layer.0.",
        }
        for prefix, official in prefixes.items():
            if ours.startswith(prefix):
                return official + ours.removeprefix(prefix)
        # codec.layers.0.self_attn.in_proj_weight
        block, _, rest = ours.removeprefix("codec.layers.").partition(".")
        part = next(part for part, our_part in BLOCK_PARTS.items() if rest.startswith(our_part))
        return f"{ENCODER}blocks.{block}.{part}.{rest.removeprefix(BLOCK_PARTS[part]).strip('._')}"

    def language_model(self, text_config: PreTrainedConfig, lora_alpha: float | None) -> dict[str, torch.Tensor]:
        """The state of the causal language model, adapters merged: W + alpha / r * B A."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config, dtype=torch.float32)
        expected = model.state_dict()
        anchor = next(iter(expected))
        pattern = re.compile(rf"(llm\..*){re.escape(anchor)}")
        prefixes = [match[1] for name in self.tensors if (match := pattern.fullmatch(name))]
        if len(prefixes) != 1:
            raise ValueError(f"expected one tensor llm.*{anchor}, got {len(prefixes)}: is it this text config?")
        (prefix,) = prefixes
        tied, state = getattr(text_config, "tie_word_embeddings", False), {}
        for name, like in expected.items():
            module, _, leaf = name.rpartition(".")
            based = f"{prefix}{module}.base_layer.{leaf}"
            source = based if based in self.tensors else prefix + name
            if source not in self.tensors and name == "lm_head.weight" and tied:
                continue
            state[name] = self.take(source, like.shape)
            if source == based and leaf == "weight":
                update = self.adapter(prefix + module, lora_alpha)
                # GPT-2 keeps its weights transposed
                transposed = isinstance(model.get_submodule(module), Conv1D)
                state[name] = state[name] + (update.T if transposed else update)
        if tied and not torch.equal(state.pop("lm_head.weight", state[anchor]), state[anchor]):
            raise ValueError("expected a language model whose head is its embedding, got a head of its own")
        base = model.base_model_prefix + "."
        return {
            f"model.language_model.{name.removeprefix(base)}" if name.startswith(base) else name: value
            for name, value in state.items()
        }

    def adapter(self, module: str, alpha: float | None) -> torch.Tensor:
        """The update [out, in] of a weight that LoRA adapts."""
        pattern = re.compile(rf"{re.escape(module)}\.lora_A\.(\w+)\.weight")
        names = [match[1] for name in self.tensors if (match := pattern.fullmatch(name))]
        if len(names) != 1:
            raise ValueError(f"{module}: expected one LoRA adapter, got {len(names)}: {names}")
        if alpha is None:
            raise ValueError(
                "the checkpoint holds LoRA weights and no lora_alpha in its settings: give it (the official code says "
                "2, its configuration files 1)"
            )
        name_a, name_b = (f"{module}.lora_{side}.{names[0]}.weight" for side in "AB")
        a = self.take(name_a, self.tensors[name_a].shape)
        if name_b not in self.tensors:
            raise ValueError(f"the checkpoint lacks {name_b}")
        return alpha / len(a) * self.take(name_b, self.tensors[name_b].shape) @ a

    def model(
        self, text_config: PreTrainedConfig, lora_alpha: float | None, token_ids: dict[str, Any]
    ) -> FmriLMForConditionalGeneration:
        """The converted model; ValueError naming what the checkpoint lacks."""
        parts: dict[str, Any] = {"codec_config": self.encoder_config().to_dict(), "text_config": text_config.to_dict()}
        config = FmriLMConfig(**parts, **token_ids, fmri_input="features")
        with torch.device("meta"):
            expected = FmriLMForConditionalGeneration(config).state_dict()
        state = self.language_model(text_config, lora_alpha)
        for name, like in expected.items():
            if name.startswith(("model.codec.", "model.projector.")):
                state[name] = self.take(self.fmri_name(name.removeprefix("model.")), like.shape)
        if self.missing:
            raise ValueError(
                f"the checkpoint lacks {len(self.missing)} tensors: {', '.join(self.missing[:8])}"
                f"{', ...' if len(self.missing) > 8 else ''}"
            )
        # official prompts hold no tokens around a scan
        words = next(value for name, value in state.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
        state["model.boundaries.weight"] = words.float().mean(0, keepdim=True).repeat(2, 1).to(words.dtype)
        return FmriLMForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)


def official_atlas() -> Atlas:
    """The 450 ROIs of the official checkpoints: the 50 of Tian S3 first, then Schaefer's 400."""
    parts = Atlas.load("tian-s3"), Atlas.load("schaefer-400-7networks")
    return Atlas(
        name="tian-s3-schaefer-400-7networks",
        rois=sum((part.rois for part in parts), ()),
        networks=sum((part.networks for part in parts), ()),
        coordinates=np.concatenate([part.coordinates for part in parts]),
    )


def chat_template(layout: Layout, chat_ml: bool, delimiters: list[str]) -> str:
    """The official prompt; ChatML (Qwen) or bare text (GPT-2)."""
    values = {"delimiters": delimiters, "chat_ml": chat_ml, "scan_in_turn": layout.scan_in_turn}
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items()) + CHAT_TEMPLATE


def convert_original(
    checkpoint: Path,
    output: Path,
    median: float,
    iqr: float,
    text_config: str | None = None,
    lora_alpha: float | None = None,
    delimiters: bool | None = None,
    atlas: Atlas | None = None,
) -> dict[str, Any]:
    """
    Writes a model and its processor into the folder `output`, and what became of each tensor into its
    `conversion.json`, which is returned.

    Args:
        median, iqr: the scalars of the data that the scans come from, as `normalization_params.npz` of the official
            code holds them; the checkpoint does not.
        text_config: folder or Hub id of the language model it was made from, for configuration and tokenizer; the
            checkpoint's `lm_name` unless given.
        lora_alpha: scale of the adapters; the checkpoint's own unless given.
        delimiters: write `<fmri>` and `</fmri>` around a scan; as the official configurations do (with ChatML alone)
            unless given.
        atlas: the ROIs of the checkpoint, if not the official 450.
    """
    if output.exists():
        raise ValueError(f"expected a new folder, got {output}, which exists")
    tensors, args = load_checkpoint(checkpoint)
    text_config = setting(args, "lm_name") if text_config is None else text_config
    if text_config is None:
        raise ValueError("the checkpoint does not say which language model it was made from: give text_config")
    lora_alpha = setting(args, "lora_alpha") if lora_alpha is None else lora_alpha
    conversion = Conversion(tensors)
    encoder = conversion.encoder_config()
    atlas = official_atlas() if atlas is None else atlas
    if len(atlas) != encoder.num_rois:
        raise ValueError(f"the checkpoint knows {encoder.num_rois} ROIs, expected an atlas of as many, got {atlas}")
    tokenizer = AutoTokenizer.from_pretrained(text_config)
    add_fmri_tokens(tokenizer)
    start, pad, end = tokenizer.convert_tokens_to_ids([FMRI_START, FMRI_PAD, FMRI_END])
    model = conversion.model(
        AutoConfig.from_pretrained(text_config),
        lora_alpha,
        {"fmri_start_token_id": start, "fmri_token_id": pad, "fmri_end_token_id": end},
    )
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layout = LAYOUTS[conversion.layout]
    chat_ml = "<|im_start|>" in tokenizer.get_vocab()
    written = DELIMITERS if (chat_ml if delimiters is None else delimiters) else ["", ""]
    processor = FmriLMProcessor(
        FmriLMFeatureExtractor(
            atlases=[atlas], patch_length=encoder.patch_length, window_length=SCAN_FRAMES, median=median, iqr=iqr
        ),
        tokenizer,
        tokens_per_step=encoder.tokens_per_step,
        chat_template=chat_template(layout, chat_ml, written),
        fmri_delimiters=written,
    )
    model.generation_config.suppress_tokens = [start, pad, end]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    report = {
        "layout": conversion.layout,
        "used": sorted(set(tensors) - conversion.unused),
        "unused": {name: list(tensors[name].shape) for name in sorted(conversion.unused)},
    }
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    (staging / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    staging.rename(output)
    return report
