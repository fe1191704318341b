"""Pipelines: answers and probabilities, alike in batches and alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny
from datasets import Dataset
from transformers import Pipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from fmrilm import FmriLMFeatureExtractor
from helpers import bold


QUESTION, CHOICES = "Is this person older?", ["yes", "no", "maybe so"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def scans() -> list[dict]:
    """Of two atlases and three lengths."""
    shapes = ((20, 5, "tiny"), (8, 7, "other"), (13, 5, "tiny"))
    return [{"signal": bold(frames, rois), "tr": 2.0, "atlas": name} for frames, rois, name in shapes]


@pytest.fixture
def pipe(extractor_of_two: FmriLMFeatureExtractor, tmp_path: Path) -> Pipeline:
    return pipeline("fmri-text-to-text", model=str(save_tiny(tmp_path, extractor_of_two)))


def chat(scan, question: str = QUESTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "fmri", "fmri": scan}, {"type": "text", "text": question}]}]


def test_answer_is_what_the_model_generates(pipe: Pipeline, scans: list[dict]) -> None:
    inputs = pipe.processor.apply_chat_template(chat(scans[0]), add_generation_prompt=True)
    new = pipe.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    text = pipe.tokenizer.decode(new, skip_special_tokens=True)
    assert pipe(scans[0], QUESTION, **GREEDY) == {"answer": text}


def test_choices_get_probabilities(pipe: Pipeline, scans: list[dict]) -> None:
    inputs = pipe.processor.apply_chat_template(chat(scans[0]), add_generation_prompt=True)
    scores = pipe.model.score_choices(inputs, pipe.processor.encode_choices(CHOICES))[0].softmax(-1)
    found = pipe(scans[0], QUESTION, choices=CHOICES)
    assert list(found["probabilities"]) == CHOICES and found["answer"] == CHOICES[scores.argmax()]
    assert np.allclose(list(found["probabilities"].values()), scores.numpy(), rtol=1e-4)


def test_calibrated_questions_get_calibrated_probabilities(pipe: Pipeline, scans: list[dict]) -> None:
    def of_others() -> list[dict]:
        others = ((QUESTION, CHOICES[:2]), ("Another?", CHOICES))
        return [pipe(scans[0], question, choices=choices) for question, choices in others]

    plain, plain_others = pipe(scans, QUESTION, choices=CHOICES), of_others()
    biases = {"no": 1.0, "maybe so": 0.0, "yes": -2.0}
    pipe.model.config.calibrations = [{"questions": ["Other?", QUESTION], "slope": 0.5, "biases": biases}]
    assert of_others() == plain_others
    for before, after in zip(plain, pipe(scans, QUESTION, choices=CHOICES), strict=True):
        wanted = np.array([before["probabilities"][one] ** 0.5 * np.exp(biases[one]) for one in CHOICES])
        assert np.allclose(list(after["probabilities"].values()), wanted / wanted.sum(), rtol=1e-3)
        assert after["answer"] == CHOICES[int(wanted.argmax())]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_equal_single_scans(pipe: Pipeline, scans: list[dict], batch_size: int) -> None:
    questions = [QUESTION, "Why?", "A rather longer question about the same person, is it?"]
    alone = [pipe(scan, question, **GREEDY) for scan, question in zip(scans, questions, strict=True)]
    assert len({answer["answer"] for answer in alone}) >= 2
    assert pipe(scans, questions, **GREEDY, batch_size=batch_size) == alone
    items = [{"fmri": scan, "question": question} for scan, question in zip(scans, questions, strict=True)]
    assert list(pipe((item for item in items), **GREEDY, batch_size=batch_size)) == alone
    scored = [pipe(scan, QUESTION, choices=CHOICES)["probabilities"] for scan in scans]
    batch = pipe(scans, QUESTION, choices=CHOICES, batch_size=batch_size)
    for one, other in zip(scored, batch, strict=True):
        assert np.allclose(list(one.values()), list(other["probabilities"].values()), rtol=1e-3)


def test_datasets_and_generators_are_answered_as_lists_are_when_asked_for(pipe: Pipeline, scans: list[dict]) -> None:
    rows = Dataset.from_list([{**scan, "signal": scan["signal"].tolist()} for scan in scans])
    expected = pipe(scans, QUESTION, **GREEDY)
    forms = [rows, KeyDataset([{"scan": scan} for scan in scans], "scan"), iter(scans), (scan for scan in scans)]
    forms += [rows.to_iterable_dataset(), dict(enumerate(scans)).values()]
    for form in forms:
        found = pipe(form, QUESTION, **GREEDY, batch_size=2)
        assert isinstance(found, Iterator) and list(found) == expected
    assert list(pipe((scan for scan in scans), QUESTION, **GREEDY, num_workers=2)) == expected
    questions = [QUESTION, "Why?", "Who?"]
    assert list(pipe(rows, questions, **GREEDY)) == pipe(scans, questions, **GREEDY)
    items = Dataset.from_list([{"fmri": row, "question": QUESTION} for row in rows])
    assert list(pipe(items, **GREEDY)) == expected
    found = list(pipe(rows, QUESTION, choices=CHOICES, batch_size=2))
    assert [one["answer"] for one in found] == [one["answer"] for one in pipe(scans, QUESTION, choices=CHOICES)]
    # the second one is not read before it is wanted
    lazy = pipe((scan for scan in (scans[0], None)), QUESTION, **GREEDY)
    assert next(lazy) == expected[0]
    with pytest.raises(ValueError):
        next(lazy)


def test_callers_at_once_get_the_answers_of_single_ones(pipe: Pipeline, scans: list[dict]) -> None:
    def answers(scan: dict) -> list[dict]:
        return [pipe(scan, QUESTION, **GREEDY), pipe(scan, QUESTION, choices=CHOICES)]

    expected = [answers(scan) for scan in scans]
    with ThreadPoolExecutor(6) as callers:
        assert list(callers.map(answers, scans * 2)) == expected * 2


def test_scan_and_question_may_come_together(pipe: Pipeline, scans: list[dict]) -> None:
    expected = pipe(scans[0], QUESTION, **GREEDY)
    assert pipe({"fmri": scans[0], "question": QUESTION}, **GREEDY) == expected


def test_unfit_calls_are_refused(pipe: Pipeline, scans: list[dict]) -> None:
    with pytest.raises(ValueError, match="got 2 for 3 scans"):
        pipe(scans, ["Why?"] * 2)
    with pytest.raises(ValueError, match="as many questions as scans, got 0 for 0 scans"):
        pipe([], [])
    with pytest.raises(ValueError, match=r"one question for scans of unknown number, got \['Why\?'\]"):
        pipe(iter(scans), ["Why?"])
    with pytest.raises(ValueError, match="expected one scan, got a batch of rows"):
        pipe({"signal": [scans[0]["signal"]] * 2, "tr": [2.0] * 2}, QUESTION)
    with pytest.raises(ValueError, match="got dict without a question"):
        pipe(scans[0])
    with pytest.raises(ValueError, match="beside choices, got max_new_tokens"):
        pipe(scans[0], QUESTION, choices=CHOICES, max_new_tokens=3)
    with pytest.raises(ValueError, match="at least 2 choices"):
        pipe(scans[0], QUESTION, choices=["yes"])


def test_any_to_any_answers_chats_with_scans(pipe: Pipeline, scans: list[dict]) -> None:
    general = pipeline("any-to-any", model=pipe.model, processor=pipe.processor)
    for scan in scans:
        found = general(text=chat(scan), return_full_text=False, **GREEDY)[0]["generated_text"]
        assert found == pipe(scan, QUESTION, **GREEDY)["answer"]
