"""Batches of chats, and the chats of stages 2 and 3."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, parse, question
from fmrilm.training.alignment.chats import alignment_dataset, instruction_dataset, scan_block, text_block, user
from fmrilm.training.data.collator import ChatCollator
from fmrilm.training.data.dataset import collate_signals
from helpers import chats, random_scans


ASKED = {question(name, variant): name for name in CORE_NAMES for variant in range(len(QUESTIONS))}


def window_of(row: dict) -> int:
    return row["codes"][0][0] * 16 + row["codes"][0][1]


WORDS = st.text(st.sampled_from("abcdefghi XYZ.?\nü€0123"), min_size=1, max_size=20)


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
            codes.append(draw(st.lists(st.integers(0, 15), min_size=2, max_size=8)))
        messages.append(user(*blocks, text_block(draw(WORDS))))
        answer = draw(WORDS)
        messages.append({"role": "assistant", "content": draw(st.sampled_from([answer, [text_block(answer)]]))})
    return {"messages": messages, "codes": codes}


@given(st.lists(conversations(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_what_the_assistant_says(processor, rows: list[dict]) -> None:
    originals = copy.deepcopy(rows)
    batch = ChatCollator(processor)(rows)
    assert rows == originals
    assert ("fmri_codes" in batch) == any(row["codes"] for row in rows)
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert not (labelled & (batch["attention_mask"] == 0)).any()
    assert not (labelled & (batch["input_ids"] == processor.fmri_token_id)).any()
    said = "{}<|im_end|>"
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        texts = [answer if isinstance(answer, str) else answer[0]["text"] for answer in answers]
        decoded = processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        assert decoded == "".join(map(said.format, texts))
    scans = [scan for row in rows for scan in row["codes"]]
    assert (batch["input_ids"] == processor.fmri_token_id).sum() == sum(map(len, scans))
    if scans:
        assert batch["fmri_codes"][batch["fmri_codes"] >= 0].tolist() == sum(scans, [])


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_prefers(processor) -> None:
    processor.tokenizer.padding_side = "left"
    batch = ChatCollator(processor)(list(chats(4)))
    assert (batch["attention_mask"].diff(dim=1) <= 0).all() and (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize(("scans", "message"), [(2, "2 scans, got 1"), (0, "0 scans, got 1")])
def test_scans_and_blocks_must_pair_up(processor, scans: int, message: str) -> None:
    row = {**chats(1)[0], "codes": [[1, 2]] * scans}
    with pytest.raises(ValueError, match=message):
        ChatCollator(processor)([row])


def test_chat_without_an_answer_is_refused(processor) -> None:
    rows = [chats(1)[0], {"messages": [user(text_block("a question"))], "codes": []}]
    with pytest.raises(ValueError, match="expected an assistant's answer"):
        ChatCollator(processor)(rows)


def test_padding_codes_take_no_placeholder(tiny_model, processor) -> None:
    row = chats(1)[0]
    padded = {**row, "codes": [row["codes"][0] + [-1, -1]]}
    first, second = (ChatCollator(processor)([item]) for item in (row, padded))
    assert torch.equal(first["input_ids"], second["input_ids"])
    model = tiny_model()
    assert torch.equal(model(**first).loss, model(**second).loss)


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


def test_paradigms_come_with_their_weights() -> None:
    weights, rows = np.array([0.2, 0.5, 0.3]), 600
    dataset = instruction_dataset(*random_scans(40), rows, questions=3, statements=2, weights=weights, seed=1)
    counts = np.zeros(3)
    for chat in dataset["messages"]:
        request = chat[0]["content"][1]["text"]
        assert (request in REQUESTS) != (request in ASKED)
        counts[2 if request in REQUESTS else int(len(chat) == 6)] += 1
    # within four standard deviations
    assert (np.abs(counts - rows * weights) < 4 * np.sqrt(rows * weights * (1 - weights))).all()


def test_answers_are_the_true_levels_of_known_descriptors() -> None:
    codes, levels = random_scans(30)
    levels[:, 1] = -1
    dataset = instruction_dataset(codes, levels, 60, questions=4, statements=3, weights=[0.3, 0.4, 0.3], seed=2)
    stated = 0
    for row in dataset:
        truth = levels[window_of(row)]
        chat = row["messages"]
        assert [block["type"] for block in chat[0]["content"]] == ["fmri", "text"]
        for asked, answered in zip(chat[::2], chat[1::2], strict=True):
            assert (asked["role"], answered["role"]) == ("user", "assistant")
            text, answer = asked["content"][-1]["text"], answered["content"][0]["text"]
            claims = parse(answer) if text in REQUESTS else [(ASKED[text], answer)]
            assert claims
            for name, level, *_ in claims:
                assert truth[CORE_NAMES.index(name)] == LEVELS.index(level)
                stated += 1
        names = [ASKED.get(message["content"][-1]["text"]) for message in chat[::2]]
        assert len(set(names)) == len(names)
    assert stated > 100


def test_alignment_describes_every_window_before_any_comes_again() -> None:
    codes, levels = random_scans(20)
    dataset = alignment_dataset(codes, levels, ["a text"], 50, statements=5, weights=[1, 0, 0], seed=3)
    drawn = [window_of(row) for row in dataset]
    assert sorted(drawn[:20]) == sorted(drawn[20:40]) == list(range(20)) and len(drawn) == 50
    for row in dataset:
        claims = parse(row["messages"][1]["content"][0]["text"])
        assert len(claims) == len({claim.descriptor for claim in claims}) == 5
        truth = levels[window_of(row)]
        assert all(truth[CORE_NAMES.index(name)] == LEVELS.index(level) for name, level, _ in claims)


def test_alignment_mixes_its_three_kinds_by_their_weights() -> None:
    texts = ["one " * 300, "two " * 300]
    dataset = alignment_dataset(*random_scans(20), texts, 400, statements=1, weights=[0.5, 0.2, 0.3], seed=3)
    described = [row for row in dataset if row["messages"]]
    alone = [row for row in dataset if row["codes"] and not row["messages"]]
    plain = [row for row in dataset if row["text"]]
    assert len(described) + len(alone) + len(plain) == 400
    for rows, share in ((described, 0.5), (alone, 0.2), (plain, 0.3)):
        assert abs(len(rows) / 400 - share) < 0.08
    assert {row["text"] for row in plain} == {("one " * 100).strip(), ("two " * 100).strip()}
    assert not any(row["codes"] or row["messages"] for row in plain)
