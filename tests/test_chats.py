"""Batches of chats, and the rows of stage 2."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, parse, question
from fmrilm.training.alignment.chats import (
    FEATURES,
    alignment_rows,
    assistant,
    chat_dataset,
    scan_block,
    text_block,
    user,
)
from fmrilm.training.alignment.examples import Examples
from fmrilm.training.data.collator import RowCollator, encode_dataset
from fmrilm.training.data.dataset import collate_signals


ASKED = {question(name, variant): name for name in CORE_NAMES for variant in range(len(QUESTIONS))}
WORDS = st.text(st.sampled_from("abcdefghi XYZ.?\nü€0123"), min_size=1, max_size=20)


def examples(windows: int, seed: int = 0) -> Examples:
    """Windows of 4 tokens on 2 levels; the first code is the window's number."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(16, size=(windows, 4, 2))
    codes[:, 0, 0] = range(windows)
    levels = rng.integers(-1, 3, size=(windows, len(CORE_NAMES)))
    return Examples(list(codes), np.zeros((windows, 3)), levels - 1.0, levels, [{}] * windows, np.ones((windows, 2)))


def rows_of(made: Examples, rows: int, weights: list[float], texts=("a text",), **counts: int) -> Dataset:
    counts = {"questions": 3, "statements": 2, **counts}
    return alignment_rows(made, texts, rows, weights, paragraphs=None, seed=1, **counts)


def window_of(row: dict) -> int:
    return row["codes"][0][0][0]


@st.composite
def conversations(draw) -> dict:
    """Questions with zero to two scans, each followed by an answer; perhaps a system message first."""
    messages, codes = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 3))):
        blocks = []
        for _ in range(draw(st.integers(0, 2))):
            blocks += [scan_block(), text_block(draw(WORDS))]
            codes.append(draw(st.lists(st.lists(st.integers(0, 15), min_size=2, max_size=2), min_size=1, max_size=4)))
        messages.append(user(*blocks, text_block(draw(WORDS))))
        answer = draw(WORDS)
        messages.append({"role": "assistant", "content": draw(st.sampled_from([answer, [text_block(answer)]]))})
    return {"messages": messages, "codes": codes, "scores": [[0.5]] * len(codes)}


def batch_of(rows: list[dict], processor: FmriLMProcessor) -> dict[str, torch.Tensor]:
    encoded = encode_dataset(Dataset.from_list(rows, features=FEATURES), processor)
    return RowCollator(processor.tokenizer.pad_token_id)(encoded.to_list())


@given(st.lists(conversations(), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_the_assistants_messages(processor, rows: list[dict]) -> None:
    rows = [{"text": None, **row} for row in rows]
    originals = copy.deepcopy(rows)
    batch = batch_of(rows, processor)
    assert rows == originals
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert not (labelled & (batch["attention_mask"] == 0)).any()
    assert not (labelled & (batch["input_ids"] == processor.fmri_token_id)).any()
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        texts = [answer if isinstance(answer, str) else answer[0]["text"] for answer in answers]
        decoded = processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        assert decoded == "".join(f"{text}<|im_end|>" for text in texts)
    scans = [scan for row in rows for scan in row["codes"]]
    assert (batch["input_ids"] == processor.fmri_token_id).sum() == sum(map(len, scans))
    assert ("fmri_codes" in batch) == ("fmri_scores" in batch) == bool(scans)
    if scans:
        assert batch["fmri_codes"][batch["fmri_codes"] >= 0].tolist() == np.concatenate(scans).ravel().tolist()
        assert batch["fmri_scores"].tolist() == [[0.5]] * len(scans)


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_prefers(processor) -> None:
    processor.tokenizer.padding_side = "left"
    rows = rows_of(examples(4), 4, [0.5, 0.5, 0, 0])
    batch = batch_of(rows.to_list(), processor)
    assert (batch["attention_mask"].diff(dim=1) <= 0).all() and (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize(
    ("messages", "scans", "message"),
    [
        ([user(scan_block()), assistant("a")], 2, "2 scans, got 1"),
        ([user(scan_block()), assistant("a")], 0, "0 scans, got 1"),
        ([user(text_block("a question"))], 0, "expected an assistant's answer"),
        ([], 2, "expected one scan in a row without a chat, got 2"),
        ([], 0, "expected a chat, a scan or text in every row"),
    ],
)
def test_rows_that_do_not_fit_are_refused(processor, messages: list, scans: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_dataset(chat_dataset([{"messages": messages, "codes": [[[1, 2]]] * scans}]), processor)


def test_signals_are_padded_and_masked() -> None:
    rng = np.random.default_rng(0)
    items = [
        {
            "signal": rng.standard_normal((8, rois)).astype(np.float32),
            "coordinates": rng.standard_normal((rois, 3)).astype(np.float32),
            "descriptors": np.array([rois], np.float32),
        }
        for rois in (2, 5)
    ]
    batch = collate_signals(items)
    assert batch["fmri_values"].shape == (2, 5, 8) and batch["descriptors"].tolist() == [[2], [5]]
    assert batch["fmri_mask"].any(-1).sum(1).tolist() == [2, 5] and not batch["fmri_values"][0, 2:].any()
    for row, item in enumerate(items):
        count = item["signal"].shape[1]
        assert torch.equal(batch["fmri_values"][row, :count], torch.from_numpy(item["signal"].T))
        assert torch.equal(batch["roi_coordinates"][row, :count], torch.from_numpy(item["coordinates"]))


def test_kinds_of_rows_come_with_their_weights() -> None:
    texts = ["one " * 300, "two " * 300]
    rows = rows_of(examples(16), 400, [0.3, 0.2, 0.2, 0.3], texts)
    described = [row for row in rows if row["messages"] and row["messages"][0]["content"][1]["text"] in REQUESTS]
    asked = [row for row in rows if row["messages"] and row["messages"][0]["content"][1]["text"] in ASKED]
    alone = [row for row in rows if row["codes"] and not row["messages"]]
    plain = [row for row in rows if row["text"]]
    assert len(described) + len(asked) + len(alone) + len(plain) == 400
    for kind, share in ((described, 0.3), (asked, 0.2), (alone, 0.2), (plain, 0.3)):
        assert abs(len(kind) / 400 - share) < 0.08
    assert {row["text"] for row in plain} == {("one " * 100).strip(), ("two " * 100).strip()}
    assert not any(row["codes"] or row["messages"] for row in plain)


def test_answers_are_the_true_levels_of_known_descriptors() -> None:
    made = examples(16)
    made.levels[:, 1] = -1
    rows = rows_of(made, 60, [0.5, 0.5, 0, 0], questions=4, statements=5)
    drawn, stated = [window_of(row) for row in rows], 0
    # each window before any comes again
    assert all(sorted(drawn[start : start + 16]) == list(range(16)) for start in (0, 16, 32))
    for row in rows:
        truth, chat = made.levels[window_of(row)], row["messages"]
        assert [block["type"] for block in chat[0]["content"]] == ["fmri", "text"]
        names = []
        for asked, answered in zip(chat[::2], chat[1::2], strict=True):
            text, answer = asked["content"][-1]["text"], answered["content"][0]["text"]
            claims = parse(answer) if text in REQUESTS else [(ASKED[text], answer)]
            assert len(claims) == (5 if text in REQUESTS else 1)
            for name, level, *_ in claims:
                assert truth[CORE_NAMES.index(name)] == LEVELS.index(level)
                names.append(name)
        assert len(set(names)) == len(names)
        stated += len(names)
    assert stated > 100
