"""
Tasks: questions about the subject of a scan, with an answer that a column of labels holds.

A task is one small YAML file. Those beside this one go by their name (`load_task("sex")`), others by their path:

    name: chronotype                  # of letters, digits and _
    column: chronotype                # of the prepared dataset
    title: chronotype                 # of an answer, "The chronotype is morning."; by default the name
    choices: {m: morning, e: evening} # value in the column: answer; a list, if they are the same words
    questions:                        # paraphrases of one another
      - Is this person a morning or an evening type?
      - Does this person prefer the morning or the evening?
    about: The scans were taken between 9 and 17 o'clock.   # optional: what may be said before the question
    reveals: [lark, owl]              # optional: other words that would give the answer away

The labels come from a table, by subject (or by subject and session):

    subject,chronotype
    s01,m
    s02,e

`fmrilm prepare SCANS FOLDER --labels chronotype.csv` puts them into the dataset, and `load_task("chronotype.yaml")` is
then asked wherever a packaged task can be. Other fields: see `Task`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import permutations
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import yaml


if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import TypeIs


FOLDER = Path(__file__).parent
# a label as it is compared: the value of a choice, or a number
Label = str | float
# rows, and kinds of error, that an error names
SHOWN = 5


@dataclass(frozen=True)
class Task:
    """
    A question about the subject of a scan.

    column: holds the labels. other_columns: names that it may have instead. questions: paraphrases. choices: value in
    the column (in any case) to the answer, in the answers' order; none if the answer is a number. cuts: upwards, where
    the column holds numbers and a choice is a range of them; a number on a cut belongs to the upper one. range: least
    and largest number, in `unit`. decimals: of a number as an answer. left_out: values of subjects who are not asked
    about. per_session: the label may differ between sessions of a subject. per_scan: also between scans of a session.
    title: what the sentence of an answer calls it. reveals: words that give the answer away, beside the choices, their
    values and the unit. about: sentence that may stand before the question.
    """

    name: str
    column: str
    questions: tuple[str, ...]
    choices: dict[str, str] | None = None
    range: tuple[float, float] | None = None
    unit: str | None = None
    about: str = ""
    title: str = ""
    cuts: tuple[float, ...] | None = None
    decimals: int = 0
    left_out: tuple[str, ...] = ()
    per_session: bool = False
    reveals: tuple[str, ...] = ()
    other_columns: tuple[str, ...] = ()
    per_scan: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"expected a name of letters, digits and _, got {self.name!r}")
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise ValueError(f"task {self.name!r}: expected different questions, got {list(self.questions)}")
        if self.choices is None:
            if self.range is None or self.cuts is not None:
                raise ValueError(f"task {self.name!r}: expected choices, or the range of a number without cuts")
        else:
            self._check_choices(self.choice_words)
        if self.range is not None and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            raise ValueError(f"task {self.name!r}: expected a range from low to high, got {list(self.range)}")

    def _check_choices(self, words: list[str]) -> None:
        if len(words) < 2:
            raise ValueError(f"task {self.name!r}: expected at least two choices, got {words}")
        for word, other in permutations(words, 2):
            # the likelihood of the longer one would be part of that of the shorter one
            if other.casefold().startswith(word.casefold()):
                raise ValueError(f"task {self.name!r}: choice {word!r} is a prefix of choice {other!r}")
        if self.cuts is not None and (len(self.cuts) != len(words) - 1 or list(self.cuts) != sorted(set(self.cuts))):
            raise ValueError(
                f"task {self.name!r}: expected {len(words) - 1} rising cuts between {len(words)} choices, "
                f"got {list(self.cuts)}"
            )

    @property
    def choice_words(self) -> list[str]:
        """The answers to choose from, each once; none where the answer is a number."""
        return list(dict.fromkeys((self.choices or {}).values()))

    def label(self, value: Any) -> Label | None:
        """The label in a cell of the column; None if there is none or it is left out. ValueError if it is unknown."""
        if _is_empty(value):
            return None
        if _folded(value) in self._left_out:
            return None
        if self.choices is not None and self.cuts is None:
            try:
                return self._values[_folded(value)]
            except KeyError:
                raise ValueError(f"expected one of {', '.join(self.choices)}, got {value!r}") from None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"expected a number, got {value!r}") from None
        low, high = self.range or (-math.inf, math.inf)
        if not (math.isfinite(number) and low <= number <= high):
            raise ValueError(f"expected a number from {low:g} to {high:g}, got {value!r}")
        return number

    def answer(self, value: Any) -> str:
        """The answer for a label, or for a cell of the column that holds one."""
        label = self.label(value)
        if label is None:
            raise ValueError(f"task {self.name!r} has no answer where there is no label, got {value!r}")
        if self.choices is None:
            return f"{label:.{self.decimals}f}"
        if self.cuts is None:
            return self.choices[str(label)]
        return self.choice_words[int(np.searchsorted(self.cuts, label, side="right"))]

    def sentence(self, answer: str) -> str:
        """An answer as the model gives it: "The sex is female."."""
        return f"The {self.spoken} is {answer}."

    def statement(self, value: Any) -> str:
        """The answer as a part of an open-ended one: "age: 34 years"."""
        unit = f" {self.unit}" if self.unit and self.choices is None else ""
        return f"{self.spoken}: {self.answer(value)}{unit}"

    @property
    def spoken(self) -> str:
        """What texts call it."""
        return self.title or self.name.replace("_", " ")

    def leaks(self, text: str, value: Any = None) -> list[str]:
        """Words of a text that give the answer away, whatever it is, or that are the number `value`."""
        found = [match.group() for match in self._revealing.finditer(text)]
        if self.choices is None and value is not None:
            number = re.escape(self.answer(value))
            found += re.findall(rf"(?<![\d.]){number}(?!\.?\d)", text)
        return found

    @cached_property
    def _values(self) -> dict[str, str]:
        return {value.casefold(): value for value in self.choices or {}}

    @cached_property
    def _left_out(self) -> set[str]:
        return {value.casefold() for value in self.left_out}

    @cached_property
    def _revealing(self) -> re.Pattern:
        values = [*(self.choices or {}), *([self.unit] if self.unit else [])]
        # a value of a single letter or digit stands in any text
        words = {*self.choice_words, *self.reveals, *(value for value in values if len(value) > 1)}
        longest_first = sorted(words, key=len, reverse=True)
        # also before a digit or _, as in a cohort's name
        return re.compile(rf"(?<![^\W\d_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W\d_])", re.IGNORECASE)


def task_names() -> list[str]:
    """Names of the packaged tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(source: str | Path) -> Task:
    """A packaged task by its name, or any by the path of its YAML file."""
    path = FOLDER / f"{source}.yaml" if source in task_names() else Path(source)
    if not path.is_file():
        raise ValueError(f"expected a YAML file or one of {', '.join(task_names())}, got {str(source)!r}")
    try:
        # in YAML's own reading `no` is False, and 1 no text
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # noqa: S506 (makes text alone)
        return _from_yaml(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def with_columns(tasks: Sequence[Task], columns: Sequence[str]) -> list[Task]:
    """
    The tasks with other label columns alone: each "TASK=NAME", or one "NAME" where there is one task. Tasks of the
    same column that may also find NAME are then of it, too.
    """
    changed = {task.name: task for task in tasks}
    for column in columns:
        name, _, value = column.rpartition("=")
        if not name and len(tasks) == 1:
            name = tasks[0].name
        if name not in changed:
            raise ValueError(f"expected TASK=COLUMN with a task of {', '.join(changed)}, got {column!r}")
        before = changed[name].column
        for each in changed.values():
            if each.name == name or (each.column == before and value in each.other_columns):
                changed[each.name] = replace(each, column=value, other_columns=())
    return list(changed.values())


def _from_yaml(content: Any) -> Task:
    known = {field.name for field in fields(Task)}
    if not isinstance(content, dict) or not content.keys() >= {"name", "column", "questions"}:
        raise ValueError("expected at least name, column and questions")
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"expected the fields {', '.join(sorted(known))}, got also {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name == "choices" and isinstance(value, dict):
            values[name] = {key: _text(name, word) for key, word in value.items()}
        elif name == "choices":
            values[name] = {word: word for word in _texts(name, value)}
        elif name in ("range", "cuts"):
            values[name] = tuple(map(float, _texts(name, value)))
        elif name in ("questions", "left_out", "reveals", "other_columns"):
            values[name] = tuple(_texts(name, value))
        elif name == "decimals":
            values[name] = int(_text(name, value))
        elif name in ("per_session", "per_scan"):
            if value not in ("true", "false"):
                raise ValueError(f"expected true or false as {name}, got {value!r}")
            values[name] = value == "true"
        else:
            values[name] = _text(name, value)
    return Task(**values)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name}, got {value!r} (text with a colon or a comma in it needs quotes)")
    return value


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list as {name}, got {value!r}")
    return [_text(name, item) for item in value]


Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]]"


def labels_of(task: Task, rows: Rows, least: int = 2) -> list[Label | None]:
    """
    The label of each row, None where there is none. ValueError that names the rows: an unknown value, a number outside
    the range, labels that differ between sessions of a subject; a column that is missing; fewer than `least` classes.
    """
    labels, unreadable = [], defaultdict(list)
    names = column_names(rows)
    # several datasets in one may each have another name for it
    columns = [name for name in (task.column, *task.other_columns) if name in names] or [task.column]
    cells = zip(*(column_of(rows, name) for name in columns), strict=True)
    for row, values in enumerate(cells):
        value = next((value for value in values if not _is_empty(value)), None)
        try:
            labels.append(task.label(value))
        except ValueError as error:
            unreadable[str(error)].append(row)
    if unreadable:
        reasons = [f"{reason} in {_named(numbers)}" for reason, numbers in unreadable.items()]
        more = f"; and {len(reasons) - SHOWN} others" if len(reasons) > SHOWN else ""
        raise ValueError(f"task {task.name!r}, column {task.column!r}: {'; '.join(reasons[:SHOWN])}{more}")
    _check_agreement(task, labels, rows)
    classes = sorted({task.answer(label) for label in labels if label is not None})
    if len(classes) < least:
        labelled = [row for row, label in enumerate(labels) if label is not None]
        got = f"only {classes[0]!r} in {_named(labelled)}" if classes else f"no label in {len(labels)} rows"
        raise ValueError(f"task {task.name!r}, column {task.column!r}: expected at least two classes, got {got}")
    return labels


def _check_agreement(task: Task, labels: Sequence[Label | None], rows: Rows) -> None:
    if task.per_scan:
        return
    keys = column_of(rows, "subject")
    if task.per_session and "session" in column_names(rows):
        keys = list(zip(keys, column_of(rows, "session"), strict=True))
    seen = defaultdict(list)
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if label is not None:
            seen[key].append(row)
    for numbers in seen.values():
        if len({labels[row] for row in numbers}) > 1:
            of = "session of a subject" if task.per_session else "subject"
            raise ValueError(
                f"task {task.name!r}, column {task.column!r}: expected one label for each {of}, "
                f"got {', '.join(f'{labels[row]!r} in row {row}' for row in numbers[:SHOWN])}; people of several "
                "studies need names of their own"
            )


def column_names(rows: Rows) -> list[str]:
    if _is_dataset(rows):
        return rows.column_names
    return list(rows[0]) if len(rows) else []


def column_of(rows: Rows, name: str) -> list[Any]:
    """The cells of a column; ValueError that names those there are."""
    if name not in column_names(rows):
        raise ValueError(f"no column {name!r} among {', '.join(column_names(rows))}")
    # a whole row of a dataset would be read with its signal; of several datasets, not all have each column
    return list(rows[name]) if _is_dataset(rows) else [row.get(name) for row in rows]


def _is_dataset(rows: Rows) -> "TypeIs[Dataset]":
    # the Space, which reads tasks, has no datasets
    return hasattr(rows, "column_names")


def _named(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:SHOWN]))}{more}"


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, Real) and math.isnan(value))


def _folded(value: Any) -> str:
    """A cell as it is compared with a choice: whole numbers without a point, in lower case."""
    if isinstance(value, Real) and float(value).is_integer():
        # every real number that is whole can be made an int
        value = int(value)  # pyright: ignore[reportArgumentType]
    return str(value).strip().casefold()
