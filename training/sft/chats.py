"""
Labelled scans as chats in the form that the collator reads: questions of tasks, and those that a corpus holds.

What stands before the questions of a chat must not tell their answers. All chats are made by `conversation`, which
refuses what does.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import Statement, level_answers, sentence

from ..alignment.chats import (
    assistant,
    chat_dataset,
    description_chat,
    descriptor_question,
    draw_rounds,
    row_of,
    scan_block,
    text_block,
    user,
)
from ..alignment.examples import Examples
from ..data.tasks import Label, Rows, Task, column_names, column_of, labels_of, load_task


if TYPE_CHECKING:
    from .program import SftArguments


REQUESTS = (
    "Describe the person in this scan.",
    "What can be said about the person who was scanned?",
    "Who was scanned?",
)


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
    question = task.questions[rng.integers(len(task.questions))]
    return Turn(question, task.sentence(task.answer(label)), ((task, label),))


def person_turn(labels: Sequence[tuple[Task, Label]], rng: np.random.Generator) -> Turn:
    """Open-ended: a request, and all that the labels say of the person."""
    answer = " ".join(covariate(task, label) for task, label in labels)
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


def instruction_rows(
    examples: Examples, tasks: Sequence[Task], rows: int, mixture: "SftArguments", seed: int
) -> Dataset:
    """
    Stage 3: `rows` chats. Every window comes once before any comes again; one without a question never does. What
    stands before the questions of a chat, of the study, other labels or a description, tells no answer.
    """
    chats = ScanChats(examples, tasks, mixture)
    if not len(chats.known):
        raise ValueError(f"expected a window with a label or a question, got none among {len(examples)}")
    rng = np.random.default_rng(seed)
    made = []
    for place in draw_rounds(len(chats.known), rows, rng):
        paradigm = rng.choice(3, p=mixture.row_weights)
        made.append(chats.chat(chats.known[place], paradigm, rng))
    return chat_dataset(made)


class ScanChats:
    """What is known of each window's scan, and chats about it."""

    def __init__(self, examples: Examples, tasks: Sequence[Task], mixture: "SftArguments"):
        self.examples, self.mixture = examples, mixture
        # held-out subjects may all have one
        labels = [labels_of(task, examples.rows, least=0) for task in tasks]
        self.labels = [
            [(task, label) for task, of in zip(tasks, labels, strict=True) if (label := of[row]) is not None]
            for row in range(len(examples))
        ]
        self.places = defaultdict(list)
        for place, row in enumerate(examples.rows):
            self.places[row.get("folder"), row.get("scan")].append(place)
        self.sources = _Sources(examples.rows, tasks, labels) if mixture.source_share else None
        self.known = [row for row in range(len(examples)) if self.labels[row] or (examples.levels[row] >= 0).any()]

    def chat(self, row: int, paradigm: int, rng: np.random.Generator) -> dict[str, Any]:
        """A row of `FEATURES`. paradigm: 0 for one question, 1 for several, 2 for an open-ended request."""
        mixture = self.mixture
        levels = self.examples.levels[row]
        about_labels = bool(self.labels[row]) and (rng.random() < mixture.label_share or not (levels >= 0).any())
        if paradigm == 2:
            turns = [self._open_ended(row, about_labels, rng)]
        else:
            turns = self._questions(row, 1 if paradigm == 0 else mixture.questions, about_labels, rng)
        said, description = [], None
        if rng.random() < mixture.source_share and self.sources is not None:
            said = self.sources.sentences(row, turns)
        if about_labels and rng.random() < mixture.covariate_share:
            said += self._covariates(row, turns)
        text = self.examples.rows[row].get("description")
        if text and rng.random() < mixture.description_share and all(turn.labels for turn in turns):
            description = None if tells(text, turns) else text
        windows = [] if turns[0].scans else [row]
        windows += [window for turn in turns for window in turn.scans]
        return row_of(self.examples, windows, conversation(turns, said, description))

    def _questions(self, row: int, most: int, about_labels: bool, rng: np.random.Generator) -> list[Turn]:
        """Different ones in random order: labels, of each column one, then descriptors; a corpus' own comes last."""
        turns, columns = [], set()
        if about_labels:
            for place in rng.permutation(len(self.labels[row])):
                task, label = self.labels[row][place]
                if task.column not in columns and len(turns) < most:
                    columns.add(task.column)
                    turns.append(task_turn(task, label, rng))
        levels, named = self.examples.levels[row], set()
        for index in rng.permutation(np.flatnonzero(levels >= 0))[: most - len(turns)]:
            turns.append(Turn(*descriptor_question(CORE_NAMES[index], levels[index], rng)))
            named.add(CORE_NAMES[index])
        turns = [turns[place] for place in rng.permutation(len(turns))]
        known, of_corpus = self.examples.rows[row], []
        for asked in known.get("questions") or ():
            scans = [self.places[known.get("folder"), scan] for scan in asked["scans"]]
            # what the whole scan's level is may differ from the window's
            if all(scans) and (len(scans) > 1 or not named & set(asked["descriptors"])):
                of_corpus.append((asked, scans))
        if of_corpus and len(turns) > 1:
            asked, scans = of_corpus[rng.integers(len(of_corpus))]
            drawn = tuple(int(windows[rng.integers(len(windows))]) for windows in scans) if len(scans) > 1 else ()
            answer = asked["answer"]
            if level_answers(asked["text"]) is not None:
                answer = sentence(Statement(asked["descriptors"][0], answer))
            turns[-1] = Turn(asked["text"], answer, scans=drawn)
        return turns

    def _open_ended(self, row: int, about_labels: bool, rng: np.random.Generator) -> Turn:
        """What the labels say of the person, or what the levels or a corpus say of the scan."""
        if about_labels:
            by_column = defaultdict(list)
            for task, label in self.labels[row]:
                by_column[task.column].append((task, label))
            return person_turn([same[rng.integers(len(same))] for same in by_column.values()], rng)
        mixture = self.mixture
        request, answer = description_chat(self.examples, row, mixture.statements, mixture.paragraphs, rng)
        return Turn(request["content"][-1]["text"], answer["content"][-1]["text"])

    def _covariates(self, row: int, turns: Sequence[Turn]) -> list[str]:
        """Sentences of labels that are not asked for and give no answer away."""
        asked = {task.column for turn in turns for task, _ in turn.labels}
        texts = [covariate(task, label) for task, label in self.labels[row] if task.column not in asked]
        return [text for text in texts if not tells(text, turns)]


def covariate(task: Task, label: Label) -> str:
    """A label as a sentence."""
    statement = task.statement(label)
    return f"{statement[0].upper()}{statement[1:]}."


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
