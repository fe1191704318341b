"""Rows of placeholders and codes for the tests of the joint model."""

import torch
import torch.nn.functional as F

from fmrilm import FmriLMForConditionalGeneration


Model = FmriLMForConditionalGeneration
Scan = list[list[int]]
BACKBONES = ["llama", "qwen3", "gpt2"]
# codes of three levels; two tokens make a patch: a scan of four patches, one of two
LONG: Scan = [[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9], [3, 2, 3], [8, 4, 6], [2, 6, 4]]
SHORT: Scan = [[5, 3, 5], [8, 9, 7], [9, 3, 2], [3, 8, 4]]


def ids(model: Model, *parts: Scan | str) -> torch.Tensor:
    """One row [1, length]: codes of a scan become its placeholders, strings become their bytes."""
    config, row = model.config, []
    for part in parts:
        if isinstance(part, str):
            row += [10 + ord(character) for character in part]
        else:
            tokens = [config.fmri_token_id] * len(part) + [config.fmri_summary_token_id] * config.num_summary_tokens
            row += [config.fmri_start_token_id, *tokens, config.fmri_end_token_id]
    return torch.tensor([row])


def codes(*scans: Scan) -> torch.Tensor:
    """int64 [scans, tokens, levels]; -1 on padding."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(scan) for scan in scans], True, padding_value=-1)


def pad(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    sides = {"left": lambda row: (longest - row.shape[1], 0), "right": lambda row: (0, longest - row.shape[1])}
    return {
        "input_ids": torch.cat([F.pad(row, sides[side](row)) for row in rows]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(row), sides[side](row)) for row in rows]),
    }


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Of an attention mask [batch, length]; GPT-2 does not count them itself."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def text_labels(model: Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels on all text that is not padding."""
    config, ids = model.config, inputs["input_ids"]
    special = torch.tensor([config.fmri_token_id, config.fmri_summary_token_id, config.fmri_end_token_id])
    return ids.masked_fill(torch.isin(ids, special) | (inputs["attention_mask"] == 0), -100)


def choice_scores(model: Model, row: torch.Tensor, scans: torch.Tensor, choices: list[list[int]]) -> torch.Tensor:
    """Log-likelihood of each choice by one uncached run over prompt and choice."""
    totals = []
    for choice in choices:
        logits = model(torch.cat([row, torch.tensor([choice])], -1), fmri_codes=scans).logits[0].log_softmax(-1)
        start = row.shape[1] - 1
        totals.append(sum(logits[start + place, token] for place, token in enumerate(choice)))
    return torch.stack(totals)


def code_logits(model: Model, state: torch.Tensor, scan: Scan, token: int) -> torch.Tensor:
    """Logits [levels, codebook_size] of a scan's `token`, given the state [hidden] before it."""
    head, codebooks = model.model.fmri_head, model.model.codec.codebooks()
    expected = model.model.expected_vectors(codes(scan))[0, token]
    return (head.proj.weight @ state).view(3, 16) + head.frequencies[token % 2] + codebooks @ expected
