"""Batches for the language model: rows with cached codes in, masked labels out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fmrilm.processors import FmriLMProcessor


IGNORED = -100
# Lengths are rounded up to this: matrix kernels are prepared once for each shape, and few shapes come again.
LENGTH_MULTIPLE = 32
ROWS_AT_A_TIME = 256
IDS = List(Value("int32"))
ENCODED_FEATURES = Features(
    {
        "input_ids": IDS,
        "labels": IDS,
        "codes": List(List(IDS)),
        "scores": List(List(Value("float32"))),
        "length": Value("int32"),
    }
)


@dataclass
class RowCollator:
    """Rows {"input_ids", "labels", "codes", "scores"}, as `encode_dataset` makes them, to padded model inputs."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        if missing := {"input_ids", "labels", "codes", "scores"} - rows[0].keys():
            raise ValueError(
                f"expected rows with input_ids, labels, codes and scores, got none of {', '.join(sorted(missing))}: "
                "packing leaves them out"
            )
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        codes = [np.asarray(scan) for row in rows for scan in row["codes"]]
        scores = [np.asarray(scan, np.float32) for row in rows for scan in row["scores"]]
        padding = -max(map(len, ids)) % LENGTH_MULTIPLE
        batch = {
            "input_ids": _padded(ids, self.pad_token_id, padding),
            "attention_mask": _padded([torch.ones_like(row) for row in ids], 0, padding),
            "labels": _padded(labels, IGNORED, padding),
        }
        # a batch may be text alone
        if codes:
            batch["fmri_codes"] = pad_codes(codes)
        if any(len(one) for one in scores):
            batch["fmri_scores"] = torch.from_numpy(np.stack(scores))
        return batch


def encode_dataset(rows: Dataset, processor: FmriLMProcessor) -> Dataset:
    """
    Rows {"messages": chat, "codes": int [scans][tokens][levels], "scores": [scans][scores], "text": str}, each
    tokenised once: {"input_ids", "labels", "codes", "scores", "length"}. Blocks of a chat stand for the row's codes in
    order, and only what the assistant says carries a label. A row without a chat is a scan alone, which carries no
    text label, or plain text, of which all does.
    """
    encoded = []
    for start in tqdm(range(0, len(rows), ROWS_AT_A_TIME), desc="tokens", unit="batch"):
        part = rows.skip(start).take(ROWS_AT_A_TIME).to_list()
        chats = iter(_chats([row for row in part if row["messages"]], processor))
        for row in part:
            ids, labels = next(chats) if row["messages"] else _plain(row, processor)
            encoded.append(
                {
                    "input_ids": ids.numpy().astype(np.int32),
                    "labels": labels.numpy().astype(np.int32),
                    "codes": row["codes"],
                    "scores": row["scores"],
                    "length": len(ids),
                }
            )
    return Dataset.from_list(encoded, features=ENCODED_FEATURES)


def _chats(rows: Sequence[dict], processor: FmriLMProcessor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [length] and labels [length] of each chat."""
    if not rows:
        return []
    inputs = processor.apply_chat_template(
        [with_token_counts(row["messages"], row["codes"]) for row in rows],
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        padding_side="right",
    )
    labels = inputs["input_ids"].masked_fill(inputs["assistant_masks"] == 0, IGNORED)
    if not (labels != IGNORED).any(-1).all():
        raise ValueError("expected an assistant's answer in every chat, got a row without one")
    lengths = inputs["attention_mask"].sum(-1).tolist()
    return [(inputs["input_ids"][row, :end], labels[row, :end]) for row, end in enumerate(lengths)]


def _plain(row: dict, processor: FmriLMProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    if len(row["codes"]) > 1:
        raise ValueError(f"expected one scan in a row without a chat, got {len(row['codes'])}")
    text = processor.scan_text(len(row["codes"][0])) if row["codes"] else row["text"]
    if not text:
        raise ValueError("expected a chat, a scan or text in every row, got a row without any")
    ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids, torch.full_like(ids, IGNORED) if row["codes"] else ids


def _padded(rows: Sequence[torch.Tensor], fill: int, missing: int) -> torch.Tensor:
    return F.pad(pad_sequence(list(rows), batch_first=True, padding_value=fill), (0, missing), value=fill)


def pad_codes(codes: Sequence[np.ndarray]) -> torch.Tensor:
    """Codes int64 [scans, tokens, levels] of scans [tokens, levels] of differing lengths; -1 is padding."""
    return pad_sequence(
        [torch.as_tensor(scan, dtype=torch.long) for scan in codes], batch_first=True, padding_value=-1
    )


def with_token_counts(messages: Sequence[dict], codes: Sequence[np.ndarray]) -> list[dict]:
    """The chat with each fMRI block told how many tokens it takes; ValueError if blocks and codes do not pair up."""
    chat = [{"role": message["role"], "content": copy.deepcopy(message["content"])} for message in messages]
    listed = [block for message in chat if not isinstance(message["content"], str) for block in message["content"]]
    blocks = [block for block in listed if block["type"] == "fmri"]
    if len(blocks) != len(codes):
        raise ValueError(f"expected one fmri block for each of the {len(codes)} scans, got {len(blocks)}")
    for block, scan in zip(blocks, codes, strict=True):
        block["tokens"] = len(scan)
    return chat
