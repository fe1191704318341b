"""
Labelled scans as chats in the form that the collator reads: questions of tasks, and those that a corpus holds.

What stands before the questions of a chat must not tell their answers. All chats are made by `conversation`, which
refuses what does.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..alignment.chats import assistant, chat_dataset, draw_rounds, scan_block, text_block, user
from ..data.tasks import Label, Rows, Task, column_names, column_of, labels_of, load_task


REQUESTS = (
    "Describe the person in this scan.",
    "What can be said about the person who was scanned?",
    "Who was scanned?",
)
# columns of a corpus that are read where they are there
CORPUS_COLUMNS = ("scan", "questions", "messages", "description")


@dataclass(frozen=True)
class Turn:
    """
    A question and its answer.

    labels: the tasks that the answer is about with their labels; none where it is about descriptors, as in a corpus.
    scans: rows of the scans that the question brings along; none where it is about the chat's own.
    """

    text: str
    answer: str
    labels: tuple[tuple[Task, Label], ...] = ()
    scans: tuple[int, ...] = ()


def task_turn(task: Task, label: Label, rng: np.random.Generator) -> Turn:
    """A question of a task in one of its wordings."""
    return Turn(task.questions[rng.integers(len(task.questions))], task.answer(label), ((task, label),))


def person_turn(labels: Sequence[tuple[Task, Label]], rng: np.random.Generator) -> Turn:
    """Open-ended: a request, and all that the labels say of the person."""
    statements = [task.statement(label) for task, label in labels]
    answer = " ".join(f"{statement[0].upper()}{statement[1:]}." for statement in statements)
    return Turn(REQUESTS[rng.integers(len(REQUESTS))], answer, tuple(labels))


def tells(text: str, turns: Sequence[Turn]) -> list[str]:
    """Words of a text before the turns that give answers of theirs away."""
    return [word for turn in turns for task, label in turn.labels for word in task.leaks(text, label)]


def conversation(turns: Sequence[Turn], said: Sequence[str] = (), description: str | None = None) -> list[dict]:
    """
    A chat about a scan. ValueError if an answer is told before it is asked for.

    said: sentences about the person or the study. description: of the scan, by its descriptors. Both stand before the
    first question.
    """
    columns: dict[str, str] = {}
    for task, _ in (pair for turn in turns for pair in turn.labels):
        if task.column in columns:
            raise ValueError(
                f"expected one task of column {task.column!r} in a chat, got {columns[task.column]!r} and "
                f"{task.name!r}: the answer to one tells that to the other"
            )
        columns[task.column] = task.name
    if description is not None and not all(turn.labels for turn in turns):
        raise ValueError("expected no description of the scan before a question about its descriptors")
    context = [*said, *([] if description is None else [description])]
    for text in context:
        if words := tells(text, turns):
            raise ValueError(f"expected a text that does not tell the answer to {list(columns.values())}, got {words}")
    messages = []
    for turn in turns:
        scans = len(turn.scans) or int(not messages)
        text = "\n".join([*context, turn.text]) if not messages else turn.text
        messages += [user(*(scan_block() for _ in range(scans)), text_block(text)), assistant(turn.answer)]
    return messages


def task_dataset(
    rows: Rows,
    codes: Sequence[np.ndarray],
    tasks: Sequence[Task],
    size: int,
    questions: int,
    weights: Sequence[float],
    seed: int,
    source_share: float = 0.0,
    description_share: float = 0.0,
) -> Dataset:
    """
    Stage 3 from labels: `size` chats, each with one question, several of them, or an open-ended request, drawn with
    `weights` in that order. Every scan comes once before any comes again; one about which nothing is known never does.

    Args:
        rows: prepared scans, or rows of a corpus, whose questions, comparisons and descriptions are then among what is
            asked (a row without labels gets several of those in place of an open-ended request without an answer).
        codes: int [tokens] of each row's scan.
        questions: most of them in one chat.
        source_share: of the chats that begin with what is known of the study: its name (the row's site), the range of
            its people's ages, what the task says itself (`Task.about`); without that which would tell an answer.
        description_share: of the chats about people that begin with the scan's description, where the rows have one
            that tells no answer.
    """
    chats = TaskChats(rows, codes, tasks, questions, source_share, description_share)
    if not len(chats.known):
        raise ValueError(f"expected a row with a label or a question, got none among {len(codes)}")
    rng = np.random.default_rng(seed)
    made = []
    for place in draw_rounds(len(chats.known), size, rng):
        paradigm = rng.choice(3, p=weights)
        made.append(chats.chat(chats.known[place], paradigm, rng))
    return chat_dataset(made)


class TaskChats:
    """What is known of each scan, and chats about it. Arguments: see `task_dataset`."""

    def __init__(
        self,
        rows: Rows,
        codes: Sequence[np.ndarray],
        tasks: Sequence[Task],
        questions: int,
        source_share: float,
        description_share: float,
    ):
        if len(codes) != len(rows):
            raise ValueError(f"expected codes for each of the {len(rows)} rows, got {len(codes)}")
        self.codes = codes
        self.questions = questions
        self.source_share = source_share
        self.description_share = description_share
        labels = [labels_of(task, rows) for task in tasks]
        self.labels = [
            [(task, values[row]) for task, values in zip(tasks, labels, strict=True) if values[row] is not None]
            for row in range(len(codes))
        ]
        present = column_names(rows)
        self.corpus = {name: column_of(rows, name) for name in CORPUS_COLUMNS if name in present}
        self.places = defaultdict(list)
        for row, scan in enumerate(self.corpus.get("scan", ())):
            self.places[scan].append(row)
        self.asked = [self._answerable(row) for row in range(len(codes))]
        self.sources = _Sources(rows, tasks, labels) if source_share else None
        if description_share:
            column_of(rows, "description")
        self.known = [row for row in range(len(codes)) if self.labels[row] or self.asked[row]]

    def chat(self, row: int, paradigm: int, rng: np.random.Generator) -> dict[str, Any]:
        """A row of `FEATURES`. paradigm: 0 for one question, 1 for several, 2 for an open-ended request."""
        turns = self._open_ended(row, rng) if paradigm == 2 else None
        if turns is None:
            turns = self._questions(row, 1 if paradigm == 0 else self.questions, rng)
        said, description = [], None
        if rng.uniform() < self.source_share and self.sources is not None:
            said = self.sources.sentences(row, turns)
        if rng.uniform() < self.description_share and all(turn.labels for turn in turns):
            text = self.corpus["description"][row]
            description = None if tells(text, turns) else text
        scans = [row] if not turns[0].scans else []
        scans += [scan for turn in turns for scan in turn.scans]
        return {
            "messages": conversation(turns, said, description),
            "codes": [np.asarray(self.codes[scan]).tolist() for scan in scans],
        }

    def _answerable(self, row: int) -> list[dict[str, Any]]:
        """Questions of the corpus about scans that are among the rows."""
        asked = self.corpus["questions"][row] if "questions" in self.corpus else []
        return [question for question in asked if all(scan in self.places for scan in question["scans"])]

    def _questions(self, row: int, most: int, rng: np.random.Generator) -> list[Turn]:
        """Different ones in random order, of each column one; one that brings its own scans comes last."""
        pool = [*self.labels[row], *self.asked[row]]
        turns, comparison, columns = [], [], set()
        for place in rng.permutation(len(pool)):
            if len(turns) + len(comparison) == most:
                break
            if isinstance(pool[place], tuple):
                task, label = pool[place]
                if task.column not in columns:
                    columns.add(task.column)
                    turns.append(task_turn(task, label, rng))
            elif len(pool[place]["scans"]) == 1:
                turns.append(Turn(pool[place]["text"], pool[place]["answer"]))
            elif not comparison:
                scans = [self.places[scan] for scan in pool[place]["scans"]]
                drawn = tuple(int(rows[rng.integers(len(rows))]) for rows in scans)
                comparison.append(Turn(pool[place]["text"], pool[place]["answer"], scans=drawn))
        return turns + comparison

    def _open_ended(self, row: int, rng: np.random.Generator) -> list[Turn] | None:
        """What the labels say of the person, or what the corpus says of the scan, as likely where there are both."""
        by_column = defaultdict(list)
        for task, label in self.labels[row]:
            by_column[task.column].append((task, label))
        turns = []
        if by_column:
            pairs = [same[rng.integers(len(same))] for same in by_column.values()]
            turns.append(person_turn(pairs, rng))
        if "messages" in self.corpus:
            request, answer = self.corpus["messages"][row]
            turns.append(Turn(request["content"][-1]["text"], answer["content"][-1]["text"]))
        return [turns[rng.integers(len(turns))]] if turns else None


class _Sources:
    """Sentences about the studies that scans come from: those of one site are one study."""

    def __init__(self, rows: Rows, tasks: Sequence[Task], labels: Sequence[Sequence[Label | None]]):
        present = column_names(rows)
        self.sites = column_of(rows, "site") if "site" in present else [None] * len(rows)
        members = defaultdict(list)
        for row, site in enumerate(self.sites):
            members[site].append(row)
        # where all people of a study have one answer, its name tells it
        self.telling = defaultdict(set)
        for task, values in zip(tasks, labels, strict=True):
            for site, of_site in members.items():
                answers = {task.answer(values[row]) for row in of_site if values[row] is not None}
                if len(answers) == 1:
                    self.telling[site].add(task.name)
        self.texts = defaultdict(list)
        ages = list(map(load_task("age").label, column_of(rows, "age"))) if "age" in present else [None] * len(rows)
        for site, of_site in members.items():
            if site is not None:
                self.texts[site].append(f"The scan was taken in the study {site}.")
            known = [ages[row] for row in of_site if ages[row] is not None]
            if known:
                # to the decade: no person's age can be read from it
                low, high = 10 * math.floor(min(known) / 10), 10 * math.floor(max(known) / 10 + 1)
                self.texts[site].append(f"People in this study are {low} to {high} years old.")

    def sentences(self, row: int, turns: Sequence[Turn]) -> list[str]:
        """Those that tell no answer of the turns."""
        tasks = [task for turn in turns for task, _ in turn.labels]
        site = self.sites[row]
        of_study = [] if self.telling[site] & {task.name for task in tasks} else self.texts[site]
        texts = [*of_study, *(task.about for task in tasks if task.about)]
        return [text for text in texts if not tells(text, turns)]
