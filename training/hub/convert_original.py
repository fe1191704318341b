"""The paper's official checkpoints (one .pt file) as a model and a processor: `modeling_fmrilm_original.py`."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fmrilm.modeling_fmrilm_original import (
    FMRI_PAD,
    FmriOriginalConfig,
    FmriOriginalForConditionalGeneration,
    FmriOriginalProcessor,
)
from fmrilm.processors import Atlas, FmriLMFeatureExtractor

from .model_folder import write_folder


# the official code trains and tests on the first 160 frames
SCAN_FRAMES = 160
# all its encoders have heads of this size; no tensor tells
HEAD_DIM = 64
# scale of LoRA in the official training code, which no checkpoint of it holds: with GPT-2, and with others
LORA_ALPHA = {"gpt2": 32.0, "": 16.0}
# the last norm of an encoder, by the version of the official code that wrote the checkpoint
LAYOUTS = {"norm": "december-2025", "ln_post": "released"}
# names of our encoder and projector, and the official ones; $ is the encoder's prefix
RENAMED = {
    r"encoder\.roi_embedding": "$pos_embed",
    r"encoder\.patch_embedding\.": "$patch_embed.proj.",
    r"encoder\.layers\.(\d+)\.self_attn\.in_proj_": r"$blocks.\1.attn.qkv.",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.": r"$blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.linear(\d)\.": r"$blocks.\1.mlp.fc\2.",
    r"encoder\.layers\.(\d+)\.": r"$blocks.\1.",
    r"input_proj\.": "encode_transform_layer.0.",
    r"roi_embedding\.weight": "pos_embed.weight",
}
# classes of settings that a checkpoint holds beside its tensors; none of them is imported or called
SETTINGS = """
argparse.Namespace builtins.bool builtins.dict builtins.float builtins.int builtins.list builtins.str builtins.tuple
collections.defaultdict numpy._core.multiarray.scalar numpy.core.multiarray.scalar numpy.dtype
omegaconf.base.ContainerMetadata omegaconf.base.Metadata omegaconf.dictconfig.DictConfig
omegaconf.listconfig.ListConfig omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.FloatNode
omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode pathlib.PosixPath typing.Any
""".split()
# the prompt of instruction tuning; `scan`, `chat_ml` and `scan_in_turn` are set in front of it. The last text is the
# question; texts before it (source of the scan, "### Description: ...") have lines of their own.
CHAT_TEMPLATE = """\
{%- set reply = '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' if chat_ml else '' -%}
{%- for message in messages -%}
    {%- set found = namespace(scans='', before='', text='') -%}
    {%- if message['content'] is string -%}
        {%- set found.text = message['content'] -%}
    {%- else -%}
        {%- for block in message['content'] -%}
            {%- if block['type'] == 'fmri' -%}{%- set found.scans = found.scans + scan -%}
            {%- else -%}
                {%- if found.text -%}{%- set found.before = found.before + found.text + '\\n' -%}{%- endif -%}
                {%- set found.text = block['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- reply -}}{%- generation -%}{{- ' ' + (found.text | trim) + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '' if scan_in_turn else found.scans -}}
        {{- '<|im_start|>user\\n' if chat_ml else '' -}}
        {{- found.scans if scan_in_turn else '' -}}
        {{- found.before + '### Question: ' + found.text + '\\n### Answer:' -}}
        {{- '<|im_end|>\\n' if chat_ml else '' -}}
    {%- else -%}
        {{- raise_exception('expected messages of user and assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- reply -}}{%- endif -%}
"""


class Conversion:
    """
    Takes tensors out of an official checkpoint one by one; what is left in the end is unused, what was not there is
    missing.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.unused = set(tensors)
        self.missing: list[str] = []
        # the training code saves the encoder itself as the tokenizer; a copy of its patch embedding may stand beside
        prefixes = [prefix for prefix in ("tokenizer.encoder.", "tokenizer.") if f"{prefix}pos_embed" in tensors]
        if not prefixes:
            raise ValueError("the checkpoint lacks tokenizer.pos_embed or tokenizer.encoder.pos_embed")
        self.prefix = prefixes[0]
        norms = [norm for norm in LAYOUTS if f"{self.prefix}{norm}.weight" in tensors]
        if len(norms) != 1:
            expected = " or ".join(f"{self.prefix}{norm}.weight ({layout})" for norm, layout in LAYOUTS.items())
            raise ValueError(f"expected a checkpoint with {expected}, got {' and '.join(norms) or 'neither'}")
        self.norm, self.layout = norms[0], LAYOUTS[norms[0]]
        self.head = f"{self.prefix}conv_out" if self.layout == "released" else "tokenizer.encode_task_layer"

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

    def shape(self, name: str) -> torch.Size:
        if name not in self.tensors:
            raise ValueError(f"the checkpoint lacks {name}")
        return self.tensors[name].shape

    def sizes(self) -> dict[str, Any]:
        """Sizes of the encoder, read off the tensors."""
        num_rois, width = self.shape(f"{self.prefix}pos_embed")[-2:]
        patch_length = self.shape(f"{self.prefix}patch_embed.proj.weight")[-1]
        if width % HEAD_DIM or SCAN_FRAMES % patch_length:
            raise ValueError(
                f"expected an encoder width that is a multiple of {HEAD_DIM} and patches that divide {SCAN_FRAMES} "
                f"frames, got {width} and {patch_length}"
            )
        # the projector tells which features it reads
        feature_dim = self.shape("encode_transform_layer.0.weight")[1]
        found = (re.match(rf"{self.prefix}blocks\.(\d+)\.", name) for name in self.tensors)
        return {
            "num_rois": num_rois,
            "patch_length": patch_length,
            "num_patches": SCAN_FRAMES // patch_length,
            "feature_dim": None if feature_dim == width else feature_dim,
            "encoder_width": width,
            "encoder_mlp_width": self.shape(f"{self.prefix}blocks.0.mlp.fc1.weight")[0],
            "encoder_layers": len({match[1] for match in found if match}),
            "encoder_heads": width // HEAD_DIM,
        }

    def official_name(self, ours: str) -> str:
        """Official name of a tensor of our encoder or projector."""
        renamed = {r"encoder\.norm\.": f"{self.prefix}{self.norm}.", r"encoder\.head\.": f"{self.head}.", **RENAMED}
        for pattern, official in renamed.items():
            name, count = re.subn(f"^{pattern}", official.replace("$", self.prefix), ours)
            if count:
                return name
        raise ValueError(f"expected a tensor of the encoder or the projector, got {ours}")

    def language_model(self, text_config: PreTrainedConfig, lora_alpha: float) -> dict[str, torch.Tensor]:
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
        return {f"causal_lm.{name}": value for name, value in state.items()}

    def adapter(self, module: str, alpha: float) -> torch.Tensor:
        """The update [out, in] of a weight that LoRA adapts."""
        pattern = re.compile(rf"{re.escape(module)}\.lora_A\.(\w+)\.weight")
        names = [match[1] for name in self.tensors if (match := pattern.fullmatch(name))]
        if len(names) != 1:
            raise ValueError(f"{module}: expected one LoRA adapter, got {len(names)}: {names}")
        a, b = (f"{module}.lora_{side}.{names[0]}.weight" for side in "AB")
        rank = self.shape(a)[0]
        return alpha / rank * self.take(b, self.shape(b)) @ self.take(a, self.shape(a))

    def model(self, config: FmriOriginalConfig, lora_alpha: float) -> FmriOriginalForConditionalGeneration:
        """The converted model; ValueError naming what the checkpoint lacks."""
        with torch.device("meta"):
            expected = FmriOriginalForConditionalGeneration(config).state_dict()
        text_config: Any = config.text_config
        state = self.language_model(text_config, lora_alpha)
        for name, like in expected.items():
            if not name.startswith("causal_lm."):
                state[name] = self.take(self.official_name(name), like.shape)
        if self.missing:
            raise ValueError(
                f"the checkpoint lacks {len(self.missing)} tensors: {', '.join(self.missing[:8])}"
                f"{', ...' if len(self.missing) > 8 else ''}"
            )
        return FmriOriginalForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)


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
            checkpoint's `lm_name` or `base_model` unless given.
        lora_alpha: scale of the adapters; the checkpoint's own, else 16 (GPT-2: 32), unless given.
        delimiters: write `<fmri>` and `</fmri>` around a scan; as the official configurations do (with ChatML alone)
            unless given.
        atlas: the ROIs of the checkpoint, if not the official 450.
    """
    if output.exists():
        raise ValueError(f"expected a new folder, got {output}, which exists")
    tensors, args = load_checkpoint(checkpoint)
    text_config = text_config or setting(args, "lm_name") or setting(args, "base_model")
    if text_config is None:
        raise ValueError("the checkpoint does not say which language model it was made from: give text_config")
    if lora_alpha is None:
        lora_alpha = setting(args, "lora_alpha")
    conversion = Conversion(tensors)
    sizes = conversion.sizes()
    # its 450 ROIs: the 50 of Tian S3 first, then Schaefer's 400
    atlas = Atlas.load("schaefer-400-tian-s3") if atlas is None else atlas
    if len(atlas) != sizes["num_rois"]:
        raise ValueError(f"the checkpoint knows {sizes['num_rois']} ROIs, expected an atlas of as many, got {atlas}")
    backbone: Any = AutoConfig.from_pretrained(text_config)
    usual = LORA_ALPHA.get(backbone.model_type, LORA_ALPHA[""])
    lora_alpha = usual if lora_alpha is None else float(lora_alpha)
    tokenizer = AutoTokenizer.from_pretrained(text_config)
    tokenizer.add_special_tokens({"extra_special_tokens": [FMRI_PAD]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = FmriOriginalConfig(
        text_config=backbone,
        fmri_token_id=tokenizer.convert_tokens_to_ids(FMRI_PAD),
        median=median,
        iqr=iqr,
        **sizes,
    )
    model = conversion.model(config, lora_alpha)
    chat_ml = "<|im_start|>" in tokenizer.get_vocab()
    scan = FMRI_PAD * (config.num_rois * config.num_patches)
    values = {
        "scan": f"<fmri>{scan}</fmri>" if (chat_ml if delimiters is None else delimiters) else scan,
        "chat_ml": chat_ml,
        "scan_in_turn": conversion.layout == "released",
    }
    template = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
    extractor = FmriLMFeatureExtractor(
        atlases=[atlas], patch_length=config.patch_length, window_length=SCAN_FRAMES, detrend_order=0
    )
    processor = FmriOriginalProcessor(extractor, tokenizer, chat_template=template + CHAT_TEMPLATE)
    model.generation_config.suppress_tokens = [config.fmri_token_id]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    report = {
        "layout": conversion.layout,
        "lora_alpha": lora_alpha if any(".lora_A." in name for name in tensors) else None,
        "used": sorted(set(tensors) - conversion.unused),
        "unused": {name: list(tensors[name].shape) for name in sorted(conversion.unused)},
    }

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    write_folder(output, write)
    return report


class StandIn:
    """Takes the place of every class in SETTINGS: keeps attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Tensors by name and the settings (`model_args`) as plain data. Opened by torch's restricted unpickler, which calls
    nothing the file names; a file that names anything but tensors and SETTINGS is refused.
    """
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in SETTINGS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else "it is no checkpoint of tensors and settings"
        raise ValueError(f"{path}: refused, {reason}; expected tensors and settings alone") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    # the tensors stand at the top, or one level down
    for tensors in (content, *content.values()):
        if isinstance(tensors, dict) and "pos_embed.weight" in tensors:
            named = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            return named, plain(content.get("model_args")) or {}
    raise ValueError(
        f"{path}: expected tensors llm.*, tokenizer.*, pos_embed.weight and encode_transform_layer.0.*, got the keys "
        f"{', '.join(map(str, list(content)[:8]))}"
    )


def plain(value: Any) -> Any:
    """Settings as dicts, lists and values, out of OmegaConf nodes and namespaces."""
    if isinstance(value, StandIn):
        state = vars(value)
        value = state.get("_content", state.get("_val", state))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def setting(args: Any, name: str) -> Any:
    """The value of this name, however deep it stands in the settings; None without one."""
    if isinstance(args, list):
        args = dict(enumerate(args))
    if not isinstance(args, dict):
        return None
    found = [args.get(name), *(setting(item, name) for item in args.values())]
    return next((value for value in found if value is not None), None)
