"""Rows of placeholders and codes for the tests of the joint model."""

import torch
import torch.nn.functional as F

from fmrilm import FmriLMForConditionalGeneration


Model = FmriLMForConditionalGeneration
BACKBONES = ["llama", "qwen3", "gpt2"]
# two tokens make a step: a scan of four steps, one of two
LONG, SHORT = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8]


def ids(model: Model, *parts: list[int] | str) -> torch.Tensor:
    """One row [1, length]: lists are codes of a scan and become its placeholders, strings become their bytes."""
    config, row = model.config, []
    for part in parts:
        if isinstance(part, str):
            row += [10 + ord(character) for character in part]
        else:
            row += [config.fmri_start_token_id, *[config.fmri_token_id] * len(part), config.fmri_end_token_id]
    return torch.tensor([row])


def codes(*scans: list[int]) -> torch.Tensor:
    longest = max(len(scan) for scan in scans)
    return torch.tensor([scan + [-1] * (longest - len(scan)) for scan in scans])


def pad(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    sides = {"left": lambda row: (longest - row.shape[1], 0), "right": lambda row: (0, longest - row.shape[1])}
    return {
        "input_ids": torch.cat([F.pad(row, sides[side](row)) for row in rows]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(row), sides[side](row)) for row in rows]),
    }


def choice_scores(model: Model, row: torch.Tensor, scans: torch.Tensor, choices: list[list[int]]) -> torch.Tensor:
    """Log-likelihood of each choice by one uncached run over prompt and choice."""
    totals = []
    for choice in choices:
        logits = model(torch.cat([row, torch.tensor([choice])], -1), fmri_codes=scans).logits[0].log_softmax(-1)
        start = row.shape[1] - 1
        totals.append(sum(logits[start + place, token] for place, token in enumerate(choice)))
    return torch.stack(totals)


def expected_code_logits(model: Model, state: torch.Tensor, scan: list[int], token: int) -> torch.Tensor:
    """What follows one token of a scan: the language model's part from its state there, plus the autoregression."""
    part, step, slot = model.fmri_autoregression, token // 2, token % 2
    codebook = model.model.codec.quantizer.codebook
    steps = torch.stack([codebook[scan[start : start + 2]].flatten() for start in range(0, 2 * step + 2, 2)])
    context = torch.cat([steps[-1], steps.mean(0)])
    expected = part.output_proj.weight @ (part.input_proj.weight @ context)
    nearness = codebook @ expected.view(2, -1)[slot] * codebook.shape[1] ** 0.5
    return model.fmri_head.weight @ state + nearness + part.frequencies[slot]
