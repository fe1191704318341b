"""Chats about scans: the blocks they are made of, and what stage 2 learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, Statement, description, question, sentence

from .examples import Examples
from .plain_text import excerpt


FEATURES = Features(
    {
        "messages": List(Json()),
        "codes": List(List(List(Value("int32")))),
        "scores": List(List(Value("float32"))),
        "text": Value("string"),
    }
)
# words of plain text in a row: about as many tokens as a scan and its description
TEXT_WORDS = 100
# Descriptions go through the descriptors in this order from a random start: what comes next is then known, and what
# is left to learn are the levels. It is a shuffled order because neighbours in the usual one rise together. So many of
# them begin at its start: among all beginnings alike, a model that takes the likeliest word would take another one.
WALK = np.random.default_rng(0).permutation(len(CORE_NAMES))
FIRST_SHARE = 0.5


def scan_block() -> dict:
    return {"type": "fmri"}


def text_block(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*blocks: dict) -> dict:
    return {"role": "user", "content": list(blocks)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [text_block(text)]}


def row_of(examples: Examples, windows: Sequence[int], messages: Sequence[dict] = ()) -> dict[str, Any]:
    """A row of `FEATURES` about windows of the examples, in the order of their blocks."""
    return {
        "messages": list(messages),
        "codes": [np.asarray(examples.codes[window]).tolist() for window in windows],
        "scores": [examples.scores[window].tolist() for window in windows],
        "text": None,
    }


def descriptor_question(name: str, level: int, rng: np.random.Generator) -> tuple[str, str]:
    """
    A multiple-choice question about a descriptor in one of its wordings, and its answer: a sentence as in
    descriptions, whose beginning the language model finds again in the summary, with the level behind it.
    """
    return question(name, int(rng.integers(len(QUESTIONS)))), sentence(Statement(name, LEVELS[level]))


def level_description(levels: np.ndarray, statements: int, rng: np.random.Generator) -> str:
    """A description of some of the known descriptors; levels: int [descriptors]."""
    known = WALK[levels[WALK] >= 0]
    first = 0 if rng.random() < FIRST_SHARE else rng.integers(len(known))
    return description(levels, np.roll(known, -first)[:statements].tolist())


def walk_place(name: str) -> int:
    """Where a descriptor comes in the order of descriptions; behind all where it is none of them."""
    return int(np.flatnonzero(WALK == CORE_NAMES.index(name))[0]) if name in CORE_NAMES else len(WALK)


def corpus_description(text: str, paragraphs: int | None, rng: np.random.Generator) -> str:
    """So many paragraphs of a corpus' description in its order, or all, after its first line."""
    start, *texts = text.split("\n")
    chosen = sorted(rng.permutation(len(texts))[:paragraphs])
    return "\n".join([start, *(texts[place] for place in chosen)])


def description_chat(
    examples: Examples, window: int, statements: int, paragraphs: int | None, rng: np.random.Generator
) -> list[dict]:
    """Open-ended: a request, and what the window's levels say or, as often, what the corpus says of the scan."""
    text = examples.rows[window].get("description")
    if text is None or rng.random() < 0.5:
        answer = level_description(examples.levels[window], statements, rng)
    else:
        answer = corpus_description(text, paragraphs, rng)
    return [user(scan_block(), text_block(REQUESTS[rng.integers(len(REQUESTS))])), assistant(answer)]


def question_chat(examples: Examples, window: int, questions: int, rng: np.random.Generator) -> list[dict]:
    """One or several multiple-choice questions about one scan, each answered with a level."""
    levels, chat = examples.levels[window], []
    for index in rng.permutation(np.flatnonzero(levels >= 0))[:questions]:
        text, answer = descriptor_question(CORE_NAMES[index], levels[index], rng)
        chat += [user(*([] if chat else [scan_block()]), text_block(text)), assistant(answer)]
    return chat


def alignment_rows(
    examples: Examples,
    texts: Sequence[str],
    rows: int,
    weights: Sequence[float],
    questions: int,
    statements: int,
    paragraphs: int | None,
    seed: int,
) -> Dataset:
    """
    Stage 2: a scan and its description, a scan and questions about its descriptors, a scan alone (only its next codes
    are predicted), or plain text, drawn with `weights` in that order; each window once before any comes again.
    """
    rng = np.random.default_rng(seed)
    made = []
    for window in draw_rounds(len(examples), rows, rng):
        kind = rng.choice(4, p=weights)
        if kind < 2 and not (examples.levels[window] >= 0).any():
            # nothing is known of it
            kind = 2
        if kind == 0:
            made.append(row_of(examples, [window], description_chat(examples, window, statements, paragraphs, rng)))
        elif kind == 1:
            made.append(row_of(examples, [window], question_chat(examples, window, questions, rng)))
        elif kind == 2:
            made.append(row_of(examples, [window]))
        else:
            made.append(text_row(texts, rng))
    return chat_dataset(made)


def text_row(texts: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    """A row of `FEATURES`: an excerpt of one of the texts."""
    text = excerpt(texts[int(rng.integers(len(texts)))], TEXT_WORDS, rng)
    return {"messages": [], "codes": [], "scores": [], "text": text}


def draw_rounds(windows: int, rows: int, rng: np.random.Generator) -> list[int]:
    """Each window once before any comes again."""
    rounds = [rng.permutation(windows) for _ in range(-(-rows // windows))]
    return np.concatenate(rounds)[:rows].tolist()


def chat_dataset(rows: Sequence[dict]) -> Dataset:
    """Rows {"messages", "codes", "scores", "text"} as the collator takes them."""
    return Dataset.from_list([{"scores": [], "text": None, **row} for row in rows], features=FEATURES)
