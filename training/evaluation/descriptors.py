"""
Questions about the descriptors of held-out windows: is each low, typical or high among the training subjects?

They are asked about the right scan, about scans of other subjects of the same site and atlas (the subject-shuffled
control), and about noise. Beside them stand the label that is most frequent in training, and ridge regression on the
features of the codes. Free descriptions of the same scans are read back into statements, which are true or false.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedConfig

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS, QUANTILES, Cohort
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import REQUESTS, description, family, parse, question
from fmrilm.processors.scan_io_fmrilm import warn_once

from ..data.splits import Split
from ..ridge import cross_fitted_ridge
from .ask import answer_windows, score_windows
from .metrics import distributions, estimate, mean_recall
from .scans import EvaluationScans, encode_noise, pseudonyms


CONDITIONS = ("right", "shuffled", "noise", "majority", "codes_ridge")
# of each group: other subjects for the control, of which training subjects stand in for those that the held-out ones
# lack, and windows of noise
OTHERS, NOISE_WINDOWS = 8, 4
# families' questions of each subject whose answers are shown one by one
SHOWN = 2


@dataclass(frozen=True)
class Answered:
    """
    Questions of all windows, one a row. subjects, groups: [rows], whose the window is. windows, descriptors, truth:
    int [rows]. shares: by condition, float [rows, labels], how often each tercile label is the answer. probabilities:
    [rows, labels] with the right scan.
    """

    subjects: np.ndarray
    windows: np.ndarray
    descriptors: np.ndarray
    truth: np.ndarray
    shares: dict[str, np.ndarray]
    probabilities: np.ndarray


def choose_questions(labels: np.ndarray, per_family: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `per_family` known descriptors of each family; labels: int [descriptors], -1 unknown."""
    families = np.array([family(name) for name in CORE_NAMES])
    known = labels >= 0
    return np.concatenate(
        [rng.permutation(np.flatnonzero(known & (families == name)))[:per_family] for name in np.unique(families)]
    )


def ask_descriptors(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    scans: EvaluationScans,
    split: Split,
    cohort: Cohort,
    per_family: int,
    seed: int,
) -> list[Answered]:
    """
    Questions about every window of the test scans, by group, each of which is asked the same; groups of one subject,
    beside whom there is no other one to compare with, are left out.
    """
    rng = np.random.default_rng(seed)
    descriptors = scans.descriptors
    labels = cohort.levels(descriptors)
    training = np.flatnonzero(np.isin(scans.of_window, split.training))
    test = np.flatnonzero(np.isin(scans.of_window, split.test))
    majority = one_hot(most_frequent(labels[training]))
    ridge = one_hot(ridge_labels(scans, training, cohort.z_scores(descriptors)[training], model.config.codec_config))
    subjects, groups = scans.subjects[scans.of_window], scans.groups[scans.of_window]
    parts = []
    for group in np.unique(groups[test]):
        own = test[groups[test] == group]
        others = training[groups[training] == group]
        _, first = np.unique(subjects[others], return_index=True)
        others = rng.permutation(others[first])[: max(0, OTHERS + 1 - len(set(subjects[own])))]
        if len({*subjects[own], *subjects[others]}) < 2:
            warn_once(f"descriptors: no subject but one in {str(group)!r} (site and atlas): not asked about")
            continue
        asked = choose_questions(labels[own[0]], per_family, rng)
        noise = encode_noise(model.model.codec, scans.windows, own[:NOISE_WINDOWS].tolist(), seed)
        windows = [*(scans.encoded[place] for place in (*own, *others)), *noise]
        questions = [question(CORE_NAMES[index]) for index in asked]
        choices = [processor.encode_choices(LEVELS, text) for text in questions]
        # [windows, questions, labels]
        scores = score_windows(model, processor, windows, questions, choices)
        chances = np.stack(
            [
                model.answer_probabilities(torch.from_numpy(each), asked_for, LEVELS).numpy()
                for each, asked_for in zip(scores, questions, strict=True)
            ],
            axis=1,
        )
        given = one_hot(chances.argmax(-1))
        right, pool, noise = given[: len(own)], given[: len(own) + len(others)], given[len(own) + len(others) :]
        whose = np.concatenate([subjects[own], subjects[others]])
        shuffled = np.stack([pool[whose != subject].mean(0) for subject in subjects[own]])
        by_condition = {
            "right": right,
            "shuffled": shuffled,
            "noise": np.broadcast_to(noise.mean(0), right.shape),
            "majority": np.broadcast_to(majority[asked], right.shape),
            "codes_ridge": ridge[np.ix_(own, asked)],
        }
        truth = labels[np.ix_(own, asked)]
        known = window, place = np.nonzero(truth >= 0)
        shares = {name: shares[known] for name, shares in by_condition.items()}
        parts.append(Answered(subjects[own][window], own[window], asked[place], truth[known], shares, chances[known]))
    return parts


def joined(parts: Sequence[Answered]) -> Answered:
    """The rows of all parts."""
    if not parts:
        raise ValueError("expected a site and atlas with two subjects to ask about descriptors, got none")
    names = ("subjects", "windows", "descriptors", "truth", "probabilities")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    shares = {name: np.concatenate([part.shares[name] for part in parts]) for name in CONDITIONS}
    return Answered(**arrays, shares=shares)


def most_frequent(labels: np.ndarray) -> np.ndarray:
    """The most frequent tercile label int [descriptors]; labels int [windows, descriptors], -1 unknown."""
    return one_hot(labels).sum(0).argmax(-1)


def one_hot(labels: np.ndarray) -> np.ndarray:
    """[..., labels] of int [...]; zeros for -1."""
    return (labels[..., None] == np.arange(len(LEVELS))).astype(float)


def ridge_labels(
    scans: EvaluationScans, training: np.ndarray, z_scores: np.ndarray, codec: PreTrainedConfig
) -> np.ndarray:
    """
    Tercile labels int [windows, descriptors] by ridge regression of the training windows' z-scores on the features of
    their codes: thirds of the predictions, as these are for training subjects who were left out.
    """
    features = np.stack([window.features for window in scans.encoded])
    subjects = scans.subjects[scans.of_window[training]]
    blocks, apart = codec.scan_feature_blocks, codec.num_scan_numbers
    ridge = cross_fitted_ridge(features[training], z_scores, subjects, blocks=blocks, apart=apart)
    found = np.where(np.isnan(ridge.out_of_fold), ridge.predict(features[training]), ridge.out_of_fold)
    lower, upper = np.quantile(found, QUANTILES, axis=0)
    predicted = ridge.predict(features)
    return (predicted > lower).astype(int) + (predicted > upper)


def question_results(answered: Answered, seed: int) -> dict:
    """
    Balanced accuracy by family and condition with 95 % bootstrap intervals over subjects, for the families that were
    asked about.
    """
    names, of_subject = np.unique(answered.subjects, return_inverse=True)
    of_descriptor = np.array([family(name) for name in CORE_NAMES])[answered.descriptors]
    results = {}
    for name in [*dict.fromkeys(family(name) for name in CORE_NAMES), "all"]:
        rows = np.flatnonzero((of_descriptor == name) | (name == "all"))
        if not len(rows):
            continue
        whose, truth = of_subject[rows], answered.truth[rows]
        # [subjects, truth, answer]
        confusion = {key: np.zeros((len(names), len(LEVELS), len(LEVELS))) for key in CONDITIONS}
        for key, table in confusion.items():
            np.add.at(table, (whose, truth), answered.shares[key][rows])
        asked = confusion["right"].sum((1, 2)) > 0
        confusion = {key: table[asked] for key, table in confusion.items()}
        recalls = {
            key: partial(mean_recall, np.diagonal(table, axis1=1, axis2=2), table.sum(-1))
            for key, table in confusion.items()
        }
        values = distributions(recalls, np.arange(asked.sum()), seed=seed)
        found = {key: estimate(each) for key, each in values.items()}
        difference = estimate(values["right"] - values["shuffled"])
        results[name] = {
            "questions": len(rows),
            **{key: {"accuracy": one["value"], "interval": one["interval"]} for key, one in found.items()},
            "difference": {key: difference[key] for key in ("value", "interval")},
            "beats_shuffled": difference["interval"] is not None and difference["interval"][0] > 0,
        }
    beaten = [name for name in results if name != "all" and results[name]["beats_shuffled"]]
    verdict = (
        f"answers about the right scan are above the subject-shuffled control, interval clear of zero, in "
        f"{len(beaten)} of {len(results) - 1} question families{': ' if beaten else ''}{', '.join(beaten)}"
    )
    return {"families": results, "verdict": verdict}


def shown_answers(answered: Answered, scans: EvaluationScans, repetition_time: float) -> list[dict]:
    """The first questions of each family about the first window of each subject, under pseudonyms."""
    names = pseudonyms(scans, scans.of_window[answered.windows])
    shown, counts, first = [], Counter(), {}
    for row, subject in enumerate(answered.subjects):
        window, name = answered.windows[row], CORE_NAMES[answered.descriptors[row]]
        if first.setdefault(subject, window) != window or counts[subject, family(name)] == SHOWN:
            continue
        counts[subject, family(name)] += 1
        probabilities = answered.probabilities[row]
        shown.append(
            {
                "subject": names[subject],
                "window_start_seconds": scans.windows[window].start * repetition_time,
                "question": question(name),
                "truth": LEVELS[answered.truth[row]],
                "answer": LEVELS[int(probabilities.argmax())],
                "probabilities": dict(zip(LEVELS, probabilities.round(4).tolist(), strict=True)),
            }
        )
    return shown


def description_results(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    scans: EvaluationScans,
    split: Split,
    cohort: Cohort,
    subjects: int,
    max_new_tokens: int,
    seed: int,
    show: bool = False,
) -> dict:
    """
    Free descriptions of the first windows of up to `subjects` test subjects: the share of their statements that are
    true of the right scan ("right"), of another subject's of the same group ("shuffled"), and with the most frequent
    label in place of the one stated ("majority"). As for users, no text has a sentence twice. show: texts as well.
    """
    rng = np.random.default_rng(seed)
    _, first = np.unique(scans.subjects[split.test], return_index=True)
    rows = split.test[np.sort(rng.permutation(first)[:subjects])]
    places = [int(np.flatnonzero(scans.of_window == row)[0]) for row in rows]
    texts = answer_windows(model, processor, [scans.encoded[place] for place in places], REQUESTS[0], max_new_tokens)
    all_labels = cohort.levels(scans.descriptors)
    labels, training = all_labels[places], all_labels[np.isin(scans.of_window, split.training)]
    # what is said of one scan holds for another as far as the two are alike
    others, alike = [], []
    for row, text in zip(rows, texts, strict=True):
        pool = np.flatnonzero((scans.groups == scans.groups[row]) & (scans.subjects != scans.subjects[row]))
        if len(pool):
            others.append(all_labels[np.flatnonzero(scans.of_window == rng.choice(pool))[0]])
            alike.append(text)
    results = {
        "texts": len(texts),
        "statements": sum(len(claims(text)) for text in texts),
        "statement_accuracy": {
            "right": statement_accuracy(texts, labels),
            "shuffled": statement_accuracy(alike, np.array(others)),
            "majority": statement_accuracy(texts, labels, most_frequent(training)),
        },
    }
    if show:
        names = pseudonyms(scans, split.test)
        results["examples"] = [
            {
                "subject": names[str(scans.subjects[row])],
                "generated": text,
                "truth": description(known, [index for index, _ in claims(text) if known[index] >= 0]),
            }
            for row, text, known in zip(rows, texts, labels, strict=True)
        ]
    return results


def statement_accuracy(texts: Sequence[str], labels: np.ndarray, stated: np.ndarray | None = None) -> float | None:
    """
    Share of the parsed statements that are true of the scans, labels int [scans, descriptors]; None without any.
    With `stated` int [descriptors], that label counts as the statement in place of the text's.
    """
    right = []
    for row, text in enumerate(texts):
        for index, label in claims(text):
            if labels[row, index] >= 0:
                right.append(labels[row, index] == (label if stated is None else stated[index]))
    return float(np.mean(right)) if right else None


def claims(text: str) -> list[tuple[int, int]]:
    """Indices into `CORE_NAMES` and `LEVELS` of what a text states."""
    return [
        (CORE_NAMES.index(name), LEVELS.index(label))
        for name, label, _ in parse(text)
        if name in CORE_NAMES and label in LEVELS
    ]
