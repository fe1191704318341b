"""Descriptors as sentences and as questions, and the way back from a sentence to the descriptor."""

import re
from collections.abc import Sequence

import numpy as np

from .cohort import LEVELS
from .measures import CORE_NAMES
from .networks import NETWORKS


# A statement is a phrase, " is " and a level; the same phrase names the descriptor in questions.
QUESTIONS = (
    "Is {phrase} low, typical or high?",
    "{Phrase}?",
)
REQUESTS = ("Describe this scan.", "What does this scan show?", "Summarize the brain activity in this scan.")


def phrase(name: str) -> str:
    """What a descriptor is called in English, for instance "connectivity within the visual network"."""
    family, _, networks = name.partition("/")
    words = [NETWORKS[network] for network in networks.split("-")]
    if family == "strength":
        return f"overall connectivity of the {words[0]} network"
    if family == "autocorrelation":
        return f"signal persistence of the {words[0]} network"
    if words[0] == words[1]:
        return f"connectivity within the {words[0]} network"
    return f"connectivity between the {words[0]} and {words[1]} networks"


PHRASES = {name: phrase(name) for name in CORE_NAMES}
_NAMES = {text: name for name, text in PHRASES.items()}
_STATEMENT = re.compile(rf"({'|'.join(map(re.escape, _NAMES))}) is ({'|'.join(LEVELS)})\b", re.IGNORECASE)


def family(name: str) -> str:
    """The family of a descriptor: the part of its name before the slash."""
    return name.partition("/")[0]


def question(name: str, variant: int = 0) -> str:
    """A multiple-choice question about a descriptor; its answers are `LEVELS`."""
    text = PHRASES[name]
    return QUESTIONS[variant].format(phrase=text, Phrase=text[0].upper() + text[1:])


def description(levels: np.ndarray, chosen: Sequence[int]) -> str:
    """One sentence for each of the chosen descriptors; levels int [descriptors] as `Cohort.levels` gives them."""
    return " ".join(
        f"{text[0].upper()}{text[1:]} is {LEVELS[levels[index]]}."
        for index, text in ((index, PHRASES[CORE_NAMES[index]]) for index in chosen)
    )


def parse(text: str) -> list[tuple[str, str]]:
    """The (descriptor, level) statements in a text, in order: the inverse of `description`."""
    return [(_NAMES[words.lower()], level.lower()) for words, level in _STATEMENT.findall(text)]
