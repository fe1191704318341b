"""Rows of stages 2 and 3 out of a corpus: its descriptions and questions, about the codes of the scans' windows."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from fmrilm.processors.descriptors.text import REQUESTS

from .chats import FEATURES, TEXT_WORDS, assistant, draw, row, scan_block, text_block, user
from .describe import question_chat
from .plain_text import excerpt
from .scan_windows import EncodedScans


def description_chat(description: str, paragraphs: int | None, rng: np.random.Generator) -> list[dict]:
    """Open-ended: a request, and so many paragraphs of the description in its order, or all, after its first line."""
    start, *texts = description.split("\n")
    chosen = sorted(rng.permutation(len(texts))[:paragraphs])
    request = REQUESTS[rng.integers(len(REQUESTS))]
    answer = "\n".join([start, *(texts[place] for place in chosen)])
    return [user(scan_block(), text_block(request)), assistant(answer)]


def conversation(questions: Sequence[dict]) -> list[dict]:
    """Several questions about one scan, which stands before the first of them."""
    chat = []
    for question in questions:
        text = text_block(question["text"])
        chat += [user(text) if chat else user(scan_block(), text), assistant(question["answer"])]
    return chat


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
    for place in draw(len(windows), rows, rng):
        scan, window = windows[place]
        kind = rng.choice(3, p=weights)
        if kind == 2:
            made.append(row(text=excerpt(texts[rng.integers(len(texts))], TEXT_WORDS, rng)))
        else:
            chat = [] if kind else description_chat(scans.rows[scan]["description"], paragraphs, rng)
            made.append(row([scans.codes[scan][window]], chat))
    return Dataset.from_list(made, features=FEATURES)


def instruction_rows(
    scans: EncodedScans,
    rows: int,
    weights: Sequence[float],
    questions: int,
    paragraphs: int | None,
    seed: int,
) -> Dataset:
    """
    Stage 3: one question, up to `questions` in one conversation, or an open-ended description, drawn with `weights`
    in that order; each window once before any comes again. A question that compares scans comes alone, and a scan
    without questions is described.
    """
    rng = np.random.default_rng(seed)
    numbers = {about["scan"]: place for place, about in enumerate(scans.rows)}
    made, windows = [], scans.windows
    for place in draw(len(windows), rows, rng):
        scan, window = windows[place]
        about, codes = scans.rows[scan], scans.codes[scan][window]
        asked = [question for question in about["questions"] if numbers.keys() >= set(question["scans"])]
        alone = [question for question in asked if len(question["scans"]) == 1]
        paradigm = rng.choice(3, p=weights)
        if paradigm == 0 and asked:
            question = asked[rng.integers(len(asked))]
            scans_of = [
                codes if other == about["scan"] else _any_window(scans.codes[numbers[other]], rng)
                for other in question["scans"]
            ]
            made.append(row(scans_of, question_chat(question)))
        elif paradigm == 1 and alone:
            chosen = rng.permutation(len(alone))[:questions]
            made.append(row([codes], conversation([alone[place] for place in chosen])))
        else:
            made.append(row([codes], description_chat(about["description"], paragraphs, rng)))
    return Dataset.from_list(made, features=FEATURES)


def _any_window(codes: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    return codes[rng.integers(len(codes))]
