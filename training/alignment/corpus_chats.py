"""Windows of scans as rows of stages 2 and 3: a corpus' descriptions in parts, scans alone, plain text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from fmrilm.processors.descriptors.text import REQUESTS

from ..data.scan_windows import EncodedScans
from .chats import TEXT_WORDS, assistant, chat_dataset, draw_rounds, scan_block, text_block, user
from .plain_text import excerpt


def description_chat(description: str, paragraphs: int | None, rng: np.random.Generator) -> list[dict]:
    """Open-ended: a request, and so many paragraphs of the description in its order, or all, after its first line."""
    start, *texts = description.split("\n")
    chosen = sorted(rng.permutation(len(texts))[:paragraphs])
    request = REQUESTS[rng.integers(len(REQUESTS))]
    answer = "\n".join([start, *(texts[place] for place in chosen)])
    return [user(scan_block(), text_block(request)), assistant(answer)]


def alignment_rows(
    scans: EncodedScans,
    texts: Sequence[str],
    rows: int,
    weights: Sequence[float],
    paragraphs: int | None,
    seed: int,
) -> Dataset:
    """
    Stage 2: a scan and its description, a scan alone, or plain text, drawn with `weights` in that order; each window
    once before any comes again.
    """
    rng = np.random.default_rng(seed)
    made, windows = [], scans.windows
    for place in draw_rounds(len(windows), rows, rng):
        scan, window = windows[place]
        kind = rng.choice(3, p=weights)
        row: dict[str, Any] = {"messages": [], "codes": []}
        if kind == 2:
            row["text"] = excerpt(texts[int(rng.integers(len(texts)))], TEXT_WORDS, rng)
        else:
            row["codes"] = [scans.codes[scan][window].tolist()]
            if kind == 0:
                row["messages"] = description_chat(scans.rows[scan]["description"], paragraphs, rng)
        made.append(row)
    return chat_dataset(made)


def described_windows(
    scans: EncodedScans, paragraphs: int | None, seed: int
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """
    What is known of the scan of each window, as `task_dataset` takes it, and the window's codes. Where there is a
    description, each window has its own part of it as `messages`.
    """
    rng = np.random.default_rng(seed)
    rows, codes = [], []
    for scan, window in scans.windows:
        row = dict(scans.rows[scan])
        if "description" in row:
            row["messages"] = description_chat(row["description"], paragraphs, rng)
        rows.append(row)
        codes.append(scans.codes[scan][window])
    return rows, codes
