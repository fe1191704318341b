"""Descriptors as sentences, and the way back from a sentence to the descriptor."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cohort import LEVELS
from .measures import CORE_NAMES, FAMILIES
from .phrases import NAMES, PHRASES


REQUESTS = ("Describe this scan.", "What does this scan show?", "Summarize the brain activity in this scan.")
QUESTIONS = (
    "Is the {phrase} low, typical or high?",
    "What is the {phrase}?",
)
# Buckets of z-scores, upwards, with the wordings of each: no wording stands inside another one.
BUCKETS = {
    "markedly lower": ("markedly lower than average", "far below the typical range"),
    "somewhat lower": ("somewhat reduced", "slightly below the typical range"),
    "within range": ("within the typical range", "close to average"),
    "somewhat elevated": ("somewhat elevated", "slightly above the typical range"),
    "markedly elevated": ("markedly elevated", "far above the typical range"),
}
# between the buckets; a value on a bound belongs to the bucket nearer to zero
BOUNDS = (-2.0, -1.0, 1.0, 2.0)
SENTENCES = (
    "the {phrase} is {level} (z = {z})",
    "the {phrase} is {level}, at z = {z}",
    "the {phrase} (z = {z}) is {level}",
    "with z = {z}, the {phrase} is {level}",
)
LEVEL_SENTENCE = "the {phrase} is {level}"
# What a value below and above the typical range is by the definition of the descriptor. The ends of a gradient depend
# on the cohort, and what a network does is no finding: neither is interpreted.
INTERPRETATIONS = {
    "efficiency/global": (
        "Paths between regions of the brain graph are longer than usual.",
        "Paths between regions of the brain graph are shorter than usual.",
    ),
    "modularity/global": (
        "The modules of the brain graph are less segregated than usual.",
        "The modules of the brain graph are more segregated than usual.",
    ),
    "clustering/global": (
        "Neighbours in the brain graph are less often neighbours of each other than usual.",
        "Neighbours in the brain graph are more often neighbours of each other than usual.",
    ),
}


class Statement(NamedTuple):
    """A statement about a descriptor.

    level: a tercile label (`LEVELS`), or a key of `BUCKETS`, by the z-score. z: two decimals; None beside a tercile.
    """

    descriptor: str
    level: str
    z: float | None = None


def z_statement(name: str, z: float) -> Statement:
    """The bucket is that of the z-score as it is written, so that a reader can check one against the other."""
    z = round(float(z), 2) + 0.0  # no negative zero
    place = sum(z >= bound if bound < 0 else z > bound for bound in BOUNDS)
    return Statement(name, list(BUCKETS)[place], z)


def z_text(z: float) -> str:
    return f"{z:+.2f}"


def sentence(statement: Statement, rng: np.random.Generator | None = None) -> str:
    """The statement in one of its phrasings, drawn by `rng`; without one, in the first."""
    name, level, z = statement
    if z is None:
        return _sentence(LEVEL_SENTENCE.format(phrase=PHRASES[name], level=level))
    forms, wordings = SENTENCES, BUCKETS[level]
    draw = (0, 0) if rng is None else (rng.integers(len(forms)), rng.integers(len(wordings)))
    return _sentence(forms[draw[0]].format(phrase=PHRASES[name], level=wordings[draw[1]], z=z_text(z)))


def interpretation(statement: Statement) -> str | None:
    """The meaning of a value outside the typical range, for the descriptors that have one by definition."""
    below, above = INTERPRETATIONS.get(statement.descriptor, (None, None))
    place = list(BUCKETS).index(statement.level)
    return None if place == 2 else above if place > 2 else below


def choose_statements(
    names: Sequence[str], z_scores: np.ndarray, count: int, rng: np.random.Generator
) -> list[list[Statement]]:
    """Statements of a description of a scan, by family: of each up to `count`.

    Half are the furthest from the cohort's mean, the others are drawn from the rest, so that typical values occur as
    well. z_scores: [names], not finite where absent; a family without any is left out.
    """
    columns: dict[str, list[int]] = {}
    for column in np.flatnonzero(np.isfinite(z_scores)).tolist():
        columns.setdefault(FAMILIES[names[column].partition("/")[0]], []).append(column)
    paragraphs = []
    for known in columns.values():
        known.sort(key=lambda column: -abs(z_scores[column]))
        extreme, rest = known[: -(-count // 2)], known[-(-count // 2) :]
        chosen: list[int] = [*extreme, *rng.permutation(rest)[: count // 2].astype(int).tolist()]
        paragraphs.append([z_statement(names[column], float(z_scores[column])) for column in chosen])
    return paragraphs


def reference(cohort: str, subjects: int) -> str:
    """The line that names what labels and z-scores refer to."""
    if "\n" in cohort:
        raise ValueError(f"expected a cohort's name in one line, got {cohort!r}")
    return f"Compared with {subjects} training subjects of {cohort}:"


def description(levels: np.ndarray, chosen: Sequence[int]) -> str:
    """One sentence for each of the chosen descriptors; levels int [descriptors] as `Cohort.levels` gives them."""
    return " ".join(sentence(Statement(CORE_NAMES[index], LEVELS[levels[index]])) for index in chosen)


def question(name: str, variant: int = 0) -> str:
    """A multiple-choice question about a descriptor; its answers are `LEVELS`, said in a sentence."""
    return QUESTIONS[variant].format(phrase=PHRASES[name])


def level_answers(text: str) -> tuple[str, ...] | None:
    """The allowed answers, `LEVELS`, of a question about a tercile label; None for any other."""
    plain = " ".join(text.split()).casefold()
    return LEVELS if plain.endswith("low, typical or high?") or plain in _BARE_QUESTIONS else None


def family(name: str) -> str:
    """The family of a descriptor: the part of its name before the slash."""
    return name.partition("/")[0]


def parse(text: str) -> list[Statement]:
    """The statements in a text, in order: the inverse of `sentence`, whatever its phrasing."""
    statements = []
    for match in _STATEMENT.finditer(text):
        words = {key.partition("_")[0]: value.lower() for key, value in match.groupdict().items() if value}
        name = NAMES.get(words["phrase"])
        if name is not None:
            z = float(words["z"]) if "z" in words else None
            statements.append(Statement(name, _LEVEL_OF[words["level"]], z))
    return statements


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _pattern() -> re.Pattern:
    """Any sentence of `SENTENCES` or of levels."""
    # by their first word: hundreds of alternatives at every letter of a text are slow
    rests: dict[str, list[str]] = {}
    for text in NAMES:
        first, _, rest = text.partition(" ")
        rests.setdefault(first, []).append(re.escape(rest))
    parts = {
        "phrase": "|".join(f"{first} (?:{'|'.join(alternatives)})" for first, alternatives in rests.items()),
        "level": "|".join(re.escape(wording) for wordings in BUCKETS.values() for wording in wordings),
        "z": r"[+-]\d+\.\d\d",
    }
    forms = [(LEVEL_SENTENCE, {**parts, "level": "|".join(LEVELS)})]
    forms += [(form, parts) for form in SENTENCES]
    alternatives = []
    for number, (form, texts) in enumerate(forms):
        groups = {key: f"(?P<{key}_{number}>{text})" for key, text in texts.items()}
        alternatives.append(re.escape(form).replace(r"\{", "{").replace(r"\}", "}").format(**groups))
    return re.compile(rf"\b(?:{'|'.join(alternatives)})(?!\w)", re.IGNORECASE)


_LEVEL_OF = {wording: level for level, wordings in BUCKETS.items() for wording in wordings}
_LEVEL_OF |= {level: level for level in LEVELS}
_STATEMENT = _pattern()
# those that do not name their answers
_BARE_QUESTIONS = {question(name, variant=1).casefold() for name in PHRASES}
