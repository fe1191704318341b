"""Stage 2: a pretrained language model learns to read and to predict the codec's codes."""

from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from fmrilm.configuration_fmrilm import FmriCodecConfig, FmriLMConfig
from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import (
    FMRI_END,
    FMRI_PAD,
    FMRI_START,
    FmriLMFeatureExtractor,
    FmriLMProcessor,
    descriptor_token,
)
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.text import fact_sheet

from ..data.collator import ChatCollator
from ..trainer import JointTrainer


# anchored at the language model: the codec has projections of the same names
LORA_TARGETS = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|c_attn)"
LANGUAGE_MODEL = "model.language_model."
Trained = TypeVar("Trained", bound=PeftModel | PreTrainedModel)

SCAN_MODULES = ("projector", "descriptors", "boundaries", "fmri_head")


def scan_processor(
    extractor: FmriLMFeatureExtractor, tokenizer: PreTrainedTokenizerBase, config: FmriCodecConfig
) -> FmriLMProcessor:
    """The processor of a model that reads this codec: behind a scan stands what the codec's head tells of it."""
    names = config.descriptor_names or ()
    sheet = fact_sheet(names, [descriptor_token(name) for name in names]) if names else ""
    return FmriLMProcessor(extractor, tokenizer, tokens_per_step=config.tokens_per_step, sheet=sheet)


def join(
    codec: FmriCodecModel, language_model: PreTrainedModel, processor: FmriLMProcessor
) -> FmriLMForConditionalGeneration:
    """The untrained joint model: vocabulary grown by the fMRI tokens, new embeddings at the old ones' mean."""
    tokenizer = processor.tokenizer
    known = language_model.config.vocab_size
    if len(tokenizer) > known:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embeddings = language_model.get_input_embeddings().get_parameter("weight")
        with torch.no_grad():
            embeddings[known:] = embeddings[:known].mean(0)
    start, pad, end = tokenizer.convert_tokens_to_ids([FMRI_START, FMRI_PAD, FMRI_END])
    names = (codec.config.descriptor_names or []) if processor.sheet else []
    described = tokenizer.convert_tokens_to_ids([descriptor_token(name) for name in names])
    config = FmriLMConfig(
        codec_config=_without_path(codec.config),
        text_config=_without_path(language_model.config),
        fmri_start_token_id=start,
        fmri_token_id=pad,
        fmri_end_token_id=end,
        descriptor_token_ids=described or None,
    )
    model = FmriLMForConditionalGeneration.from_parts(codec, language_model, config)
    if model.model.descriptors is not None:
        words = [tokenizer(f" {level}", add_special_tokens=False)["input_ids"] for level in LEVELS]
        with torch.no_grad():
            means = [model.get_input_embeddings().get_parameter("weight")[ids].mean(0) for ids in words]
            model.model.descriptors.levels.weight.copy_(torch.stack(means))
    # a model that speaks placeholders would refer to scans that are not there
    model.generation_config.suppress_tokens = [start, pad, end, *described]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _without_path(config: PreTrainedConfig) -> Any:
    """As a dict, of which `FmriLMConfig` makes a configuration again."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def add_lora(model: FmriLMForConditionalGeneration, rank: int) -> PeftModel:
    """LoRA as `add_adapter` places it. A model without it has its whole language model tuned."""
    return add_adapter(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"))


def add_adapter(model: FmriLMForConditionalGeneration, config: LoraConfig) -> PeftModel:
    """
    An adapter on the language model; where the configuration does not say, on its attention, with what a scan enters
    and leaves through trained whole. ValueError for targets that also name layers of the codec, which stays as it is.
    """
    if config.target_modules is None:
        config.target_modules = LORA_TARGETS
    if config.modules_to_save is None:
        config.modules_to_save = list(SCAN_MODULES)
    adapted = get_peft_model(model, config)
    codec = [name for name in adapted.targeted_module_names if not name.startswith(LANGUAGE_MODEL)]
    if codec:
        raise ValueError(
            f"expected LoRA targets in {LANGUAGE_MODEL} alone, got {len(codec)} layers elsewhere, such as {codec[0]}: "
            f"anchor them, as in {LORA_TARGETS!r}"
        )
    return adapted


def train_alignment(
    model: Trained, dataset: Dataset, processor: FmriLMProcessor, args: TrainingArguments
) -> Trained:
    """On rows {"messages", "codes", "text"}; the codec stays as it is."""
    trainer = JointTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=ChatCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    return model
