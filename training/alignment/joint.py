"""
Stage 2: a trained codec and a pretrained language model become one model, whole or with an adapter.

What a language model reads of a scan's scores starts in what it can repeat: for each descriptor a token of its name,
which the vocabulary gets, and the word of its level; and "The sex is (answer)." for each task. Questions and answers
have the same tokens of names: with names in words, a language model of 135 million parameters does not learn to find
the one that is asked for among all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fmrilm.configuration_fmrilm import FmriLMConfig
from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FMRI_END, FMRI_PAD, FMRI_START, FMRI_SUMMARY, FmriLMProcessor, add_name_tokens
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.phrases import PHRASES

from ..data.tasks import Task
from .chats import walk_place


# anchored at the language model: the codec has projections of the same names
LORA_TARGETS = r".*\.causal_lm\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|c_attn|c_fc)"
LANGUAGE_MODEL = "model.causal_lm."
# added to the eigenvalues of the products of names' embeddings, whose trace is the number of names
LEAST_SHARED = 0.05
# how far a name with "is" behind it is from the name alone, as a share of its size
AWAY = 0.5
# what a scan enters and leaves through, trained whole beside an adapter
SCAN_MODULES = ("projector", "summary.embeddings", "start_end_embeddings")


@torch.no_grad()
def join(
    codec: FmriCodecModel, language_model: PreTrainedModel, processor: FmriLMProcessor, score_names: Sequence[str]
) -> FmriLMForConditionalGeneration:
    """
    The untrained joint model: vocabulary grown by the fMRI tokens, at the mean of the old embeddings, and by the names
    of the descriptors `score_names`, each of which has two summary tokens. The processor gets to know the tokens.
    """
    tokenizer = processor.tokenizer
    names = add_to_vocabulary(language_model, tokenizer, [PHRASES.get(name, name) for name in score_names])
    start, pad, summary, end = tokenizer.convert_tokens_to_ids([FMRI_START, FMRI_PAD, FMRI_SUMMARY, FMRI_END])
    processor.summary_tokens, processor.level_words = 2 * len(score_names), [*map(str, LEVELS)]
    # in the order in which descriptions go through them, so that what is said next stands next
    order = sorted(range(len(score_names)), key=lambda place: walk_place(score_names[place]))
    places = np.argsort(order)
    config = FmriLMConfig(
        codec_config=_without_path(codec.config),
        text_config=_without_path(language_model.config),
        fmri_start_token_id=start,
        fmri_token_id=pad,
        fmri_summary_token_id=summary,
        fmri_end_token_id=end,
        num_summary_tokens=2 * len(score_names),
        score_names=list(score_names),
        # behind their names
        score_tokens=(2 * places + 1).tolist(),
    )
    model = FmriLMForConditionalGeneration.from_parts(codec, language_model, config)
    if model.model.summary is not None:
        bias, weights = descriptor_embeddings(model, processor, names[order, 1])
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


def add_to_vocabulary(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, phrases: Sequence[str]
) -> torch.Tensor:
    """
    Grow the vocabulary by what the tokenizer has more than the language model, at the mean of the old embeddings, and
    by names of descriptors. Returns the names' ids [names, 2]: alone, and with "is" behind them.
    """
    words = [tokenizer(f" {phrase}", add_special_tokens=False)["input_ids"] for phrase in phrases]
    names = torch.tensor(add_name_tokens(tokenizer, phrases)).view(-1, 2)
    known = language_model.config.get_text_config().vocab_size
    if len(tokenizer) > known:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [language_model.get_input_embeddings().get_parameter("weight")]
    if (head := language_model.get_output_embeddings()) is not None:
        tables.append(head.get_parameter("weight"))
    for table in tables:
        table[known:] = table[:known].mean(0)
        if phrases:
            embeddings = name_embeddings(table, words)
            # away from the name alone, or the two would always be as likely, in a direction that no word has
            away = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
            away *= AWAY * embeddings.norm(dim=1).mean().cpu() / away.norm()
            table[names[:, 0]] = embeddings.to(table)
            table[names[:, 1]] = (embeddings + away.to(embeddings)).to(table)
    return names


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
    processor.answer_sentences = [
        *processor.answer_sentences,
        *(
            {"name": task.spoken, "choices": task.choice_words, "questions": list(task.questions)}
            for task in tasks
            if any(name.partition("=")[0] == task.name for name in names)
        ),
    ]
    # not `wider.to`: transformers' decorator of it hides its arguments from a type checker
    torch.nn.Module.to(wider, model.device)
    return wider.eval()


def answer_embeddings(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, tasks: Sequence[Task], names: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    Embeddings [tokens, hidden] of "The sex is (answer)." for each task that has scores among `names`, all of which are
    scores of tasks; how a token changes with each score [names, hidden], by the difference of two answers for a score
    of one (`ANSWER_SPREAD` says how large scores are): what moves an embedding more looks alike behind the language
    model's normalisation; and which token that is [names].
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
            weights[column] = chosen - (word(words[0]) if len(columns) == 1 else mean)
            places[column] = sum(map(len, bias)) + len(parts[0])
        bias += parts
    return torch.cat(bias), torch.stack(weights), places


def descriptor_embeddings(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, names: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embeddings [2 * names, hidden] of the tokens `names` of descriptors, int [names], each with the word of a typical
    level behind it; and how that changes with its score [names, hidden], which has a standard deviation of one.
    """
    low, typical, high = (embed_text(model, processor, f" {level}").mean(0) for level in LEVELS)
    embeddings = model.get_input_embeddings()(names.to(model.device)).float()
    bias = torch.stack([embeddings, typical.expand_as(embeddings)], 1).flatten(0, 1)
    return bias, (high - low).expand(len(names), -1)


def name_embeddings(table: torch.Tensor, words: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Embeddings float32 [names, hidden] of names of several words (ids in `table` [vocabulary, hidden]): what their
    means have in common and, as large as a word, what is left of them where shared words count less (the inverse
    square root of their products). Names of the same words in part would otherwise be taken for each other.
    """
    parts = [table[torch.tensor(each)].float() for each in words]
    means = torch.stack([part.mean(0) for part in parts])
    apart = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    values, vectors = torch.linalg.eigh(apart @ apart.mT)
    apart = vectors @ ((values.clamp(min=0) + LEAST_SHARED).rsqrt()[:, None] * (vectors.mT @ apart))
    return means.mean(0) + torch.cat(parts).norm(dim=1).mean() * torch.nn.functional.normalize(apart, dim=1)


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
