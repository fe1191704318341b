"""
Rows that teach the language model to answer as a task's scores say.

A row's scores of a task are those of another subject, and its answer is drawn from what these scores predict: nothing
else in the row tells the answer, and there are as many such rows as windows times windows. The answers are surer than
the labels are, because a language model that learns from few uncertain answers learns little of what they depend on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LinearRegression, LogisticRegression

from ..alignment.chats import assistant, draw_rounds, row_of, scan_block, text_block, user
from ..alignment.examples import Examples, score_names
from ..data.tasks import Task, labels_of


# least standard deviation, over subjects, of the log-probability of an answer against the mean of the answers
SHARPNESS = 1.5


@dataclass(frozen=True)
class Reading:
    """
    What the scores in `columns` predict for each window: the answers' probabilities [windows, choices], or of a number
    its expected value [windows].
    """

    task: Task
    columns: list[int]
    predicted: np.ndarray

    @classmethod
    def fit(cls, task: Task, examples: Examples, names: Sequence[str]) -> "Reading":
        """names: of the columns of the examples' scores."""
        columns = [names.index(name) for name in score_names(task)]
        labels = labels_of(task, examples.rows)
        known = np.flatnonzero([label is not None for label in labels])
        scores = examples.scores[:, columns]
        if task.choices is None:
            values = np.array([float(cast(float, labels[row])) for row in known])
            low, high = task.range or (-np.inf, np.inf)
            return cls(task, columns, LinearRegression().fit(scores[known], values).predict(scores).clip(low, high))
        answers = np.array([task.answer(labels[row]) for row in known])
        words = task.choice_words
        fitted = LogisticRegression().fit(scores[known], answers)
        shares = np.array([(answers == word).mean() for word in fitted.classes_])
        evidence = fitted.predict_log_proba(scores)
        evidence -= evidence.mean(1, keepdims=True)
        evidence -= evidence.mean(0)
        logits = np.log(shares) + max(1.0, SHARPNESS / max(np.sqrt(shares @ evidence.var(0)), 1e-6)) * evidence
        chances = np.zeros((len(scores), len(words)))
        chances[:, [words.index(word) for word in fitted.classes_]] = softmax(logits, axis=1)
        return cls(task, columns, chances)

    def answer(self, window: int, rng: np.random.Generator) -> str:
        if self.task.choices is None:
            return self.task.answer(float(self.predicted[window]))
        return self.task.choice_words[rng.choice(self.predicted.shape[1], p=self.predicted[window])]


def reading_rows(
    examples: Examples, names: Sequence[str], tasks: Sequence[Task], rows: int, tokens_per_patch: int, seed: int
) -> list[dict[str, Any]]:
    """
    Rows with one question of a task. Half of them hold the tokens of the window's first patch alone, the others of its
    first few: short rows are cheap, and what they teach does not depend on the latent tokens.
    """
    readings = [Reading.fit(task, examples, names) for task in tasks]
    rng = np.random.default_rng(seed)
    made = []
    for window in draw_rounds(len(examples), rows, rng):
        scores = examples.scores[window].copy()
        # tasks of one column (age, age group) are about one subject
        donors = {task.column: int(rng.integers(len(examples))) for task in tasks}
        for reading in readings:
            scores[reading.columns] = examples.scores[donors[reading.task.column], reading.columns]
        asked = readings[rng.integers(len(readings))]
        task = asked.task
        question = task.questions[rng.integers(len(task.questions))]
        answer = asked.answer(donors[task.column], rng)
        row = row_of(examples, [window], [user(scan_block(), text_block(question)), assistant(answer)])
        patches = len(row["codes"][0]) // tokens_per_patch
        kept = 1 if rng.random() < 0.5 else int(rng.integers(1, patches + 1))
        made.append({**row, "codes": [row["codes"][0][: kept * tokens_per_patch]], "scores": [scores.tolist()]})
    return made
