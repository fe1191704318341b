"""Windows of scans as stages 2 and 3 learn from them: codes, what is known of the scan, and cross-fitted scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration

from ..data.tasks import Task, labels_of
from ..ridge import cross_fitted_ridge


# added to how often each place of a patch held each code: other subjects hold others
PSEUDO_COUNT = 1.0
# standard deviation of the scores of a task's answers; of others it is one. Between the embeddings of two answers, a
# score of one apart, a language model goes from sure to sure; beyond them, the order of its answers is lost.
ANSWER_SPREAD = 0.3


@dataclass(frozen=True)
class Examples:
    """
    A row a window. codes: int [tokens, levels] each. features: float32 [windows, features] of the codes
    (`FmriCodecModel.scan_features`). z_scores: [windows, descriptors] by the model's cohort, NaN where absent. levels:
    int [windows, descriptors] tercile labels, -1 where absent. rows: what is known of the scan (labels, subject, and
    of a corpus its texts). scores: float32 [windows, score_names] once `fit_scores` or `read_scores` has made them.
    """

    codes: Sequence[np.ndarray]
    features: np.ndarray
    z_scores: np.ndarray
    levels: np.ndarray
    rows: list[dict[str, Any]]
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def subjects(self) -> np.ndarray:
        """Whose each window is, [windows]."""
        return np.array([str(row["subject"]) for row in self.rows])


def score_names(task: Task) -> list[str]:
    """Of a task's scores: its number, or each of its choices but the first of two."""
    words = task.choice_words
    return [f"{task.name}={word}" for word in (words[1:] if len(words) == 2 else words)] if words else [task.name]


def score_spread(name: str) -> float:
    """Standard deviation, over training windows, of the scores `name`."""
    return ANSWER_SPREAD if "=" in name else 1.0


def score_targets(examples: Examples, names: Sequence[str], tasks: Sequence[Task]) -> tuple[list[str], np.ndarray]:
    """
    What scores are regressed on: names and values [windows, names], NaN where unknown. The descriptors `names` as
    z-scores; of each task (`score_names`) its number, or 1 and 0 for a choice.
    """
    columns, found = [examples.z_scores], list(names)
    for task in tasks:
        labels = labels_of(task, examples.rows)
        known = np.array([label is not None for label in labels])
        found += score_names(task)
        if task.choices is None:
            columns.append(np.array([np.nan if label is None else float(label) for label in labels])[:, None])
            continue
        answers = np.array([task.answer(label) if label is not None else "" for label in labels])
        words = [name.removeprefix(f"{task.name}=") for name in score_names(task)]
        columns.append(np.where(known[:, None], answers[:, None] == words, np.nan))
    return found, np.concatenate(columns, axis=1)


@torch.no_grad()
def fit_scores(
    model: FmriLMForConditionalGeneration, examples: Examples, names: Sequence[str], targets: np.ndarray, seed: int
) -> tuple[Examples, np.ndarray]:
    """
    Fits the model's readout of the scores `names` to targets [windows, names] by ridge regression, in closed form;
    its other scores stay as they are. The standard deviation of scores is `score_spread`.

    Returns:
        The examples with their scores, each predicted without the subject's own windows: what the language model reads
        in training is then as uncertain as what it reads of new subjects; and the R2 [names] of these predictions.
    """
    summary = model.model.summary
    if summary is None:
        raise ValueError("expected a model with score_names, got one without")
    codec = model.config.codec_config
    ridge = cross_fitted_ridge(
        examples.features, targets, examples.subjects, seed, codec.scan_feature_blocks, codec.num_scan_numbers
    )
    # where other subjects cannot tell, of very few
    found = np.where(np.isfinite(ridge.out_of_fold), ridge.out_of_fold, ridge.predict(examples.features))
    mean, std = found.mean(0), found.std(0) / [score_spread(name) for name in names]
    std = np.where(std > 1e-6, std, np.inf)
    places = [model.config.score_names.index(name) for name in names]
    readout = summary.readout
    readout.weight[places] = torch.from_numpy((ridge.weight / std).T).to(readout.weight)
    readout.bias[places] = torch.from_numpy((ridge.bias - mean) / std).to(readout.bias)
    scores = readout(torch.from_numpy(examples.features).to(readout.weight)).cpu().numpy()
    scores[:, places] = (found - mean) / std
    return replace(examples, scores=scores.astype(np.float32)), ridge.r_squared


@torch.no_grad()
def read_scores(model: FmriLMForConditionalGeneration, examples: Examples) -> Examples:
    """The examples with the scores that the model itself reads out of their features."""
    summary = model.model.summary
    if summary is None:
        raise ValueError("expected a model with score_names, got one without")
    features = torch.from_numpy(examples.features).to(summary.readout.weight)
    return replace(examples, scores=summary.readout(features).float().cpu().numpy())


@torch.no_grad()
def fit_frequencies(model: FmriLMForConditionalGeneration, codes: Sequence[np.ndarray]) -> None:
    """The head of the next codes starts at how frequent each code is at each place of a patch."""
    head, config = model.model.fmri_head, model.config.codec_config
    counts = torch.full_like(head.frequencies, PSEUDO_COUNT)
    levels = np.arange(config.num_quantizers)
    for scan in codes:
        places = np.arange(len(scan)) % config.tokens_per_patch
        flat = (places[:, None] * config.num_quantizers + levels) * config.codebook_size + scan[:, : len(levels)]
        counts.view(-1).index_add_(0, torch.from_numpy(flat.ravel()).long(), torch.ones(flat.size))
    head.frequencies.copy_((counts / counts.sum(-1, keepdim=True)).log())
