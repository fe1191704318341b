"""
Rows that teach the language model to answer as a scan's scores say.

A descriptor's answer, and what a description states of it, is the tercile of its score. A row's scores of a task are
those of another subject, and its answer is drawn from what these scores predict: nothing else in the row tells the
answer, and there are as many such rows as windows times windows. Scores are wider, and answers surer, than those of
subjects: from few uncertain answers a language model learns little of what they depend on, and where it is sure, the
order of the scores is lost. Where a row has questions about descriptors, the others are wider as well: an answer about
a task that leans on them would do so more in new subjects, whose scores of tasks are not widened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from sklearn.linear_model import LinearRegression, LogisticRegression

from fmrilm.processors.descriptors.cohort import QUANTILES
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import REQUESTS

from ..alignment.chats import (
    assistant,
    chat_dataset,
    descriptor_question,
    draw_rounds,
    level_description,
    row_of,
    scan_block,
    text_block,
    user,
)
from ..alignment.examples import Examples, score_names, score_spread
from ..data.tasks import Task, labels_of


# least standard deviation, over subjects, of the log-probability of an answer against the mean of the answers
SHARPNESS = 4.0
# largest standard deviation of scores in a row (the least is one): the larger, the clearer what the answer depends on
MOST_WIDENED = 3.0
# questions of a row about tasks, at most: all share the tokens of the scan
MOST_ASKED = 2
# of the rows, those with the latent tokens of their first patch alone: short rows are cheap, and teach as much
SHORT_SHARE = 0.75


@dataclass(frozen=True)
class Reading:
    """
    What the scores in `columns` predict: an answer's logits are `intercept` [choices] and `slopes` [columns, choices]
    times the scores; a number, with one choice, is so predicted itself. Answers of rows have the logits of their
    share among the labels, `shares` [choices], and `sharpness` times the slopes.
    """

    task: Task
    columns: list[int]
    intercept: np.ndarray
    slopes: np.ndarray
    shares: np.ndarray
    sharpness: float

    @classmethod
    def fit(cls, task: Task, examples: Examples, names: Sequence[str]) -> "Reading":
        """names: of the columns of the examples' scores, which have a mean of zero."""
        columns = [names.index(name) for name in score_names(task)]
        labels = labels_of(task, examples.rows)
        known = np.flatnonzero([label is not None for label in labels])
        scores, spread = examples.scores[:, columns], score_spread(score_names(task)[0])
        if task.choices is None:
            values = np.array([float(cast(float, labels[row])) for row in known])
            line = LinearRegression().fit(scores[known], values)
            return cls(task, columns, np.array([line.intercept_]), line.coef_[:, None], np.ones(1), 1.0)
        answers = np.array([task.answer(labels[row]) for row in known])
        words = task.choice_words
        fitted = LogisticRegression().fit(scores[known] / spread, answers)
        shares = np.array([(answers == word).mean() for word in fitted.classes_])
        # of two choices, the library fits the second alone
        two = len(shares) == 2
        slopes = fitted.coef_.T * [[-0.5, 0.5]] if two else fitted.coef_.T
        slopes = (slopes - slopes.mean(1, keepdims=True)) / spread
        deviation = np.sqrt(shares @ (scores @ slopes).var(0))
        # an answer that nobody has is never given
        places = [words.index(word) for word in fitted.classes_]
        every = np.zeros((len(columns) + 2, len(words)))
        every[0] = -np.inf
        every[0, places] = fitted.intercept_ * [-0.5, 0.5] if two else fitted.intercept_
        every[1, places], every[2:, places] = shares, slopes
        return cls(task, columns, every[0], every[2:], every[1], max(1.0, SHARPNESS / max(deviation, 1e-6)))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """[..., choices] that scores [..., columns] predict."""
        return softmax(self.intercept + scores @ self.slopes, axis=-1)

    def answer(self, scores: np.ndarray, rng: np.random.Generator) -> str:
        """For a row with these scores [columns], at random; of a number, the predicted one in the task's range."""
        if self.task.choices is None:
            low, high = self.task.range or (-np.inf, np.inf)
            return self.task.answer(float((self.intercept + scores @ self.slopes)[0].clip(low, high)))
        with np.errstate(divide="ignore"):
            logits = np.log(self.shares) + self.sharpness * (scores @ self.slopes)
        return self.task.choice_words[rng.choice(len(logits), p=softmax(logits))]


@dataclass(frozen=True)
class Terciles:
    """
    Of the scores' columns that are descriptors: bounds [columns of all scores] between low and typical, and between
    typical and high.
    """

    columns: list[int]
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def fit(cls, examples: Examples, names: Sequence[str]) -> "Terciles":
        """names: of the columns of the examples' scores."""
        columns = [column for column, name in enumerate(names) if name in CORE_NAMES]
        return cls(columns, *np.quantile(examples.scores, QUANTILES, axis=0))

    def levels(self, scores: np.ndarray, column: int) -> np.ndarray:
        """Tercile labels int [...] of scores [...] of a column."""
        return (scores > self.lower[column]).astype(int) + (scores > self.upper[column])


def reading_rows(
    examples: Examples,
    names: Sequence[str],
    readings: Sequence[Reading],
    rows: int,
    tokens_per_patch: int,
    seed: int,
    *,
    descriptors: int,
    described_share: float = 0.0,
    statements: int = 8,
) -> Dataset:
    """
    Chats with questions of tasks and about so many descriptors, in random order, about a window's first patch or, in
    some rows, all of it. A share of the chats has a request for a description in place of the descriptors' questions,
    answered with so many statements. names: of the columns of the examples' scores.
    """
    rng = np.random.default_rng(seed)
    terciles = Terciles.fit(examples, names)
    made = []
    for window in draw_rounds(len(examples), rows, rng):
        scores = examples.scores[window].copy()
        # tasks of one column (age, age group) are about one subject
        donors = {each.task.column: int(rng.integers(len(examples))) for each in readings}
        answers = []
        for reading in readings:
            widened = rng.uniform(1, MOST_WIDENED) * examples.scores[donors[reading.task.column], reading.columns]
            scores[reading.columns] = widened / score_spread(names[reading.columns[0]])
            answers.append(reading.answer(widened, rng))
        turns = []
        for place in rng.permutation(len(readings))[:MOST_ASKED]:
            task = readings[place].task
            question = task.questions[rng.integers(len(task.questions))]
            turns.append((question, task.sentence(answers[place])))
        if terciles.columns and rng.random() < described_share:
            levels = np.full(len(CORE_NAMES), -1)
            for column in terciles.columns:
                levels[CORE_NAMES.index(names[column])] = terciles.levels(scores[column], column)
            turns.append((REQUESTS[rng.integers(len(REQUESTS))], level_description(levels, statements, rng)))
        else:
            asked, others = np.split(rng.permutation(terciles.columns).astype(int), [descriptors])
            # as wide as those of tasks: an answer about a task must not lean on them
            scores[others] *= rng.uniform(1, MOST_WIDENED)
            for column in map(int, asked):
                turns.append(descriptor_question(names[column], int(terciles.levels(scores[column], column)), rng))
        chat: list[dict] = []
        for place in rng.permutation(len(turns)):
            question, answer = turns[place]
            chat.append(user(text_block(question)) if chat else user(scan_block(), text_block(question)))
            chat.append(assistant(answer))
        row = row_of(examples, [window], chat)
        kept = tokens_per_patch if rng.random() < SHORT_SHARE else None
        made.append({**row, "codes": [row["codes"][0][:kept]], "scores": [scores.tolist()]})
    return chat_dataset(made)
