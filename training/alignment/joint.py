"""
Stage 2: a trained codec and a pretrained language model become one model, whole or with an adapter.

What a language model reads of a scan's scores starts in words that it knows: a token for each descriptor, which holds
what the descriptor is called and how high it is, and "The sex is (answer)." for each task.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from fmrilm.configuration_fmrilm import FmriLMConfig
from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FMRI_END, FMRI_PAD, FMRI_START, FMRI_SUMMARY, FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.phrases import PHRASES

from ..data.tasks import Task


# anchored at the language model: the codec has projections of the same names
LORA_TARGETS = r".*\.causal_lm\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|c_attn|c_fc)"
LANGUAGE_MODEL = "model.causal_lm."
# How far one standard deviation of its score moves the embedding of an answer, and of a descriptor's level: distances
# between answers, or between low and high. Much larger steps look alike, as the language model's normalisation leaves
# of an embedding its direction.
ANSWER_CHANGE, LEVEL_CHANGE = 0.5, 1.0
# what a scan enters and leaves through, trained whole beside an adapter
SCAN_MODULES = ("projector", "summary.embeddings", "boundaries")


@torch.no_grad()
def join(
    codec: FmriCodecModel, language_model: PreTrainedModel, processor: FmriLMProcessor, score_names: Sequence[str]
) -> FmriLMForConditionalGeneration:
    """
    The untrained joint model: vocabulary grown by the fMRI tokens, new embeddings at the old ones' mean, a summary
    token for each of the descriptors `score_names`. The processor gets to know the tokens.
    """
    tokenizer = processor.tokenizer
    known = language_model.config.get_text_config().vocab_size
    if len(tokenizer) > known:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embeddings = language_model.get_input_embeddings().get_parameter("weight")
        embeddings[known:] = embeddings[:known].mean(0)
    start, pad, summary, end = tokenizer.convert_tokens_to_ids([FMRI_START, FMRI_PAD, FMRI_SUMMARY, FMRI_END])
    processor.summary_tokens = len(score_names)
    config = FmriLMConfig(
        codec_config=_without_path(codec.config),
        text_config=_without_path(language_model.config),
        fmri_start_token_id=start,
        fmri_token_id=pad,
        fmri_summary_token_id=summary,
        fmri_end_token_id=end,
        num_summary_tokens=len(score_names),
        score_names=list(score_names),
        score_tokens=list(range(len(score_names))),
    )
    model = FmriLMForConditionalGeneration.from_parts(codec, language_model, config)
    if model.model.summary is not None:
        bias, weights = descriptor_embeddings(model, processor, score_names)
        model.model.summary.embeddings.bias.copy_(bias)
        model.model.summary.embeddings.weight.copy_(weights)
    model.generation_config = language_model.generation_config or model.generation_config
    # a model that generates placeholders would refer to scans that are not there
    model.generation_config.suppress_tokens = [start, pad, summary, end]
    ends = model.generation_config.eos_token_id or []
    ends = [ends] if isinstance(ends, int) else list(ends)
    model.generation_config.eos_token_id = sorted({*ends, *processor.eos_token_ids})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def with_answers(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, tasks: Sequence[Task], names: Sequence[str]
) -> FmriLMForConditionalGeneration:
    """
    A copy of the model that also reads the scores `names` of the tasks, in more summary tokens: for each task words as
    "The sex is", then the embedding of its answers as the scores expect them. A language model thus starts from what
    it can repeat. They stand before the summary tokens of the descriptors, so that their states are not mixed with
    these; what the tokens before them hold is unchanged. The processor gets to know the tokens.
    """
    before = model.config.score_names
    bias, weights, places = answer_embeddings(model, processor, tasks, names)
    config = FmriLMConfig.from_dict(
        {
            **model.config.to_dict(),
            "score_names": [*before, *names],
            "score_tokens": [*(len(bias) + place for place in model.config.score_tokens), *places],
            "num_summary_tokens": len(bias) + model.config.num_summary_tokens,
        }
    )
    wider = FmriLMForConditionalGeneration(config)
    old, new = model.state_dict(), wider.state_dict()
    kept = {name: old[name] for name in new if name in old and old[name].shape == new[name].shape}
    wider.load_state_dict(kept, strict=False)
    wider.tie_weights()
    wider.generation_config = model.generation_config
    source, target = model.model.summary, wider.model.summary
    if source is None or target is None:
        raise ValueError("expected models with score_names, got one without")
    target.embeddings.weight.copy_(torch.cat([source.embeddings.weight, weights]))
    target.embeddings.bias.copy_(torch.cat([bias, source.embeddings.bias]))
    target.readout.weight[: len(before)] = source.readout.weight
    target.readout.bias[: len(before)] = source.readout.bias
    processor.summary_tokens = config.num_summary_tokens
    return wider.eval()


def answer_embeddings(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, tasks: Sequence[Task], names: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    Embeddings [tokens, hidden] of "The sex is (answer)." for each task that has scores among `names`, all of which are
    scores of tasks; how a token changes with each score [names, hidden], which has a standard deviation of one; and
    which token that is [names].
    """
    embed = partial(embed_text, model, processor)

    def word(text: str) -> torch.Tensor:
        return embed(f" {text}").mean(0)

    bias, places, weights = [], [0] * len(names), [torch.empty(0)] * len(names)
    for task in tasks:
        words = task.choice_words or list(LEVELS)
        own = {f"{task.name}={one}": one for one in words} if task.choice_words else {task.name: words[-1]}
        columns = [names.index(name) for name in own if name in names]
        if not columns:
            continue
        mean = torch.stack([word(one) for one in words]).mean(0)
        parts = [embed(f"The {task.spoken} is"), mean[None], embed(".")]
        for column in columns:
            chosen = word(own[names[column]])
            # two answers have one score, and so have numbers: away from the other end
            weights[column] = ANSWER_CHANGE * (chosen - (word(words[0]) if len(columns) == 1 else mean))
            places[column] = sum(map(len, bias)) + len(parts[0])
        bias += parts
    return torch.cat(bias), torch.stack(weights), places


def descriptor_embeddings(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, names: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embeddings [names, hidden] of the descriptors at a typical level: what tells the words of a descriptor's phrase
    from those of the others, as large as a word, and the word of the level; and how each changes with its score
    [names, hidden], which has a standard deviation of one.
    """
    embed = partial(embed_text, model, processor)
    low, typical, high = (embed(f" {level}").mean(0) for level in LEVELS)
    words = [embed(f" {PHRASES.get(name, name)}") for name in names]
    phrases = torch.stack([each.mean(0) for each in words])
    size = torch.cat(words).norm(dim=1).mean()
    apart = torch.nn.functional.normalize(phrases - phrases.mean(0), dim=1)
    return typical + size * apart, (LEVEL_CHANGE * (high - low)).expand(len(names), -1)


def embed_text(model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, text: str) -> torch.Tensor:
    """Input embeddings float32 [tokens, hidden] of a text."""
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model.get_input_embeddings()(ids.to(model.device))[0].float()


def _without_path(config: PreTrainedConfig) -> Any:
    """As a dict, of which `FmriLMConfig` makes a configuration again."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def add_adapter(model: FmriLMForConditionalGeneration, config: LoraConfig) -> PeftModel:
    """
    An adapter on the language model; where the configuration does not say, on its attention and its MLPs, with what a
    scan enters and leaves through trained whole. ValueError for targets that also name layers of the codec, which
    stays as it is.
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


def add_lora(model: FmriLMForConditionalGeneration, rank: int) -> PeftModel:
    """LoRA as `add_adapter` places it."""
    return add_adapter(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"))
