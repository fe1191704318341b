import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fmrilm.processors.descriptors.paraphrase import FREE_WORDS, LEVEL_SYNONYMS, differences
from fmrilm.processors.descriptors.phrases import PHRASES
from fmrilm.processors.descriptors.text import BUCKETS, Statement, sentence, z_statement


z_scores = st.floats(-4, 4).map(lambda z: round(z, 2))
statement_lists = st.lists(
    st.builds(z_statement, st.sampled_from(sorted(PHRASES)), z_scores),
    min_size=1,
    max_size=6,
    unique_by=lambda statement: statement.descriptor,
)
generators = st.integers(0, 2**32).map(np.random.default_rng)
WORDINGS = [wording for level in BUCKETS for wording in (*BUCKETS[level], *LEVEL_SYNONYMS[level])]


def write(statements: list[Statement], rng: np.random.Generator) -> str:
    return " ".join(sentence(item, rng) for item in statements)


@settings(max_examples=60, deadline=None)
@given(statements=statement_lists, rng=generators)
def test_any_order_and_phrasing_is_accepted(statements: list[Statement], rng: np.random.Generator) -> None:
    shuffled = [statements[i] for i in rng.permutation(len(statements))]
    assert differences(statements, write(shuffled, rng)) == []
    joined = ", whereas ".join(sentence(item, rng).rstrip(".").lower() for item in shuffled)
    assert differences(statements, f"In this scan, {joined}.") == []


SAME = [z_statement("connectivity/Vis-Limbic", 1.25), z_statement("modularity/global", -2.5)]


@pytest.mark.parametrize(
    "text",
    [
        "With a z-score of +1.25, the connectivity between the limbic and visual networks is somewhat higher, "
        "while the modularity of the brain graph is markedly reduced (z = -2.50).",
        "Modularity is far below average: z = −2.50.\nConnectivity between visual and limbic regions, "
        "given as +1.25, is slightly above average!".replace("!", "."),
        "The scan shows somewhat elevated (z=+1.25) connectivity between the visual network and the limbic network; "
        "modularity (z=-2.50) was markedly lower than average.",
    ],
)
def test_free_rewrites_that_say_the_same_are_accepted(text: str) -> None:
    assert differences(SAME, text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # of one statement: connectivity/Vis-Limbic at +1.25
        ("Connectivity between the visual and limbic networks is somewhat elevated.", "lost"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = 1.25).", "1.25"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = -1.25).", "-1.25"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.3).", "+1.3"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.255).", "+1.255"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +11.25).", "+11.25"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = --+1.25).", "+"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z < +1.25).", "<"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.25%).", "%"),
        ("Connectivity between the visual and limbic networks is markedly elevated (z = +1.25).", "markedly"),
        ("Connectivity between the visual and limbic networks is elevated (z = +1.25).", "'elevated'"),
        ("Connectivity between the visual and limbic networks is not somewhat elevated (z = +1.25).", "'not'"),
        ("Connectivity between the visual and limbic networks isn't somewhat elevated (z = +1.25).", "isn't"),
        ("Connectivity within the visual and limbic networks is somewhat elevated (z = +1.25).", "lost"),
        ("Connectivity within the visual network is somewhat elevated (z = +1.25).", "lost"),
        ("Connectivity between the visual and control networks is somewhat elevated (z = +1.25).", "Cont"),
        ("Connectivity between the visual, limbic and control networks is somewhat elevated (z = +1.25).", "Cont"),
        ("Connectivity between the visual and auditory networks is somewhat elevated (z = +1.25).", "auditory"),
        ("Connectivity between the non-visual and limbic networks is somewhat elevated (z = +1.25).", "non"),
        ("Time-course coupling between the visual and limbic networks is somewhat elevated (z = +1.25).", "lost"),
        ("Overall connectivity of the visual and limbic networks is somewhat elevated (z = +1.25).", "lost"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.25), as in two others.",
         "'two'"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.25) -0.40.", "-0.40"),
        ("Connectivity between the visual and limbic networks is somewhat elevated (z = +1.25), a sign of dementia.",
         "dementia"),
        ("", "lost"),
    ],
)  # fmt: skip
def test_what_a_language_model_gets_wrong_is_refused(text: str, problem: str) -> None:
    found = differences(SAME[:1], text)
    assert any(problem in item for item in found), found


@settings(max_examples=100, deadline=None)
@given(
    statements=statement_lists,
    rng=generators,
    corruption=st.sampled_from(["repeat", "digit", "swap z", "swap level"]),
)
def test_no_planted_corruption_is_accepted(
    statements: list[Statement], rng: np.random.Generator, corruption: str
) -> None:
    text = corrupted(statements, rng, corruption)
    assume(text is not None)
    assert differences(statements, text) != [], text


def corrupted(statements: list[Statement], rng: np.random.Generator, corruption: str) -> str | None:
    """A text that says something else; None where the corruption does not apply."""
    sentences = [sentence(item, rng) for item in statements]
    place = int(rng.integers(len(sentences)))
    own = sentences[place]
    if corruption == "repeat":
        return " ".join([*sentences, own])
    if corruption == "digit":
        digits = [match.start() for match in re.finditer(r"\d", own)]
        at = digits[rng.integers(len(digits))]
        sentences[place] = own[:at] + str((int(own[at]) + rng.integers(1, 10)) % 10) + own[at + 1 :]
        return " ".join(sentences)
    field = {"swap z": 2, "swap level": 1}[corruption]
    other = statements[int(rng.integers(len(statements)))]
    if other[field] == statements[place][field]:
        return None
    exchanged = {statements[place].descriptor: other, other.descriptor: statements[place]}
    parts = [(item, exchanged.get(item.descriptor, item)) for item in statements]
    return " ".join(
        sentence(item._replace(z=with_[2]) if field == 2 else item._replace(level=with_[1]), rng)
        for item, with_ in parts
    )


def test_free_words_say_nothing_of_a_level() -> None:
    of_levels = {word for wording in WORDINGS for word in wording.split()} - {"the", "in", "to"}
    assert not of_levels & FREE_WORDS
    assert not {"not", "no", "nor", "without", "never", "than", "more", "less", "most", "one", "two"} & FREE_WORDS


def test_no_wording_of_one_level_stands_inside_one_of_another() -> None:
    levels = {word: level for level in BUCKETS for word in (*BUCKETS[level], *LEVEL_SYNONYMS[level])}
    assert len(levels) == len(WORDINGS)
    assert not [(a, b) for a in levels for b in levels if levels[a] != levels[b] and a in b]
