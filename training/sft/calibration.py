"""Answers as sure as the scores are: a slope and biases for the log-probabilities of a tuned model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import log_softmax

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.text import QUESTIONS, question

from ..alignment.examples import Examples, read_scores
from ..evaluation.ask import EncodedWindow, score_windows
from .readings import Reading, Terciles


# training windows that are asked about, and the penalty of a bias
WINDOWS, BIAS_PENALTY = 128, 1e-3
# of the descriptors: windows, in parts that are asked about as many descriptors each
DESCRIBED_WINDOWS, PARTS, ASKED_IN_PART = 48, 6, 6


def fit_calibrations(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    examples: Examples,
    readings: Sequence[Reading],
    seed: int,
    descriptors: bool = True,
) -> list[dict]:
    """
    `FmriLMConfig.calibrations` of the readings' tasks that have choices and, if so wished, of the descriptors. Rows
    that teach to read have surer answers than scores are; slope and biases bring the model's log-probabilities to the
    probabilities that the scores it read predict (of a descriptor, to the tercile), by the least cross-entropy over
    training windows. No label is looked at here.
    """
    readings = [each for each in readings if each.task.choices is not None]
    if not readings and not descriptors:
        return []
    rows = np.random.default_rng(seed).permutation(len(examples))[:WINDOWS]
    windows = [EncodedWindow(np.asarray(examples.codes[row]), examples.features[row]) for row in rows]
    seen, found = read_scores(model, replace(examples, features=examples.features[rows])).scores, []
    if descriptors:
        terciles = Terciles.fit(examples, model.config.score_names)
        found += of_descriptors(model, processor, windows, seen, terciles, seed)
    if not readings:
        return found
    asked = [each.task.questions[0] for each in readings]
    choices = [processor.encode_choices(each.task.choice_words, each.task.questions[0]) for each in readings]
    for reading, scores in zip(readings, score_windows(model, processor, windows, asked, choices), strict=True):
        wanted, words = reading.probabilities(seen[:, reading.columns]), reading.task.choice_words
        slope, biases = fit(scores, wanted)
        # a slope and biases cannot mend answers that do not change with the scores
        pairs = [pair for pair in zip(scores.T, wanted.T, strict=True) if np.ptp(pair[1])]
        ranks = [
            pd.Series(given).corr(pd.Series(due), method="spearman") if np.ptp(given) else 0.0 for given, due in pairs
        ]
        print(f"{reading.task.spoken}: answers follow the scores at a rank correlation of {np.mean(ranks):.2f}")
        found.append(
            {
                "questions": list(reading.task.questions),
                "slope": slope,
                "biases": dict(zip(words, biases.tolist(), strict=True)),
            }
        )
    return found


def of_descriptors(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    windows: Sequence[EncodedWindow],
    seen: np.ndarray,
    terciles: Terciles,
    seed: int,
) -> list[dict]:
    """One calibration for questions about all descriptors, if there are any; seen: scores [windows, score_names]."""
    if not terciles.columns:
        return []
    rng, parts = np.random.default_rng(seed), []
    count = min(DESCRIBED_WINDOWS, len(windows))
    for rows in np.array_split(np.arange(count), min(PARTS, count)):
        columns = rng.permutation(terciles.columns)[:ASKED_IN_PART].tolist()
        asked = [question(model.config.score_names[column]) for column in columns]
        choices = [processor.encode_choices(LEVELS, text) for text in asked]
        scores = score_windows(model, processor, [windows[row] for row in rows], asked, choices)
        parts += [
            (each, terciles.levels(seen[rows, column], column)) for each, column in zip(scores, columns, strict=True)
        ]
    scores, levels = (np.concatenate(part) for part in zip(*parts, strict=True))
    slope, biases = fit(scores, np.eye(len(LEVELS))[levels])
    names = [model.config.score_names[column] for column in terciles.columns]
    texts = [question(name, wording) for name in names for wording in range(len(QUESTIONS))]
    return [{"questions": texts, "slope": slope, "biases": dict(zip(LEVELS, biases.tolist(), strict=True))}]


def fit(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, np.ndarray]:
    """A positive slope, and biases [choices], from log-probabilities [rows, choices] to probabilities."""

    def loss(values: np.ndarray) -> float:
        predicted = log_softmax(np.exp(values[0]) * scores + values[1:], axis=-1)
        return float(-(wanted * predicted).sum(-1).mean() + BIAS_PENALTY * (values[1:] ** 2).sum())

    values = minimize(loss, np.zeros(1 + scores.shape[1]), method="BFGS").x
    return float(np.exp(values[0])), values[1:]
