"""Chats about scans: what stages 2 and 3 learn from, in the three paradigms."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, Json, List, Value

from fmrilm.processors import descriptor_token
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, description, fact_sheet, question

from .plain_text import excerpt


FEATURES = Features({"messages": List(Json()), "codes": List(List(Value("int32"))), "text": Value("string")})
# words of plain text in a row: about as many tokens as a scan and its description
TEXT_WORDS = 100
# lines of a sheet that are not asked for: up to so many, but all of them in this share of the chats
OTHER_LINES, WHOLE_SHEETS = 12, 0.15


def scan_block(sheet: str | None = None) -> dict:
    """sheet: what stands behind the scan in place of the processor's own."""
    return {"type": "fmri"} if sheet is None else {"type": "fmri", "sheet": sheet}


def text_block(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*blocks: dict) -> dict:
    return {"role": "user", "content": list(blocks)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [text_block(text)]}


# Descriptions go through the descriptors in this order from a random start: what comes next is then no riddle, and
# what is left to learn are the levels. It is a shuffled order because neighbours in the usual one rise together.
WALK = np.random.default_rng(0).permutation(len(CORE_NAMES))


def opening(levels: np.ndarray, asked: np.ndarray, in_words: bool, rng: np.random.Generator) -> dict:
    """
    What the first message of a chat about the descriptors `asked` begins with: a scan with a sheet of these and some
    others; `in_words` the sheet alone with the true levels, from which a language model learns to read sheets sooner,
    as the codec errs. Most sheets are short: fewer lines are read sooner as well, and at less cost.
    """
    others = rng.permutation(np.setdiff1d(np.flatnonzero(levels >= 0), asked))
    listed = others if rng.random() < WHOLE_SHEETS else others[: rng.integers(OTHER_LINES + 1)]
    lines = np.sort(np.concatenate([asked, listed]))
    names = [CORE_NAMES[index] for index in lines]
    if in_words:
        return text_block(fact_sheet(names, [f" {LEVELS[levels[index]]}" for index in lines]))
    return scan_block(fact_sheet(names, [descriptor_token(name) for name in names]))


def describing_chat(
    levels: np.ndarray, statements: int, rng: np.random.Generator, in_words: bool = False
) -> list[dict]:
    """Open-ended: a request, and a description of some of the known descriptors. levels: int [descriptors]."""
    known = WALK[levels[WALK] >= 0]
    chosen = np.roll(known, -rng.integers(len(known)))[:statements]
    request = REQUESTS[rng.integers(len(REQUESTS))]
    start = opening(levels, chosen, in_words, rng)
    return [user(start, text_block(request)), assistant(description(levels, chosen.tolist()))]


def question_chat(
    levels: np.ndarray, questions: int, rng: np.random.Generator, in_words: bool = False
) -> list[dict]:
    """One or several multiple-choice questions about one scan, each answered with a level."""
    asked = rng.permutation(np.flatnonzero(levels >= 0))[:questions]
    chat = []
    for index in asked:
        text = text_block(question(CORE_NAMES[index], int(rng.integers(len(QUESTIONS)))))
        start = [] if chat else [opening(levels, asked, in_words, rng)]
        chat += [user(*start, text), assistant(LEVELS[levels[index]])]
    return chat


def alignment_dataset(
    codes: np.ndarray,
    levels: np.ndarray,
    texts: Sequence[str],
    rows: int,
    statements: int,
    weights: Sequence[float],
    seed: int,
    in_words: float = 0.0,
) -> Dataset:
    """
    Stage 2: a scan with its description, a scan alone (only its next codes are to be told), or plain text, drawn with
    `weights` in that order. codes: int [windows, tokens]; levels: int [windows, descriptors]; in_words: share of the
    descriptions for which the scan's place is taken by a sheet in words (see `opening`).
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in draw_rounds(len(codes), rows, rng):
        kind = rng.choice(3, p=weights)
        if kind == 2:
            made.append(_row(text=excerpt(texts[int(rng.integers(len(texts)))], TEXT_WORDS, rng)))
        else:
            told = not kind and rng.random() < in_words
            chat = [] if kind else describing_chat(levels[index], statements, rng, told)
            made.append(_row(None if told else codes[index], chat))
    return chat_dataset(made)


def instruction_dataset(
    codes: np.ndarray,
    levels: np.ndarray,
    rows: int,
    questions: int,
    statements: int,
    weights: Sequence[float],
    seed: int,
    in_words: float = 0.0,
) -> Dataset:
    """
    Stage 3: one question, several questions in one conversation, or an open-ended description, drawn with `weights`
    in that order; in_words: as in `alignment_dataset`.
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in draw_rounds(len(codes), rows, rng):
        paradigm, told = rng.choice(3, p=weights), rng.random() < in_words
        if paradigm == 2:
            chat = describing_chat(levels[index], statements, rng, told)
        else:
            chat = question_chat(levels[index], 1 if paradigm == 0 else questions, rng, told)
        made.append(_row(None if told else codes[index], chat))
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
