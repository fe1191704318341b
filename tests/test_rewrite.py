"""Rewrites by a language model: taken where they say the same, refused and reported where they do not."""

import numpy as np
import pytest

from fmrilm.processors.descriptors.text import Statement, parse, sentence
from fmrilm.training.corpus import rewrite as module
from fmrilm.training.corpus.rewrite import rewrite


STATEMENTS = [
    Statement("connectivity/Vis-Default", "somewhat elevated", 1.31),
    Statement("strength/Limbic", "markedly lower", -2.4),
    Statement("efficiency/global", "within range", 0.12),
]
TEXTS = [sentence(statement) for statement in STATEMENTS]


@pytest.fixture
def language_model(make_language_model, tiny_tokenizer):
    return make_language_model("llama", len(tiny_tokenizer)), tiny_tokenizer


def test_a_model_that_speaks_nonsense_changes_nothing(language_model) -> None:
    items = rewrite(TEXTS, *language_model, temperature=0)
    assert [item.text for item in items] == TEXTS
    assert all(item.problems and item.answer != item.text for item in items)


def test_batches_give_what_single_texts_give(language_model) -> None:
    together = rewrite(TEXTS, *language_model, temperature=0)
    for text, item in zip(TEXTS, together, strict=True):
        alone = rewrite([text], *language_model, temperature=0)[0].answer
        # how much is written goes by the longest prompt of a batch
        assert len(alone) > 100 and alone[:100] == item.answer[:100]
        assert not item.answer.startswith(module.PROMPT[:20])


def test_answers_that_say_the_same_are_taken_in_their_own_order(language_model, monkeypatch) -> None:
    worded = {text: sentence(s, np.random.default_rng(3)) for text, s in zip(TEXTS, STATEMENTS, strict=True)}
    worded[TEXTS[1]] = worded[TEXTS[1]].replace("-2.40", "+2.40")
    asked = []

    def answers(prompts, *_) -> list[str]:
        asked.extend(prompts)
        return [next(worded[text] for text in TEXTS if text in prompt) for prompt in prompts]

    monkeypatch.setattr(module, "_answers", answers)
    items = rewrite(TEXTS, *language_model)
    assert len(asked) == len(TEXTS)
    assert [bool(item.problems) for item in items] == [False, True, False]
    assert items[1].text == TEXTS[1]
    assert [parse(item.text) for item in items] == [[statement] for statement in STATEMENTS]


def test_text_with_more_than_statements_is_refused(language_model) -> None:
    with pytest.raises(ValueError, match="expected a text of statements with z-scores and nothing else"):
        rewrite(["The scan shows nothing."], *language_model)
