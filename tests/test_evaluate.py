"""Questions about scans are answered as if each were asked alone, and descriptors are scored by family."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_data import AGE, GROUP, build_model, encoded

from fmrilm.processors import FMRI_END, FMRI_START, FmriLMProcessor
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import description, family
from fmrilm.training.alignment.chats import assistant, text_block, user
from fmrilm.training.data.collator import pad_codes
from fmrilm.training.evaluation import descriptors
from fmrilm.training.evaluation.ask import (
    Example,
    answer_windows,
    calibrated,
    embed_windows,
    parse_number,
    score_windows,
)
from scan_rows import choice_scores


@pytest.fixture(params=["llama", "gpt2"])
def model(request, make_codec, make_language_model, processor: FmriLMProcessor):
    return build_model(make_codec(), make_language_model(request.param, len(processor.tokenizer) - 4), processor)


@pytest.fixture
def windows(model) -> list:
    return [encoded(model, tokens, seed) for seed, tokens in enumerate((4, 6, 4))]


def slow_scores(model, processor, question: str, words, window, examples=()) -> torch.Tensor:
    """By one uncached run over each whole conversation."""
    chat, shown = [], [*(example.window for example in examples), window]
    for place, each in enumerate(shown):
        chat.append(user({"type": "fmri", "tokens": len(each.codes)}, text_block(question)))
        if place < len(examples):
            chat.append(assistant(examples[place].answer))
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    answers = processor.tokenizer(list(words), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return choice_scores(model, prompt, pad_codes([each.codes for each in shown]), answers).log_softmax(0)


def test_windows_and_questions_that_share_a_prefix_score_as_if_asked_alone(model, processor, windows) -> None:
    questions, words = ["Which group?", "Is it low or high?"], [GROUP.choice_words, ["low", "high", "middle"]]
    choices = [processor.encode_choices(each) for each in words]
    found = score_windows(model, processor, windows, questions, choices)
    for place, question in enumerate(questions):
        for row, window in enumerate(windows):
            expected = slow_scores(model, processor, question, words[place], window)
            np.testing.assert_allclose(found[place][row], expected, atol=1e-5)
    # another window is told from rounding
    assert max(np.ptp(each, axis=0).max() for each in found) > 1e-3


def test_examples_stand_before_every_window(model, processor, windows) -> None:
    examples = [Example(windows[2], "younger"), Example(windows[1], "the older")]
    choices = [processor.encode_choices(GROUP.choice_words)]
    (found,) = score_windows(model, processor, windows, ["Which group?"], choices, examples)
    for row, window in enumerate(windows):
        expected = slow_scores(model, processor, "Which group?", GROUP.choice_words, window, examples)
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    with pytest.raises(ValueError, match="one question with examples"):
        score_windows(model, processor, windows, ["One?", "Two?"], choices * 2, examples)


def test_answers_and_embeddings_do_not_depend_on_the_other_windows(model, processor, windows) -> None:
    texts = answer_windows(model, processor, windows, "Which group?")
    assert texts == [answer_windows(model, processor, [window], "Which group?")[0] for window in windows]
    assert not any(FMRI_START in text or FMRI_END in text or "assistant" in text for text in texts)
    together = embed_windows(model, windows)
    alone = np.concatenate([embed_windows(model, [window]) for window in windows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_calibration_takes_out_what_the_model_prefers_whatever_the_scan() -> None:
    rng = np.random.default_rng(0)
    informative = rng.normal(0, 1, (200, 1)) * [1, -1]
    scores = informative + np.array([3.0, -1.0])
    scores -= np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    found = calibrated(scores[100:], scores[:100], np.full(2, 0.5))
    np.testing.assert_allclose(found[:, 0] / found[:, 1], np.exp(2 * informative[100:, 0]), rtol=0.7)
    assert found.argmax(1).mean() == pytest.approx(0.5, abs=0.15) and scores.argmax(1).mean() < 0.1
    # the order of the scans stays, and known shares of the classes come back
    assert (np.argsort(found[:, 0]) == np.argsort(scores[100:, 0])).all()
    shares = calibrated(scores[100:], scores[:100], np.array([0.9, 0.1]))
    np.testing.assert_allclose(shares[:, 0] / shares[:, 1], 9 * found[:, 0] / found[:, 1])


@pytest.mark.parametrize(
    "text, expected",
    [("34 years", 34), ("about 34.5.", 34.5), ("between 30 and 40", None), ("7", None), ("old", None), ("x34", None)],
)
def test_an_answer_holds_one_number_in_the_range(text: str, expected: float | None) -> None:
    assert parse_number(AGE, text) == expected


def test_number_in_a_title_is_no_answer() -> None:
    task = replace(AGE, title="PHQ-9 score", range=(0, 27))
    assert parse_number(task, task.sentence("12")) == 12


FAMILIES = sorted({family(name) for name in CORE_NAMES})


def answered(subject: str, truth: list[int], **answers: list[int]) -> descriptors.Answered:
    """The same four questions in each family, and what is answered to them under each condition."""
    asked = [[i for i, name in enumerate(CORE_NAMES) if family(name) == wanted][:4] for wanted in FAMILIES]
    count = len(truth) * len(FAMILIES)
    given = dict.fromkeys(descriptors.CONDITIONS, [1] * len(truth)) | answers
    shares = {name: np.tile(np.eye(3)[each], (len(FAMILIES), 1)) for name, each in given.items()}
    labels, places = np.array(truth * len(FAMILIES)), np.zeros(count, int)
    return descriptors.Answered(
        np.full(count, subject), places, np.concatenate(asked), labels, shares, shares["right"]
    )


def test_results_are_balanced_accuracies_with_intervals_over_subjects() -> None:
    answers = {"right": [0, 1, 1, 2], "shuffled": [0, 0, 0, 0], "noise": [2, 2, 2, 1]}
    rows = descriptors.joined([answered(name, [0, 0, 1, 2], **answers) for name in "ab"])
    results = descriptors.question_results(rows, seed=0)["families"]
    assert list(results) == [*dict.fromkeys(family(name) for name in CORE_NAMES), "all"]
    for name, result in results.items():
        assert result["questions"] == (8 * len(FAMILIES) if name == "all" else 8)
        # recalls of low, typical and high: 1/2, 1, 1; then 1, 0, 0; then 0, 0, 0; the majority is typical
        for key, expected in (("right", 5 / 6), ("shuffled", 1 / 3), ("noise", 0), ("majority", 1 / 3)):
            assert result[key]["accuracy"] == pytest.approx(expected)
            # both subjects alike: resamples do not differ
            assert result[key]["interval"] == pytest.approx([expected, expected])
        assert result["difference"]["value"] == pytest.approx(0.5) and result["beats_shuffled"]

    perfect, wrong = [0, 1, 2, 0], [1, 2, 0, 1]
    rows = [answered("a", perfect, right=perfect, shuffled=wrong), answered("b", perfect, right=wrong, shuffled=wrong)]
    result = descriptors.question_results(descriptors.joined(rows), seed=0)["families"]["all"]
    assert result["right"]["accuracy"] == pytest.approx(0.5)
    # one resample in four takes the same subject twice
    assert result["right"]["interval"] == result["difference"]["interval"] == pytest.approx([0, 1])
    assert not result["beats_shuffled"]


def test_questions_are_of_known_descriptors_of_all_families() -> None:
    labels = np.random.default_rng(0).integers(-1, 3, size=len(CORE_NAMES))
    asked = descriptors.choose_questions(labels, 3, np.random.default_rng(0))
    assert (labels[asked] >= 0).all() and len(set(asked)) == len(asked)
    families = [family(name) for name in CORE_NAMES]
    known = [name for name, label in zip(families, labels, strict=True) if label >= 0]
    chosen = [families[index] for index in asked]
    assert all(chosen.count(name) == min(3, known.count(name)) for name in set(families))


def test_share_of_true_statements() -> None:
    labels = np.full((2, len(CORE_NAMES)), -1)
    labels[0, :3] = [0, 1, 2]
    texts = [description(np.array([0, 2, 2]), [0, 1, 2]) + " " + description(np.ones(9, int), [8]), "nothing known"]
    assert descriptors.statement_accuracy(texts, labels) == pytest.approx(2 / 3)
    assert descriptors.statement_accuracy(texts, labels, np.ones(len(CORE_NAMES), int)) == pytest.approx(1 / 3)
    assert descriptors.statement_accuracy(["nothing"], labels[:1]) is None


def test_most_frequent_label_leaves_out_what_is_unknown() -> None:
    labels = np.array([[-1, 2, 0], [-1, 2, 1], [2, 0, 1]])
    assert descriptors.most_frequent(labels).tolist() == [2, 2, 1]
