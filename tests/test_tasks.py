"""Tasks and their labels: what the packaged ones say, a task of one's own, and all that is refused."""

import csv
import inspect
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrilm.training.data import tasks
from fmrilm.training.data.tasks import Task, labels_of, load_task, task_names


SEX = load_task("sex")
AGE = load_task("age")


def people(**columns) -> list[dict]:
    """Rows of different subjects."""
    count = len(next(iter(columns.values())))
    rows = {"subject": [f"s{row}" for row in range(count)], "session": [None] * count, **columns}
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


# --- the packaged tasks


@pytest.mark.parametrize("name", task_names())
def test_packaged_task_is_complete(name: str) -> None:
    task = load_task(name)
    assert task.name == name and len(task.questions) >= 2
    assert (len(task.choice_words) >= 2) != (task.choices is None and task.range is not None)


@pytest.mark.parametrize(
    ("name", "value", "answer", "statement"),
    [
        ("sex", "F", "female", "sex: female"),
        ("sex", "Male", "male", "sex: male"),
        ("age", 34.4, "34", "age: 34 years"),
        ("age_group", 39.99, "young adult", "age group: young adult"),
        ("age_group", 40, "middle-aged adult", "age group: middle-aged adult"),
        ("fluid_intelligence", 7, "7", "fluid intelligence: 7 points"),
        ("fluid_intelligence_group", 2, "lower", "fluid intelligence group: lower"),
        ("ad", "CN", "none", "dementia diagnosis: none"),
        ("adhd", "ADHD", "ADHD", "ADHD diagnosis: ADHD"),
        ("asd", "control", "none", "diagnosis: none"),
        ("apoe4", 2.0, "yes", "APOE e4 carrier: yes"),
        ("apoe4", 0, "no", "APOE e4 carrier: no"),
        ("handedness", "r", "right", "handedness: right"),
        ("synthetic_group", "b", "beta", "synthetic group: beta"),
        ("asd", "autism", "autism", "diagnosis: autism"),
        ("asd", 2, "none", "diagnosis: none"),
        ("sex", 1.0, "male", "sex: male"),
        ("state", "movie_sitcom", "sitcom", "state: sitcom"),
    ],
)
def test_labels_are_answered(name: str, value, answer: str, statement: str) -> None:
    task = load_task(name)
    assert task.answer(value) == answer == task.answer(task.label(value))
    assert task.statement(value) == statement


def test_people_without_a_label_have_no_answer() -> None:
    with pytest.raises(ValueError, match="task 'sex' has no answer where there is no label, got None"):
        SEX.answer(None)


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        # answers that the task leaves out, and none
        ("ad", {"ad": ["CN", "MCI", "AD", None, float("nan"), ""]}, ["CN", None, "AD", None, None, None]),
        # the column has another name in each dataset, and two names where tables are joined
        ("asd", {"DX_GROUP": [1, 2, None]}, ["1", "2", None]),
        ("asd", {"DX_GROUP": [1.0, float("nan")], "diagnosis": [None, "control"]}, ["1", "control"]),
        # of subjects, of their sessions, of scans
        ("sex", {"subject": list("pqp"), "session": list("112"), "sex": ["F", "M", None]}, ["F", "M", None]),
        ("age", {"subject": list("ppp"), "session": list("122"), "age": [30, 32, 32]}, [30, 32, 32]),
        ("state", {"subject": list("pp"), "session": list("11"), "condition": ["rest", "movie_sitcom"]},
         ["rest", "movie_sitcom"]),
    ],
)  # fmt: skip
def test_labels_are_those_of_the_rows(name: str, columns: dict[str, list], labels: list) -> None:
    assert labels_of(load_task(name), people(**columns)) == labels


@pytest.mark.parametrize("kind", ["int64", "float32", "float64"])
def test_numbers_of_a_table_are_read_as_they_are_written(kind: str) -> None:
    alleles = np.array([0, 1, 2], kind)
    assert labels_of(load_task("apoe4"), people(apoe4=alleles)) == ["0", "1", "2"]
    assert labels_of(AGE, people(age=alleles)) == [0, 1, 2]
    if kind != "int64":
        assert AGE.label(np.array(np.nan, kind)[()]) is None


@given(st.lists(st.floats(0, 120), min_size=2, max_size=9))
def test_cuts_part_the_numbers_in_order(ages: list[float]) -> None:
    task = load_task("age_group")
    places = [task.choice_words.index(task.answer(age)) for age in sorted(ages)]
    assert places == sorted(places)
    assert places == [sum(age >= cut for cut in task.cuts) for age in sorted(ages)]


def test_labels_of_sessions_need_no_column_of_sessions() -> None:
    assert labels_of(AGE, [{"subject": "a", "age": 30}, {"subject": "b", "age": 40}]) == [30, 40]
    with pytest.raises(ValueError, match="one label for each session of a subject"):
        labels_of(AGE, [{"subject": "a", "age": 30}, {"subject": "a", "age": 40}])


# --- a task of one's own


def example() -> tuple[str, str]:
    """The task and the table that the documentation shows, indented."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", inspect.getdoc(tasks), re.MULTILINE)
    yaml, table = map(textwrap.dedent, blocks)
    return yaml, table


def test_task_and_labels_of_ones_own_are_read(tmp_path: Path) -> None:
    yaml, table = example()
    (tmp_path / "chronotype.yaml").write_text(yaml)
    task = load_task(tmp_path / "chronotype.yaml")
    assert task.choice_words == ["morning", "evening"]
    assert labels_of(task, [{"session": None, **row} for row in csv.DictReader(table.splitlines())]) == ["m", "e"]


def test_unknown_task_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="expected a YAML file or one of ad, adhd, age, .* got 'height'"):
        load_task("height")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": {"a": "low", "b": "lower"}}, "choice 'low' is a prefix of choice 'lower'"),
        ({"choices": {"a": "No", "b": "none"}}, "choice 'No' is a prefix of choice 'none'"),
        ({"choices": {"a": "yes", "b": "yes"}}, "at least two choices, got \\['yes'\\]"),
        ({"choices": None}, "expected choices, or the range"),
        ({"questions": ()}, "expected different questions"),
        ({"questions": ("Which?", "Which?")}, "expected different questions"),
        ({"cuts": (1.0, 2.0)}, "expected 1 rising cuts between 2 choices, got \\[1.0, 2.0\\]"),
        ({"choices": None, "range": (3.0, 1.0)}, "a range from low to high"),
        ({"name": "a b"}, "letters, digits and _"),
    ],
)
def test_task_that_cannot_be_asked_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SEX, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ncolumn: x\n", "own.yaml: expected at least name, column and questions"),
        ("name: x\ncolumn: x\nquestions: [a]\nchoices: [u, v]\nclasses: 2", "got also classes"),
        ("name: x\ncolumn: x\nquestions: Which?\nchoices: [u, v]", "expected a list as questions, got 'Which\\?'"),
        ("name: x\ncolumn: x\nquestions: [a]\nrange: [1]", "expected a range from low to high, got \\[1.0\\]"),
        ("name: x\ncolumn: x\nquestions: [a]\nrange: [low, high]", "own.yaml: .*low"),
        (
            "name: x\ncolumn: x\nquestions:\n  - One of two: a or b?\nchoices: [u, v]",
            "text in questions, got .* needs quotes",
        ),
        ("name: x\ncolumn: x\nquestions: [a]\nchoices: u", "expected a list as choices, got 'u'"),
        (
            "name: x\ncolumn: x\nquestions: [a]\nchoices: [u, v]\nper_session: y",
            "expected true or false as per_session",
        ),
        ("name: [x]\ncolumn: x\nquestions: [a]\nchoices: [u, v]", "expected text in name, got \\['x'\\]"),
        ("name: [x", "own.yaml"),
    ],
)
def test_file_that_is_no_task_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "own.yaml")


def test_words_that_yaml_reads_as_truth_values_stay_words(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: x\ncolumn: x\nquestions: [a]\nchoices: {0: no, 1: yes}")
    task = load_task(tmp_path / "own.yaml")
    assert task.choice_words == ["no", "yes"] and task.answer(1) == "yes"


# --- labels that are refused, by their rows


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (SEX, people(gender=["F", "M"]), "no column 'sex' among subject, session, gender"),
        (load_task("asd"), people(autism=["yes", "no"]), "no column 'asd' among subject, session, autism"),
        (
            SEX,
            people(subject=list("pqp"), session=list("112"), sex=["F", "F", "M"]),
            "one label for each subject, got 'F' in row 0, 'M' in row 2",
        ),
        (
            AGE,
            people(subject=list("ppp"), session=list("122"), age=[30, 32, 33]),
            "one label for each session of a subject, got 32.0 in row 1, 33.0 in row 2",
        ),
        (SEX, people(sex=["F", "f", "female"]), "at least two classes, got only 'female' in rows 0, 1, 2$"),
        (SEX, people(sex=[None, None]), "at least two classes, got no label in 2 rows"),
        (SEX, people(sex=["F", "M", "x", "x"]), "expected one of F, female, 2, M, male, 1, got 'x' in rows 2, 3$"),
        (SEX, people(sex=["F", 3]), "got 3 in row 1"),
        (AGE, people(age=[30, 130, -1]), "from 0 to 120, got 130 in row 1; .* got -1 in row 2"),
        (AGE, people(age=[30, float("inf")]), "got inf in row 1"),
        (AGE, people(age=["30", "old"]), "expected a number, got 'old' in row 1"),
        (AGE, people(age=[30.2, 30.4]), "only '30' in rows 0, 1"),
        (AGE, people(age=list(range(200, 209))), "got 204 in row 4; and 4 others$"),
        (SEX, people(sex=["?"] * 9), "got '\\?' in rows 0, 1, 2, 3, 4 and 4 more"),
    ],
)
def test_labels_that_cannot_be_asked_for_are_refused(task: Task, rows: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of(task, rows)
