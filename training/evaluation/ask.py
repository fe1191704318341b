"""One question about many scans: the probability of each allowed answer, or an answer in words."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..alignment.chats import assistant, scan_block, text_block, user
from ..data.collator import pad_codes, with_token_counts
from ..data.tasks import Task


BATCH = 16
ANSWER_TOKENS = 16


class Example(NamedTuple):
    """A scan, as codes int [tokens], about which the question is answered already, in the same conversation."""

    codes: np.ndarray
    answer: str


@torch.no_grad()
def score_scans(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    question: str,
    choices: Sequence[str],
    scans: Sequence[np.ndarray],
    examples: Sequence[Example] = (),
) -> np.ndarray:
    """
    Log-probability float64 [scans, choices] of each choice among the choices. scans: codes int [tokens] of each. The
    examples run once, before all scans.
    """
    chosen = processor.encode_choices(list(choices))
    scores = np.empty((len(scans), len(choices)))
    before = None
    for rows, ids in _prompts(processor, question, scans, examples):
        ids = ids.to(model.device)
        inputs = {"mm_token_type_ids": model.model.step_ids(ids), "attention_mask": torch.ones_like(ids)}
        if examples:
            # all of a prompt before the scan that is asked about is the same in each
            shared = int((ids[0] == model.config.fmri_start_token_id).nonzero()[-1])
            if before is None:
                shown = pad_codes([example.codes for example in examples]).to(model.device)
                before = model.model(ids[:1, :shared], fmri_codes=shown, use_cache=True).past_key_values
            cache = copy.deepcopy(before)
            cache.batch_repeat_interleave(len(rows))
            inputs["past_key_values"] = cache
            ids = ids[:, shared:]
        codes = pad_codes([scans[row] for row in rows]).to(model.device)
        scored = model.score_choices({"input_ids": ids, "fmri_codes": codes, **inputs}, chosen)
        scores[rows] = scored.double().log_softmax(-1).cpu().numpy()
    return scores


@torch.no_grad()
def answer_scans(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, question: str, scans: Sequence[np.ndarray]
) -> list[str]:
    """The likeliest answer to each scan, word by word; scans: codes int [tokens] of each."""
    answers = [""] * len(scans)
    for rows, ids in _prompts(processor, question, scans, ()):
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            fmri_codes=pad_codes([scans[row] for row in rows]).to(model.device),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        texts = processor.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


def calibrated(scores: np.ndarray, reference: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """
    Probabilities [rows, choices] without the preference that the model has for a word whatever the scan: the mean
    log-probability over `reference` rows is subtracted from `scores`, log-probabilities [rows, choices], and that of
    the classes' known `shares` [choices] added in its place (even ones, where no label was ever seen).

    The reference are scans of training subjects, whose labels are not looked at. Noise or an empty scan in their
    place ("content-free" calibration, Zhao et al. 2021) is nothing the model was ever trained on: what it answers
    there says little of what it prefers among real scans (Zhou et al. 2024, batch calibration). Test subjects are
    not used, so that nobody's answer depends on who else is tested. Between two choices the order of the scans, and
    the ROC-AUC, are as they were.
    """
    with np.errstate(divide="ignore"):
        logits = scores - reference.mean(0) + np.log(shares)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def parse_answer(task: Task, text: str) -> str | float | None:
    """
    The one choice that a text names, or the one number within the task's range; None without any, or with several:
    such an answer is none, and is counted as a failure.
    """
    if task.choices is not None:
        found = {word for word in task.choice_words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I)}
    else:
        low, high = task.range or (-math.inf, math.inf)
        numbers = {float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)", text)}
        found = {number for number in numbers if low <= number <= high}
    return found.pop() if len(found) == 1 else None


def _prompts(
    processor: FmriLMProcessor, question: str, scans: Sequence[np.ndarray], examples: Sequence[Example]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Rows of scans that are asked about together, all of one length, and their prompts int64 [rows, length]."""
    chat = []
    for example in examples:
        chat += [user(scan_block(), text_block(question)), assistant(example.answer)]
    chat.append(user(scan_block(), text_block(question)))
    by_length = defaultdict(list)
    for row, codes in enumerate(scans):
        by_length[len(codes)].append(row)
    batches = [rows[start : start + BATCH] for rows in by_length.values() for start in range(0, len(rows), BATCH)]
    for rows in tqdm(batches, desc="questions", unit="batch", leave=False):
        shown = with_token_counts(chat, [*(example.codes for example in examples), scans[rows[0]]])
        ids = processor.apply_chat_template(shown, add_generation_prompt=True)["input_ids"]
        yield rows, ids.expand(len(rows), -1)
