import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.phrases import NAMES, PHRASES
from fmrilm.processors.descriptors.text import (
    BOUNDS,
    BUCKETS,
    INTERPRETATIONS,
    Statement,
    interpretation,
    parse,
    sentence,
    z_statement,
)


names = st.sampled_from(sorted(PHRASES))
z_scores = st.floats(-9, 9).map(lambda z: round(z, 3))
of_buckets = st.builds(z_statement, names, z_scores)
of_terciles = st.builds(Statement, names, st.sampled_from(LEVELS), st.none())


@settings(max_examples=300, deadline=None)
@given(statements=st.lists(of_buckets | of_terciles, max_size=20), seed=st.integers(0, 2**32))
def test_every_statement_parses_back_whatever_its_phrasing(statements: list[Statement], seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert parse(" ".join(sentence(item, rng) for item in statements)) == statements


def test_no_phrase_and_no_level_stands_inside_another() -> None:
    wordings = [wording for wordings in BUCKETS.values() for wording in wordings]
    for texts in (list(NAMES), wordings):
        assert len(set(texts)) == len(texts)
        assert not [(a, b) for a in texts for b in texts if a != b and a in b]
    assert len(NAMES) == len(PHRASES)


@given(z=st.floats(-5, 5))
def test_level_agrees_with_the_z_score_as_written(z: float) -> None:
    statement = z_statement("modularity/global", z)
    written = float(sentence(statement).partition("z = ")[2].rstrip(").")[:5])
    place = list(BUCKETS).index(statement.level)
    assert written == statement.z and abs(written - z) <= 0.0051
    assert (place == 2) == (abs(written) <= 1) and (place in (0, 4)) == (abs(written) > 2)
    assert written == 0 or (place >= 2) == (written > 0) or place == 2


@pytest.mark.parametrize(
    ("z", "level", "written"),
    [
        (-2.004, "somewhat lower", "-2.00"),
        (-2.006, "markedly lower", "-2.01"),
        (-0.001, "within range", "+0.00"),
        (1.004, "within range", "+1.00"),
        (1.006, "somewhat elevated", "+1.01"),
        (2.006, "markedly elevated", "+2.01"),
    ],
)
def test_bounds_belong_to_the_inner_bucket(z: float, level: str, written: str) -> None:
    statement = z_statement("strength/Vis", z)
    assert statement.level == level and f"z = {written}" in sentence(statement)
    assert [z_statement("strength/Vis", bound).level for bound in BOUNDS] == list(BUCKETS)[1:3] + list(BUCKETS)[2:4]


def test_interpretations_go_with_the_sign_and_only_outside_the_range() -> None:
    more = {name: interpretation(z_statement(name, 1.5)) for name in PHRASES}
    less = {name: interpretation(z_statement(name, -1.5)) for name in PHRASES}
    assert {name for name, text in more.items() if text} == set(INTERPRETATIONS)
    assert not any(interpretation(z_statement(name, z)) for name in PHRASES for z in (-1, 0, 1))
    # higher modularity is more segregation, and not the reverse
    assert "more segregated" in more["modularity/global"] and "less segregated" in less["modularity/global"]
    assert "shorter" in more["efficiency/global"] and "longer" in less["efficiency/global"]
    # they state no level, number or network of their own
    assert not any(parse(text) for texts in INTERPRETATIONS.values() for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Connectivity within the visual network.",
        "Connectivity within the auditory network is low.",
        "Connectivity between the visual and visual networks is low.",
        "Connectivity within the visual network is somewhat elevated.",
        "Connectivity within the visual network is lower.",
        "Disconnectivity within the visual network is low.",
    ],
)
def test_what_is_no_statement_is_not_parsed(text: str) -> None:
    assert parse(text) == []
