"""Chats about scans: what stages 2 and 3 learn from, in the three paradigms."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, Json, List, Value

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, description, question

from .plain_text import excerpt


FEATURES = Features({"messages": List(Json()), "codes": List(List(Value("int32"))), "text": Value("string")})
# words of plain text in a row: about as many tokens as a scan and its description
TEXT_WORDS = 100


def scan_block() -> dict:
    return {"type": "fmri"}


def text_block(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*blocks: dict) -> dict:
    return {"role": "user", "content": list(blocks)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [text_block(text)]}


# Descriptions go through the descriptors in this order from a random start: what comes next is then no riddle, and
# what is left to learn are the levels. It is a shuffled order because neighbours in the usual one rise together.
WALK = np.random.default_rng(0).permutation(len(CORE_NAMES))


def describing_chat(levels: np.ndarray, statements: int, rng: np.random.Generator) -> list[dict]:
    """Open-ended: a request, and a description of some of the known descriptors. levels: int [descriptors]."""
    known = WALK[levels[WALK] >= 0]
    chosen = np.roll(known, -rng.integers(len(known)))[:statements]
    request = REQUESTS[rng.integers(len(REQUESTS))]
    return [user(scan_block(), text_block(request)), assistant(description(levels, chosen.tolist()))]


def question_chat(levels: np.ndarray, questions: int, rng: np.random.Generator) -> list[dict]:
    """One or several multiple-choice questions about one scan, each answered with a level."""
    known = np.flatnonzero(levels >= 0)
    chat = []
    for index in rng.permutation(known)[:questions]:
        text = text_block(question(CORE_NAMES[index], int(rng.integers(len(QUESTIONS)))))
        chat += [user(text) if chat else user(scan_block(), text), assistant(LEVELS[levels[index]])]
    return chat


def alignment_dataset(
    codes: np.ndarray,
    levels: np.ndarray,
    texts: Sequence[str],
    rows: int,
    statements: int,
    weights: Sequence[float],
    seed: int,
) -> Dataset:
    """
    Stage 2: a scan with its description, a scan alone (only its next codes are to be told), or plain text, drawn with
    `weights` in that order. codes: int [windows, tokens]; levels: int [windows, descriptors].
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in draw_rounds(len(codes), rows, rng):
        kind = rng.choice(3, p=weights)
        if kind == 2:
            made.append(_row(text=excerpt(texts[int(rng.integers(len(texts)))], TEXT_WORDS, rng)))
        else:
            made.append(_row(codes[index], [] if kind else describing_chat(levels[index], statements, rng)))
    return chat_dataset(made)


def instruction_dataset(
    codes: np.ndarray,
    levels: np.ndarray,
    rows: int,
    questions: int,
    statements: int,
    weights: Sequence[float],
    seed: int,
) -> Dataset:
    """
    Stage 3: one question, several questions in one conversation, or an open-ended description, drawn with `weights`
    in that order.
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in draw_rounds(len(codes), rows, rng):
        paradigm = rng.choice(3, p=weights)
        if paradigm == 2:
            chat = describing_chat(levels[index], statements, rng)
        else:
            chat = question_chat(levels[index], 1 if paradigm == 0 else questions, rng)
        made.append(_row(codes[index], chat))
    return chat_dataset(made)


def draw_rounds(windows: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Each window once before any comes again."""
    rounds = [rng.permutation(windows) for _ in range(-(-rows // windows))]
    return np.concatenate(rounds)[:rows]


def chat_dataset(rows: Sequence[dict]) -> Dataset:
    """Rows {"messages", "codes"} and, if they have it, "text", as `ChatCollator` takes them."""
    return Dataset.from_list([{"text": None, **row} for row in rows], features=FEATURES)


def _row(codes: np.ndarray | None = None, chat: Sequence[dict] = (), text: str | None = None) -> dict:
    return {"messages": list(chat), "codes": [] if codes is None else [codes.tolist()], "text": text}
