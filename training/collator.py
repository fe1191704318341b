"""Batches for the language model: chats with cached codes in, masked labels out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fmrilm.processors import FmriLMProcessor


IGNORED = -100
# Lengths are rounded up to this: matrix kernels are prepared once for each shape, and few shapes come again.
LENGTH_MULTIPLE = 32


@dataclass
class ChatCollator:
    """
    Rows {"messages": chat, "codes": int [scans][tokens]} to model inputs. Blocks of the chat stand for the row's
    codes in order. Only what the assistant says carries a label.
    """

    processor: FmriLMProcessor

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        chats, codes = [], []
        for row in rows:
            remaining = [np.asarray(scan) for scan in row["codes"]]
            codes.extend(remaining)
            chats.append(with_token_counts(row["messages"], remaining))
        inputs = self.processor.apply_chat_template(
            chats, return_assistant_tokens_mask=True, return_tensors="pt", padding_side="right"
        )
        labels = inputs["input_ids"].masked_fill(inputs["assistant_masks"] == 0, IGNORED)
        if not (labels != IGNORED).any(-1).all():
            raise ValueError("expected an assistant's answer in every chat, got a row without one")
        missing = -labels.shape[1] % LENGTH_MULTIPLE
        batch = {
            "input_ids": F.pad(inputs["input_ids"], (0, missing), value=self.processor.tokenizer.pad_token_id),
            "attention_mask": F.pad(inputs["attention_mask"], (0, missing)),
            "labels": F.pad(labels, (0, missing), value=IGNORED),
        }
        # a batch may be text alone
        return {**batch, "fmri_codes": pad_codes(codes)} if codes else batch


def pad_codes(codes: Sequence[np.ndarray]) -> torch.Tensor:
    """Codes int64 [scans, tokens] of scans of differing lengths; -1 is padding."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(scan, dtype=torch.long) for scan in codes], batch_first=True, padding_value=-1
    )


def with_token_counts(messages: Sequence[dict], codes: Sequence[np.ndarray]) -> list[dict]:
    """The chat with each fMRI block told how many tokens it takes; ValueError if blocks and codes do not pair up."""
    counts = [int((np.asarray(scan) >= 0).sum()) for scan in codes]
    chat, used = [], 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [dict(block) for block in content]
            for block in content:
                if block["type"] == "fmri":
                    if used < len(counts):
                        block["tokens"] = counts[used]
                    used += 1
        chat.append({"role": message["role"], "content": content})
    if used != len(counts):
        raise ValueError(f"expected one fmri block for each of the {len(counts)} scans, got {used}")
    return chat
