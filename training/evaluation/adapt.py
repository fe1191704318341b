"""A model learns a task from labelled scans: its weights are tuned, or the scans are shown beside the question."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..alignment.chats import assistant, chat_dataset, draw_rounds, scan_block, text_block, user
from ..alignment.joint import add_lora
from ..data.collator import pad_codes
from ..data.tasks import Task
from ..sft.trainer import train_sft
from ..trainer import half_precision, training_options
from .ask import BATCH, Example


@dataclass(frozen=True)
class Tuning:
    """
    steps: at most, and no more than `epochs` over the training scans take. rows_per_step: one scan and one question
    each. rank: of LoRA; None tunes the whole language model.
    """

    steps: int = 60
    epochs: int = 12
    rows_per_step: int = 8
    learning_rate: float = 1e-3
    rank: int | None = 8


def tune(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    task: Task,
    codes: Sequence[np.ndarray],
    answers: Sequence[str],
    tuning: Tuning,
    seed: int,
) -> FmriLMForConditionalGeneration:
    """
    A tuned copy of the model. codes: int [windows, tokens] of each training scan; answers: what is to be said of it.
    Each scan is asked about as often as any other, about a window and in a wording drawn anew each time.
    """
    torch.manual_seed(seed)
    steps = min(tuning.steps, tuning.epochs * math.ceil(len(codes) / tuning.rows_per_step))
    tuned = copy.deepcopy(model).train()
    with TemporaryDirectory() as scratch:
        trained = train_sft(
            tuned if tuning.rank is None else add_lora(tuned, tuning.rank),
            task_rows(task, codes, answers, steps * tuning.rows_per_step, seed),
            processor,
            **training_options(scratch, steps, tuning.rows_per_step, tuning.learning_rate, seed),
            bf16=half_precision(),
            gradient_checkpointing=False,
            disable_tqdm=False,
        )
    merged: Any = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    return merged.eval()


def task_rows(task: Task, codes: Sequence[np.ndarray], answers: Sequence[str], rows: int, seed: int) -> Dataset:
    """Chats with one scan, one question and its answer."""
    rng = np.random.default_rng(seed)
    made = []
    for scan in draw_rounds(len(codes), rows, rng):
        question = task.questions[rng.integers(len(task.questions))]
        window = codes[scan][rng.integers(len(codes[scan]))]
        chat = [user(scan_block(), text_block(question)), assistant(answers[int(scan)])]
        made.append({"messages": chat, "codes": [window.tolist()]})
    return chat_dataset(made)


def as_examples(codes: Sequence[np.ndarray], answers: Sequence[str], seed: int) -> list[Example]:
    """Labelled scans, the first window of each, to be shown in random order."""
    order = np.random.default_rng(seed).permutation(len(codes))
    return [Example(codes[scan][0], answers[int(scan)]) for scan in order]


@torch.no_grad()
def embed_scans(model: FmriLMForConditionalGeneration, scans: Sequence[np.ndarray]) -> np.ndarray:
    """
    What the language model makes of each scan, float32 [scans, hidden]: its last hidden states at the scan's tokens,
    mean over them. scans: codes int [tokens] of each.
    """
    embeddings = np.empty((len(scans), model.config.get_text_config().hidden_size), np.float32)
    by_length = sorted(range(len(scans)), key=lambda row: len(scans[row]))
    for start in range(0, len(scans), BATCH):
        rows = by_length[start : start + BATCH]
        codes = pad_codes([scans[row] for row in rows]).to(model.device)
        states = scan_states(model, codes)
        valid = (codes >= 0)[..., None]
        embeddings[rows] = ((states * valid).sum(1) / valid.sum(1)).float().cpu().numpy()
    return embeddings


def scan_states(model: FmriLMForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    """Last hidden states [scans, tokens, hidden] at the tokens of scans without any text; codes: [scans, tokens]."""
    config, valid = model.config, codes >= 0
    ids = torch.full_like(codes, config.fmri_token_id).masked_fill(~valid, config.fmri_end_token_id)
    start = ids.new_full((len(ids), 1), config.fmri_start_token_id)
    mask = torch.cat([torch.ones_like(start), valid], 1)
    return model.model(torch.cat([start, ids], 1), mask, fmri_codes=codes).last_hidden_state[:, 1:]
