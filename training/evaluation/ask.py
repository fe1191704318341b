"""Questions about many scans: the probability of each allowed answer, or an answer in free text."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..alignment.chats import assistant, text_block, user
from ..data.collator import pad_codes
from ..data.tasks import Task


BATCH = 16


class EncodedWindow(NamedTuple):
    """codes: int [tokens, levels]. features: float32 [num_scan_features] of the codes."""

    codes: np.ndarray
    features: np.ndarray


class Example(NamedTuple):
    """A window about which the question is answered already, in the same conversation."""

    window: EncodedWindow
    answer: str


def scan_inputs(model: FmriLMForConditionalGeneration, windows: Sequence[EncodedWindow]) -> dict[str, torch.Tensor]:
    """Codes, and the scores that the model reads out of their features."""
    inputs = {"fmri_codes": pad_codes([window.codes for window in windows]).to(model.device)}
    if model.model.summary is not None:
        readout = model.model.summary.readout
        features = torch.from_numpy(np.stack([window.features for window in windows]))
        inputs["fmri_scores"] = readout(features.to(readout.weight))
    return inputs


@torch.no_grad()
def score_windows(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    windows: Sequence[EncodedWindow],
    questions: Sequence[str],
    choices: Sequence[list[list[int]]],
    examples: Sequence[Example] = (),
) -> list[np.ndarray]:
    """
    For each question, log-probabilities float64 [windows, choices] of its choices (token ids) among each other. A
    window and what stands before it run once, and every question goes on from there. The examples are about one
    question, and run once before all windows.
    """
    if examples and len(questions) != 1:
        raise ValueError(f"expected one question with examples of its answers, got {len(questions)}")
    found = [np.empty((len(windows), len(each))) for each in choices]
    shown = None
    for rows in _batches(windows):
        batch = [windows[row] for row in rows]
        prompts = [_prompt(processor, question, batch[0], examples).to(model.device) for question in questions]
        start, end = (
            int((prompts[0] == token).nonzero()[-1])
            for token in (model.config.fmri_start_token_id, model.config.fmri_end_token_id)
        )
        cache, first = None, 0
        if examples:
            if shown is None:
                inputs = scan_inputs(model, [example.window for example in examples])
                shown = model.model(prompts[0][None, :start], use_cache=True, **inputs).past_key_values
            cache, first = copy.deepcopy(shown), start
            cache.batch_repeat_interleave(len(rows))
        cache = model.model(
            prompts[0][first : end + 1].expand(len(rows), -1),
            attention_mask=_ones(rows, end + 1, model),
            past_key_values=cache,
            use_cache=True,
            **scan_inputs(model, batch),
        ).past_key_values
        for place, (prompt, each) in enumerate(zip(prompts, choices, strict=True)):
            inputs = {
                "input_ids": prompt[end + 1 :].expand(len(rows), -1),
                "attention_mask": _ones(rows, len(prompt), model),
                # used up by each question
                "past_key_values": copy.deepcopy(cache),
            }
            found[place][rows] = model.score_choices(inputs, each).double().log_softmax(-1).cpu().numpy()
    return found


@torch.no_grad()
def answer_windows(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    windows: Sequence[EncodedWindow],
    question: str,
    max_new_tokens: int = 16,
) -> list[str]:
    """The likeliest answer about each window, token by token."""
    answers = [""] * len(windows)
    for rows in _batches(windows):
        batch = [windows[row] for row in rows]
        ids = _prompt(processor, question, batch[0]).to(model.device).expand(len(rows), -1)
        joint: Any = model
        generated = joint.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=processor.eos_token_ids,
            **scan_inputs(model, batch),
        )
        texts = processor.decode_answers(generated[:, ids.shape[1] :])
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


@torch.no_grad()
def scan_states(
    model: FmriLMForConditionalGeneration, codes: torch.Tensor, scores: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Last hidden states at the latent tokens [scans, tokens, hidden] and at the summary tokens [scans, summary tokens,
    hidden] of scans without any text; codes: int [scans, tokens, levels], -1 on padding.
    """
    config, valid = model.config, codes[..., 0] >= 0
    tokens = torch.full_like(codes[..., 0], config.fmri_token_id).masked_fill(~valid, config.fmri_end_token_id)
    start = tokens.new_full((len(tokens), 1), config.fmri_start_token_id)
    summary = tokens.new_full((len(tokens), config.num_summary_tokens), config.fmri_summary_token_id)
    mask = torch.cat([torch.ones_like(start), valid, torch.ones_like(summary)], 1)
    states = model.model(
        torch.cat([start, tokens, summary], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        fmri_codes=codes,
        fmri_scores=scores,
    ).last_hidden_state
    return states[:, 1 : 1 + tokens.shape[1]], states[:, 1 + tokens.shape[1] :]


@torch.no_grad()
def embed_windows(model: FmriLMForConditionalGeneration, windows: Sequence[EncodedWindow]) -> np.ndarray:
    """Mean last hidden state float32 [windows, hidden] at each window's latent and summary tokens."""
    embeddings = np.empty((len(windows), model.config.get_text_config().hidden_size), np.float32)
    for rows in _batches(windows):
        inputs = scan_inputs(model, [windows[row] for row in rows])
        states = torch.cat(scan_states(model, inputs["fmri_codes"], inputs.get("fmri_scores")), 1)
        embeddings[rows] = states.mean(1).float().cpu().numpy()
    return embeddings


def calibrated(scores: np.ndarray, reference: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """
    Probabilities [rows, choices] without the preference that the model has for a word whatever the scan: the mean
    log-probability over `reference` rows is subtracted from `scores`, log-probabilities [rows, choices], and that of
    the classes' known `shares` [choices] added in its place (even ones, where no label was ever seen).

    The reference are scans of training subjects, whose labels are not looked at (batch calibration, Zhou et al. 2024).
    Test subjects are not used, so that nobody's answer depends on who else is tested. Between two choices the order
    of the scans, and the ROC-AUC, are as they were.
    """
    with np.errstate(divide="ignore"):
        logits = scores - reference.mean(0) + np.log(shares)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def parse_number(task: Task, text: str) -> float | None:
    """The one number within the task's range in a text; None without any, or with several: counted as a failure."""
    low, high = task.range or (-math.inf, math.inf)
    # what every answer begins with may hold a number, too
    text = text.removeprefix(task.sentence("").removesuffix("."))
    numbers = {float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)", text)}
    found = {number for number in numbers if low <= number <= high}
    return found.pop() if len(found) == 1 else None


def _prompt(
    processor: FmriLMProcessor, question: str, window: EncodedWindow, examples: Sequence[Example] = ()
) -> torch.Tensor:
    """Token ids int64 [length] of the question about a window, after the examples."""
    chat = []
    for example in examples:
        chat += [user(_block(example.window), text_block(question)), assistant(example.answer)]
    chat.append(user(_block(window), text_block(question)))
    return processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][0]


def _block(window: EncodedWindow) -> dict:
    return {"type": "fmri", "tokens": len(window.codes)}


def _batches(windows: Sequence[EncodedWindow]) -> Iterator[list[int]]:
    """Rows of windows that run together, all of one length."""
    by_length = defaultdict(list)
    for row, window in enumerate(windows):
        by_length[len(window.codes)].append(row)
    batches = [rows[start : start + BATCH] for rows in by_length.values() for start in range(0, len(rows), BATCH)]
    yield from tqdm(batches, desc="questions", unit="batch", leave=False, disable=None)


def _ones(rows: Sequence[int], length: int, model: FmriLMForConditionalGeneration) -> torch.Tensor:
    return torch.ones(len(rows), length, dtype=torch.long, device=model.device)
