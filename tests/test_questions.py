from collections import Counter

import numpy as np
import pytest

from fmrilm.processors.descriptors.cohort import LEVELS, Cohort
from fmrilm.processors.descriptors.measures import FAMILIES, descriptor_names
from fmrilm.processors.descriptors.phrases import PHRASES
from fmrilm.processors.descriptors.questions import KINDS, Question, Questioner, stem_and_network
from fmrilm.processors.descriptors.text import BUCKETS, parse


MEASURES = list(FAMILIES)
DESCRIPTORS = descriptor_names(MEASURES)
SCANS, GROUPS = 240, ("a", "b", "c")


@pytest.fixture(scope="module")
def descriptors() -> np.ndarray:
    """[scans, descriptors], correlated and shifted as they are; one absent everywhere, one in some scans."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(SCANS, len(DESCRIPTORS))) + rng.normal(size=(SCANS, 1)) + 3
    values[:, 5] = np.nan
    values[::2, 7] = np.nan
    return values


def fit(descriptors: np.ndarray) -> Cohort:
    return Cohort.fit("people", MEASURES, descriptors, subjects=len(descriptors), atlases=[])


@pytest.fixture(scope="module")
def cohort(descriptors: np.ndarray) -> Cohort:
    return fit(descriptors[:100])


def ask(descriptors: np.ndarray, cohort: Cohort, count: int = 6, seed: int = 0) -> list[Question]:
    groups = [GROUPS[row % 2] for row in range(SCANS)]
    questioner = Questioner(descriptors, groups, cohort, seed)
    return [question for row in range(SCANS) for question in questioner.ask(row, count)]


def test_answers_are_true(descriptors: np.ndarray, cohort: Cohort) -> None:
    levels, scores = cohort.levels(descriptors), cohort.z_scores(descriptors)
    seen = Counter()
    for question in ask(descriptors, cohort):
        columns = [DESCRIPTORS.index(name) for name in question.descriptors]
        row, column = question.scans[0], columns[0]
        phrases = [PHRASES[name] for name in question.descriptors]
        if question.kind == "level":
            assert question.answer == LEVELS[levels[row, column]] and phrases[0] in question.text.lower()
        elif question.kind in ("above", "below"):
            assert f"{phrases[0]} {question.kind} typical" in question.text
            wanted = LEVELS.index("high" if question.kind == "above" else "low")
            assert question.answer == ("yes" if levels[row, column] == wanted else "no")
        elif question.kind == "which":
            answer = question.descriptors[question.choices.index(question.answer)]
            assert answer == question.descriptors[scores[row, columns].argmax()]
            stems, networks = zip(*map(stem_and_network, question.descriptors), strict=True)
            assert len(set(stems)) == 1 and networks == question.choices and stems[0] in question.text
            assert all(network in question.text for network in networks)
        elif question.kind == "open":
            (statement,) = parse(question.answer)
            assert statement.descriptor == question.descriptors[0] and question.choices == ()
            assert statement.z == pytest.approx(scores[row, column], abs=0.0051)
        else:
            first, second = question.scans
            assert first != second and first % 2 == second % 2  # one group
            higher = descriptors[first, column] > descriptors[second, column]
            assert question.answer == ("first" if higher else "second")
        if question.choices:
            assert question.answer in question.choices and len(set(question.choices)) == len(question.choices)
        seen[question.kind] += 1
    assert set(seen) == set(KINDS) and min(seen.values()) > SCANS * 0.9


def test_answers_are_balanced(descriptors: np.ndarray, cohort: Cohort) -> None:
    answers = {kind: Counter() for kind in KINDS}
    for question in ask(descriptors, cohort):
        result = parse(question.answer)[0].level if question.kind == "open" else question.answer
        answers[question.kind][result] += 1
    for kind in ("level", "above", "below", "compare"):
        counts = answers[kind].values()
        assert max(counts) - min(counts) <= 0.05 * sum(counts), (kind, answers[kind])
    # by chance alone, two in three would lie within the range, and the marked ones would be one in twenty
    assert set(answers["open"]) == set(BUCKETS)
    assert answers["open"]["within range"] < 0.35 * answers["open"].total()
    assert max(answers["which"].values()) < 2 * min(answers["which"].values())


def test_position_of_the_answer_tells_nothing(descriptors: np.ndarray, cohort: Cohort) -> None:
    for size in (2, 3):
        places = Counter(
            question.choices.index(question.answer)
            for question in ask(descriptors, cohort, count=12)
            if question.kind == "which" and len(question.choices) == size
        )
        total = places.total()
        # within four standard deviations of even
        assert total > 100 and all(abs(places[p] - total / size) < 4 * (total / size) ** 0.5 for p in range(size))


def test_margin_is_the_distance_to_another_answer(descriptors: np.ndarray, cohort: Cohort) -> None:
    """A value moved by less than the margin keeps the answer, moved by more to one side it has another one."""

    def answers(question: Question, step: float) -> set:
        column = DESCRIPTORS.index(question.descriptors[0])
        moved = np.repeat(descriptors[list(question.scans)], 2, axis=0)
        moved[:, column] += np.array([-step, step]) * cohort.std[column]
        wanted = {"above": 2, "below": 0}.get(question.kind)
        levels = cohort.levels(moved)[:, column].tolist()
        return {LEVELS[level] if wanted is None else "yes" if level == wanted else "no" for level in levels}

    asked = [question for question in ask(descriptors, cohort) if question.kind in ("level", "above", "below")]
    for question in asked:
        assert answers(question, question.margin * 0.999) == {question.answer}
        assert answers(question, question.margin * 1.001) != {question.answer}


def test_margin_of_comparisons_is_the_difference_and_no_question_is_about_a_tie(descriptors, cohort: Cohort) -> None:
    scores = cohort.z_scores(descriptors)
    for question in ask(descriptors, cohort):
        assert question.margin > 0
        columns = [DESCRIPTORS.index(name) for name in question.descriptors]
        if question.kind == "compare":
            first, second = question.scans
            assert question.margin == pytest.approx(abs(scores[first, columns[0]] - scores[second, columns[0]]))
        elif question.kind == "which":
            top = np.sort(scores[question.scans[0], columns])
            assert question.margin == pytest.approx(top[-1] - top[-2])


def test_absent_and_constant_descriptors_are_not_asked_about(descriptors: np.ndarray) -> None:
    values = descriptors.copy()
    values[:, 9] = 1.0
    with np.errstate(all="ignore"):
        asked = ask(values, fit(values[:100]), count=18)
    absent = {DESCRIPTORS[5], DESCRIPTORS[9]}
    assert not [question for question in asked if absent & set(question.descriptors)]
    partly = [question.scans for question in asked if DESCRIPTORS[7] in question.descriptors]
    assert partly and all(row % 2 for scans in partly for row in scans)
    unknown = np.full_like(values, np.nan)
    assert Questioner(unknown, ["a"] * SCANS, fit(values[:100]), 0).ask(0, 6) == []


def test_a_scan_alone_in_its_group_is_not_compared(descriptors: np.ndarray, cohort: Cohort) -> None:
    questioner = Questioner(descriptors[:2], ["a", "b"], cohort, seed=0)
    asked = questioner.ask(0, 12)
    assert asked and all(question.kind != "compare" for question in asked)


def test_same_seed_same_questions(descriptors: np.ndarray, cohort: Cohort) -> None:
    assert ask(descriptors, cohort, seed=1) == ask(descriptors, cohort, seed=1) != ask(descriptors, cohort, seed=2)


def test_questions_about_one_scan_differ(descriptors: np.ndarray, cohort: Cohort) -> None:
    questioner = Questioner(descriptors, ["a"] * SCANS, cohort, seed=0)
    asked = questioner.ask(0, 40)
    assert len({question.text for question in asked}) == len(asked) > 30
