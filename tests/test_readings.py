"""Reading rows of stage 3: answers follow the scores in the row, and nothing else in it."""

import dataclasses
from itertools import permutations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.phrases import PHRASES
from fmrilm.processors.descriptors.text import REQUESTS, parse
from fmrilm.training.alignment.examples import ANSWER_SPREAD, score_names, score_spread
from fmrilm.training.data.tasks import load_task
from fmrilm.training.sft.calibration import fit
from fmrilm.training.sft.readings import Reading, reading_rows
from helpers import random_examples, window_of


TASKS = [load_task(name) for name in ("sex", "age", "age_group")]
NAMES = ["motion", *(name for task in TASKS for name in score_names(task))]
SPREAD = np.array([score_spread(name) for name in NAMES[1:]])
LEVELLED = [*CORE_NAMES[:6], "motion"]


def examples_of(windows: int = 200, noise: float = 1.0):
    """Windows of subjects of both sexes and all ages, with scores that know them as well as the noise lets them."""
    rng = np.random.default_rng(0)
    ages = rng.uniform(8, 70, windows)
    known = [
        {"subject": f"s{row}", "session": None, "sex": "FM"[row % 4 > 0], "age": ages[row]} for row in range(windows)
    ]
    examples = random_examples(windows, known)
    groups = np.array([TASKS[2].answer(age) for age in ages])
    truth = [np.array([row["sex"] == "M" for row in known]), ages]
    truth += [groups == word for word in TASKS[2].choice_words]
    scores = np.stack([(one - one.mean()) / (one.std() or 1) for one in truth], 1)
    scores = scores + noise * rng.standard_normal(scores.shape)
    motion = np.arange(windows)[:, None]
    scores = np.concatenate([motion, SPREAD * scores / scores.std(0)], 1)
    return dataclasses.replace(examples, scores=scores.astype(np.float32))


def fitted(examples, tasks=TASKS) -> list[Reading]:
    return [Reading.fit(task, examples, NAMES) for task in tasks]


def text_of(row: dict, place: int) -> str:
    return row["messages"][place]["content"][-1]["text"]


@pytest.fixture
def levelled():
    """Examples with random scores of `LEVELLED`."""
    scores = np.random.default_rng(0).standard_normal((60, len(LEVELLED))).astype(np.float32)
    return dataclasses.replace(random_examples(60), scores=scores)


def level(row: dict, name: str, levelled) -> str:
    """By the terciles of all scores."""
    column = LEVELLED.index(name)
    return LEVELS[int((row["scores"][0][column] > np.quantile(levelled.scores[:, column], (1 / 3, 2 / 3))).sum())]


def test_answers_follow_the_scores_of_the_row_and_not_its_subject() -> None:
    examples = examples_of()
    rows = reading_rows(examples, NAMES, fitted(examples, TASKS[:1]), 400, 2, seed=0, descriptors=0).to_list()
    column = NAMES.index(score_names(TASKS[0])[0])
    scores = np.array([row["scores"][0][column] for row in rows])
    windows = np.array([int(row["scores"][0][0]) for row in rows])
    second = np.array([text_of(row, 1) == TASKS[0].sentence(TASKS[0].choice_words[1]) for row in rows])
    own = np.array([examples.rows[window]["sex"] == "M" for window in windows])
    assert scores[second].mean() - scores[~second].mean() > 1
    assert abs(np.corrcoef(second, own)[0, 1]) < 0.15
    # every window comes before any comes again
    assert len(set(windows[:200])) == 200


def test_rows_hold_their_window_or_its_first_patch_and_its_other_scores() -> None:
    examples = examples_of(40)
    rows = reading_rows(examples, NAMES, fitted(examples), 80, 2, seed=1, descriptors=0).to_list()
    for row in rows:
        codes, window = row["codes"][0], window_of(row["codes"][0])
        assert codes == examples.codes[window][: len(codes)].tolist()
        assert row["scores"][0][0] == window
    assert {len(row["codes"][0]) for row in rows} == {2, len(examples.codes[0])}
    # two of the tasks, in any order
    asked = [
        tuple(next(task.name for task in TASKS if text_of(row, place) in task.questions) for place in (0, 2))
        for row in rows
    ]
    assert {len(row["messages"]) for row in rows} == {4}
    assert set(asked) == set(permutations([task.name for task in TASKS], 2))
    # what is said of one subject's age is said in years and in groups
    ages, groups = NAMES.index("age"), slice(NAMES.index("age") + 1, None)
    own = examples.scores[:, groups] / np.linalg.norm(examples.scores[:, groups], axis=1, keepdims=True)
    for row in rows:
        given = np.array(row["scores"][0])
        donor = int((own @ given[groups]).argmax())
        # each task's scores are widened by a factor of their own, from a standard deviation of one
        assert 1 <= given[ages] / examples.scores[donor, ages] <= 3
        assert 1 <= np.linalg.norm(given[groups]) / np.linalg.norm(examples.scores[donor, groups]) * ANSWER_SPREAD <= 3


def test_level_of_a_descriptor_is_the_tercile_of_its_score(levelled) -> None:
    for row in reading_rows(levelled, LEVELLED, [], 60, 2, seed=0, descriptors=5).to_list():
        asked = [text_of(row, place) for place in range(0, len(row["messages"]), 2)]
        assert len(set(asked)) == 5
        for place, text in enumerate(asked):
            (name,) = (name for name in CORE_NAMES[:6] if PHRASES[name] in text)
            assert parse(text_of(row, 2 * place + 1)) == [(name, level(row, name, levelled), None)]


def test_descriptors_that_are_not_asked_about_are_widened_together(levelled) -> None:
    factors = []
    for row in reading_rows(levelled, LEVELLED, [], 60, 2, seed=0, descriptors=2).to_list():
        ratio = np.array(row["scores"][0]) / levelled.scores[window_of(row["codes"][0])]
        assert ratio[-1] == 1 and (np.abs(ratio - 1) < 1e-6).sum() == 3
        others = ratio[np.abs(ratio - 1) > 1e-6]
        assert np.ptp(others) < 1e-5
        factors.append(others[0])
    assert min(factors) >= 1 and 1.8 < np.mean(factors) < 2.2 and max(factors) <= 3


def test_descriptions_state_the_terciles_of_the_scores_in_place_of_questions(levelled) -> None:
    mix = {"descriptors": 2, "described_share": 0.5, "statements": 4}
    rows = reading_rows(levelled, LEVELLED, [], 60, 2, seed=0, **mix).to_list()
    described = [row for row in rows if text_of(row, 0) in REQUESTS]
    assert 15 < len(described) < 45
    assert all(len(row["messages"]) == 2 for row in described)
    assert all(len(row["messages"]) == 4 for row in rows if row not in described)
    for row in described:
        stated = parse(text_of(row, 1))
        assert len({statement.descriptor for statement in stated}) == 4
        assert all(said == level(row, name, levelled) for name, said, _ in stated)


def test_numbers_are_the_expected_ones_within_the_range() -> None:
    examples = examples_of()
    reading = Reading.fit(TASKS[1], examples, NAMES)
    ages = np.array([row["age"] for row in examples.rows])
    scores = examples.scores[:, reading.columns]
    answers = np.array([float(reading.answer(score, np.random.default_rng(0))) for score in scores])
    low, high = TASKS[1].range
    assert low <= float(reading.answer(np.array([-99.0]), np.random.default_rng(0))) <= high
    assert np.corrcoef(answers, ages)[0, 1] > 0.6 and abs(answers.mean() - ages.mean()) < 1
    assert answers.std() < ages.std()


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2]])
def test_answers_are_surer_than_the_labels(task) -> None:
    examples = examples_of(noise=4.0)
    labels = [task.answer(row[task.column]) for row in examples.rows]
    reading = Reading.fit(task, examples, NAMES)
    rng, scores = np.random.default_rng(0), examples.scores[:, reading.columns]
    drawn = [reading.answer(score, rng) for score in np.repeat(scores, 20, axis=0)]
    shares, given = (
        np.array([each.count(word) / len(each) for word in task.choice_words]) for each in (labels, drawn)
    )
    # an answer that nobody has is never given
    assert not given[shares == 0].any()
    plain = LogisticRegression().fit(scores / ANSWER_SPREAD, labels).predict_proba(scores / ANSWER_SPREAD)
    same = [drawn[20 * row : 20 * row + 20] for row in range(len(scores))]
    assert np.mean([each.count(max(each, key=each.count)) / 20 for each in same]) > plain.max(1).mean() + 0.05


def test_one_seed_gives_the_same_rows() -> None:
    examples = examples_of(30)
    first, again, other = (
        reading_rows(examples, NAMES, fitted(examples), 20, 2, seed, descriptors=0).to_list() for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2]])
def test_scores_predict_the_labels_as_a_logistic_regression_does(task) -> None:
    examples = examples_of()
    (reading,) = fitted(examples, [task])
    scores, labels = examples.scores[:, reading.columns], [task.answer(row[task.column]) for row in examples.rows]
    plain = LogisticRegression().fit(scores / ANSWER_SPREAD, labels)
    found, places = reading.probabilities(scores), [task.choice_words.index(word) for word in plain.classes_]
    assert np.allclose(found[:, places], plain.predict_proba(scores / ANSWER_SPREAD), atol=1e-4)
    assert np.allclose(found.sum(1), 1)


def test_calibration_recovers_the_slope_and_the_biases_of_answers() -> None:
    wanted = np.random.default_rng(0).dirichlet(np.ones(3), 300)
    logits = 5 * np.log(wanted) + np.array([2.0, 0.0, -1.0])
    scores = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    slope, biases = fit(scores, wanted)
    again = np.exp(slope * scores + biases)
    assert slope == pytest.approx(0.2, rel=0.05)
    assert np.abs(again / again.sum(1, keepdims=True) - wanted).max() < 0.02
