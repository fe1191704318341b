"""Answers as sure as the labels are: a slope and biases for the log-probabilities of a tuned model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..alignment.examples import Examples, read_scores
from ..evaluation.ask import EncodedWindow, score_windows
from .readings import Reading


# training windows that are asked about, and the penalty of a bias
WINDOWS, BIAS_PENALTY = 128, 1e-3


def fit_calibrations(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    examples: Examples,
    readings: Sequence[Reading],
    seed: int,
) -> list[dict]:
    """
    `FmriLMConfig.calibrations` of the readings' tasks that have choices. Rows that teach to read have surer answers
    than people have; slope and biases bring the model's log-probabilities to the probabilities that the scores it read
    predict, by the least cross-entropy over training windows. No label is looked at here.
    """
    readings = [each for each in readings if each.task.choices is not None]
    if not readings:
        return []
    rows = np.random.default_rng(seed).permutation(len(examples))[:WINDOWS]
    windows = [EncodedWindow(np.asarray(examples.codes[row]), examples.features[row]) for row in rows]
    seen = read_scores(model, replace(examples, features=examples.features[rows])).scores
    asked = [each.task.questions[0] for each in readings]
    choices = [processor.encode_choices(list(each.task.choice_words)) for each in readings]
    found = []
    for reading, scores in zip(readings, score_windows(model, processor, windows, asked, choices), strict=True):
        slope, biases = fit(scores, reading.probabilities(seen[:, reading.columns]))
        words = reading.task.choice_words
        found.append(
            {
                "questions": list(reading.task.questions),
                "slope": slope,
                "biases": dict(zip(words, biases.tolist(), strict=True)),
            }
        )
    return found


def fit(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, np.ndarray]:
    """A positive slope, and biases [choices], from log-probabilities [rows, choices] to probabilities."""

    def loss(values: np.ndarray) -> float:
        predicted = log_softmax(np.exp(values[0]) * scores + values[1:], axis=-1)
        return float(-(wanted * predicted).sum(-1).mean() + BIAS_PENALTY * (values[1:] ** 2).sum())

    values = minimize(loss, np.zeros(1 + scores.shape[1]), method="BFGS").x
    return float(np.exp(values[0])), values[1:]
