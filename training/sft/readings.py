"""
Rows that teach the language model to answer as a task's scores say.

A row's scores of a task are those of another subject, and its answer is drawn from what these scores predict: nothing
else in the row tells the answer, and there are as many such rows as windows times windows. Scores are wider, and
answers surer, than those of subjects: from few uncertain answers a language model learns little of what they depend
on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from sklearn.linear_model import LinearRegression, LogisticRegression

from ..alignment.chats import assistant, chat_dataset, draw_rounds, row_of, scan_block, text_block, user
from ..alignment.examples import Examples, score_names
from ..data.tasks import Task, labels_of


# least standard deviation, over subjects, of the log-probability of an answer against the mean of the answers
SHARPNESS = 4.0
# by how much scores are multiplied in a row, at most: the larger, the clearer what the answer depends on
MOST_WIDENED = 3.0
# questions of a row, at most: each is about another task, and all share the tokens of the scan
MOST_ASKED = 3


@dataclass(frozen=True)
class Reading:
    """
    What the scores in `columns` predict: an answer's logits are those of its share among the labels, `base` [choices],
    and `slopes` [columns, choices] times the scores; a number, with one choice, is so predicted itself.
    """

    task: Task
    columns: list[int]
    base: np.ndarray
    slopes: np.ndarray

    @classmethod
    def fit(cls, task: Task, examples: Examples, names: Sequence[str]) -> "Reading":
        """names: of the columns of the examples' scores, which have a mean of zero."""
        columns = [names.index(name) for name in score_names(task)]
        labels = labels_of(task, examples.rows)
        known = np.flatnonzero([label is not None for label in labels])
        scores = examples.scores[:, columns]
        if task.choices is None:
            values = np.array([float(cast(float, labels[row])) for row in known])
            line = LinearRegression().fit(scores[known], values)
            return cls(task, columns, np.array([line.intercept_]), line.coef_[:, None])
        answers = np.array([task.answer(labels[row]) for row in known])
        words = task.choice_words
        fitted = LogisticRegression().fit(scores[known], answers)
        shares = np.array([(answers == word).mean() for word in fitted.classes_])
        # of two choices, the library fits the second alone
        slopes = fitted.coef_.T if len(shares) > 2 else fitted.coef_.T * [[-0.5, 0.5]]
        slopes = slopes - slopes.mean(1, keepdims=True)
        spread = np.sqrt(shares @ (scores @ slopes).var(0))
        # an answer that nobody has is never given
        base, full = np.full(len(words), -np.inf), np.zeros((len(columns), len(words)))
        places = [words.index(word) for word in fitted.classes_]
        base[places], full[:, places] = np.log(shares), slopes * max(1.0, SHARPNESS / max(spread, 1e-6))
        return cls(task, columns, base, full)

    def answer(self, scores: np.ndarray, rng: np.random.Generator) -> str:
        """Drawn by what the scores [columns] predict; of a number, what they predict, within the task's range."""
        predicted = self.base + scores @ self.slopes
        if self.task.choices is None:
            low, high = self.task.range or (-np.inf, np.inf)
            return self.task.answer(float(predicted[0].clip(low, high)))
        return self.task.choice_words[rng.choice(len(predicted), p=softmax(predicted))]


def reading_rows(
    examples: Examples, names: Sequence[str], tasks: Sequence[Task], rows: int, tokens_per_patch: int, seed: int
) -> Dataset:
    """
    Chats with a question of each of `MOST_ASKED` tasks, and the latent tokens of the window's first patch alone: short
    rows are cheap, and what they teach serves prompts with all latent tokens as well.
    """
    readings = [Reading.fit(task, examples, names) for task in tasks]
    rng = np.random.default_rng(seed)
    made = []
    for window in draw_rounds(len(examples), rows, rng):
        scores = examples.scores[window].copy()
        # tasks of one column (age, age group) are about one subject
        donors = {task.column: int(rng.integers(len(examples))) for task in tasks}
        for reading in readings:
            widened = rng.uniform(1, MOST_WIDENED)
            scores[reading.columns] = widened * examples.scores[donors[reading.task.column], reading.columns]
        chat: list[dict] = []
        for place in rng.permutation(len(readings))[:MOST_ASKED]:
            task = readings[place].task
            question = text_block(task.questions[rng.integers(len(task.questions))])
            chat.append(user(question) if chat else user(scan_block(), question))
            chat.append(assistant(readings[place].answer(scores[readings[place].columns], rng)))
        row = row_of(examples, [window], chat)
        made.append({**row, "codes": [row["codes"][0][:tokens_per_patch]], "scores": [scores.tolist()]})
    return chat_dataset(made)
