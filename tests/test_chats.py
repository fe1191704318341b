"""Chats of stages 2 and 3: their batches, what they ask and answer, and that nothing tells an answer before it."""

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, parse, question
from fmrilm.processors.descriptors.text import REQUESTS as SCAN_REQUESTS
from fmrilm.training.alignment.chats import alignment_rows, chat_dataset, scan_block, text_block, user
from fmrilm.training.data.collator import RowCollator, encode_dataset
from fmrilm.training.data.tasks import load_task, task_names
from fmrilm.training.sft.chats import REQUESTS, Turn, conversation, instruction_rows, task_turn
from fmrilm.training.sft.program import SftArguments
from helpers import chats, random_examples, window_of


ASKED = {question(name, variant): name for name in CORE_NAMES for variant in range(len(QUESTIONS))}
TASKS = {name: load_task(name) for name in task_names()}
OF_QUESTION = {question: task for task in TASKS.values() for question in task.questions}
COMPARISON = "In which of the two scans is it higher?"
SINGLE = "Is it above typical?"
SCANS = 24
WORDS = st.text(st.sampled_from("abcdefghi XYZ.?\nü€0123"), min_size=1, max_size=20)


def batch_of(rows, processor) -> dict[str, torch.Tensor]:
    encoded = encode_dataset(chat_dataset(list(rows)), processor)
    return RowCollator(processor.tokenizer.pad_token_id)(list(encoded))


# --- batches


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
            tokens = draw(st.lists(st.integers(0, 15), min_size=2, max_size=8))
            codes.append([[code, 15 - code, 0] for code in tokens])
        messages.append(user(*blocks, text_block(draw(WORDS))))
        answer = draw(WORDS)
        messages.append({"role": "assistant", "content": draw(st.sampled_from([answer, [text_block(answer)]]))})
    return {"messages": messages, "codes": codes, "scores": [[0.5, len(scan)] for scan in codes]}


@given(st.lists(conversations(), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_what_the_assistant_says(processor, rows: list[dict]) -> None:
    originals = copy.deepcopy(rows)
    batch = batch_of(rows, processor)
    assert rows == originals and batch["input_ids"].shape[1] % 32 == 0
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert not (labelled & (batch["attention_mask"] == 0)).any()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert not (labelled & (batch["input_ids"] == processor.fmri_token_id)).any()
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        texts = [answer if isinstance(answer, str) else answer[0]["text"] for answer in answers]
        decoded = processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        assert decoded == "".join(f"{text}<|im_end|>" for text in texts)
    scans = [scan for row in rows for scan in row["codes"]]
    assert (batch["input_ids"] == processor.fmri_token_id).sum() == sum(map(len, scans))
    assert ("fmri_codes" in batch) == bool(scans)
    if scans:
        valid = batch["fmri_codes"][..., 0] >= 0
        assert batch["fmri_codes"][valid].tolist() == sum(scans, [])
        assert batch["fmri_scores"][:, 1].tolist() == [len(scan) for scan in scans]


@pytest.mark.parametrize(("scans", "message"), [(2, "2 scans, got 1"), (0, "0 scans, got 1")])
def test_scans_and_blocks_must_pair_up(processor, scans: int, message: str) -> None:
    row = chats(1)[0]
    with pytest.raises(ValueError, match=message):
        batch_of([{**row, "codes": row["codes"] * scans, "scores": row["scores"] * scans}], processor)


def test_chat_without_an_answer_is_refused(processor) -> None:
    with pytest.raises(ValueError, match="expected an assistant's answer"):
        batch_of([chats(1)[0], {"messages": [user(text_block("a question"))], "codes": []}], processor)


def test_batches_are_the_same_whatever_side_the_tokenizer_prefers(processor) -> None:
    rows, first = chats(4), batch_of(chats(4), processor)
    processor.tokenizer.padding_side = "left"
    second = batch_of(rows, processor)
    assert all(torch.equal(first[name], second[name]) for name in first) and (first["attention_mask"] == 0).any()


# --- stage 2


def aligned(examples, rows: int, weights, questions: int = 3, statements: int = 5, paragraphs: int | None = 2):
    texts = ["one " * 300, "two " * 300]
    return alignment_rows(examples, texts, rows, weights, questions, statements, paragraphs, seed=3)


def texts(row: dict) -> list[str]:
    return [message["content"][-1]["text"] for message in row["messages"]]


def check_claims(row: dict, levels: np.ndarray) -> int:
    """How many levels the answers about descriptors state, each of which must be true."""
    claims = []
    for asked, answer in zip(texts(row)[::2], texts(row)[1::2], strict=True):
        if asked in SCAN_REQUESTS:
            claims += [(name, level) for name, level, *_ in parse(answer)]
        elif asked in ASKED:
            claims += [(name, level) for name, level, _ in parse(answer) if name == ASKED[asked]]
    assert len({name for name, _ in claims}) == len(claims)
    for name, level in claims:
        assert levels[window_of(row["codes"][0])][CORE_NAMES.index(name)] == LEVELS.index(level)
    return len(claims)


def test_alignment_mixes_its_four_kinds_by_their_weights() -> None:
    examples = random_examples(20)
    weights, size = np.array([0.3, 0.3, 0.2, 0.2]), 400
    counts = np.zeros(4)
    for row in aligned(examples, size, weights):
        if row["messages"]:
            request = texts(row)[0]
            counts[0 if request in SCAN_REQUESTS else 1] += 1
            assert len(row["messages"]) == (2 if request in SCAN_REQUESTS else 6)
            assert check_claims(row, examples.levels) == (5 if request in SCAN_REQUESTS else 3)
        else:
            counts[2 if row["codes"] else 3] += 1
            assert bool(row["codes"]) != bool(row["text"])
            assert row["text"] in (None, ("one " * 100).strip(), ("two " * 100).strip())
        if row["codes"]:
            assert np.allclose(row["scores"][0], examples.scores[window_of(row["codes"][0])])
    # within four standard deviations
    assert (np.abs(counts - size * weights) < 4 * np.sqrt(size * weights * (1 - weights))).all()


def test_each_window_comes_before_any_comes_again() -> None:
    scans = 3
    rows = [
        {"subject": f"s{scan}", "description": f"Start {scan}:\na{scan}\nb{scan}\nc{scan}"} for scan in range(scans)
    ]
    examples = random_examples(scans, rows)
    described, seen = 0, []
    for row in aligned(examples, 30, [1, 0, 0, 0]):
        seen.append(window_of(row["codes"][0]))
        answer = texts(row)[1]
        if answer.startswith("Start"):
            described += 1
            start, *paragraphs = answer.split("\n")
            assert start == f"Start {seen[-1]}:" and len(paragraphs) == 2 and paragraphs == sorted(paragraphs)
            assert {paragraph[1:] for paragraph in paragraphs} == {str(seen[-1])}
        else:
            assert check_claims(row, examples.levels) == 5
    assert all(sorted(seen[start : start + scans]) == list(range(scans)) for start in range(0, 30, scans))
    assert 5 < described < 25
    whole = aligned(examples, 30, [1, 0, 0, 0], paragraphs=None)
    assert {texts(row)[1] for row in whole} >= {row["description"] for row in rows}


# --- stage 3: what is asked


def labelled(scans: int = SCANS, **columns) -> list[dict]:
    """Rows of different subjects with a label of every packaged task; columns go before them."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(scans):
        values = {"subject": f"s{row}", "session": None, "site": None}
        for task in TASKS.values():
            choices = None if task.cuts else task.choices
            low, high = task.range or (0, 0)
            # every column has all its values, in the same order everywhere
            values[task.column] = list(choices)[row % len(choices)] if choices else round(rng.uniform(low, high), 1)
        rows.append({**values, **{name: cells[row] for name, cells in columns.items()}})
    return rows


def corpus(scans: int = SCANS) -> list[dict]:
    """Rows with the columns of `fmrilm describe`, two scans compared in every second one."""
    rows = labelled(scans)
    for number, row in enumerate(rows):
        pair = [100 + number, 100 + (number + 1) % scans]
        compare = {"text": COMPARISON, "answer": "first", "scans": pair, "descriptors": []}
        alone = [{"text": SINGLE, "answer": "yes", "scans": [100 + number], "descriptors": list(CORE_NAMES[:40])}]
        row |= {"folder": 0, "scan": 100 + number, "questions": [compare, *alone] if number % 2 else alone}
        row["description"] = f"Start:\nThe signal of scan {number} is high."
    return rows


def instructed(rows: list[dict], tasks, size: int, seed: int = 0, **mixture):
    """Chats, and the levels that they are about. mixture: of `SftArguments`."""
    return instruction_rows(random_examples(len(rows), rows), tasks, size, SftArguments(**mixture), seed)


def asked(row: dict) -> list[str]:
    """The last line of what the user says each time: the question without what stands before it."""
    return [text.split("\n")[-1] for text in texts(row)[::2]]


def test_answers_are_the_labels_and_levels_of_the_scan() -> None:
    rows = labelled()
    levels = random_examples(SCANS, rows).levels
    seen, stated = set(), 0
    for chat in instructed(rows, list(TASKS.values()), 150, row_weights=[0.4, 0.4, 0.2], questions=4, label_share=0.6):
        row = rows[window_of(chat["codes"][0])]
        assert len(chat["codes"]) == 1 and chat["text"] is None
        stated += check_claims(chat, levels)
        for text, answer in zip(asked(chat), texts(chat)[1::2], strict=True):
            if text in OF_QUESTION:
                task = OF_QUESTION[text]
                assert answer == task.sentence(task.answer(row[task.column]))
                seen.add((OF_QUESTION[text].name, text))
            elif text in REQUESTS:
                statements = {task.statement(row[task.column]).lower() for task in TASKS.values()}
                said = re.split(r"\. ", answer.removesuffix(".").lower())
                assert set(said) <= statements and len(said) == len({task.column for task in TASKS.values()})
            else:
                assert text in ASKED or text in SCAN_REQUESTS
    assert {name for name, _ in seen} == set(TASKS) and len(seen) > 2 * len(TASKS) and stated > 100


def test_paradigms_come_with_their_weights_and_every_window_in_turn() -> None:
    weights, size = np.array([0.2, 0.5, 0.3]), 400
    tasks = [TASKS[name] for name in ("sex", "age", "ad")]
    made = instructed(labelled(), tasks, size, row_weights=weights, questions=3)
    counts = np.zeros(3)
    for chat in made:
        counts[2 if asked(chat)[0] in (*REQUESTS, *SCAN_REQUESTS) else int(len(asked(chat)) > 1)] += 1
    assert (np.abs(counts - size * weights) < 4 * np.sqrt(size * weights * (1 - weights))).all()
    assert sorted(window_of(chat["codes"][0]) for chat in made.select(range(SCANS))) == list(range(SCANS))


def test_windows_without_anything_known_are_not_drawn() -> None:
    rows = labelled(4)
    rows[2]["sex"] = None
    examples = random_examples(4, rows)
    examples.levels[:] = -1
    mixture = SftArguments(row_weights=[0.5, 0.2, 0.3])
    drawn = instruction_rows(examples, [TASKS["sex"]], 12, mixture, seed=0)
    assert {window_of(chat["codes"][0]) for chat in drawn} == {0, 1, 3}
    with pytest.raises(ValueError, match="a window with a label or a question"):
        instruction_rows(examples, [], 12, mixture, seed=0)


def test_alignment_takes_a_window_without_known_descriptors_alone() -> None:
    examples = random_examples(4)
    examples.levels[2] = -1
    made = alignment_rows(examples, ["text"], 8, [0.5, 0.5, 0, 0], 2, 2, None, seed=0)
    assert all(bool(row["messages"]) == (window_of(row["codes"][0]) != 2) for row in made)


def test_chats_depend_on_the_seed_alone() -> None:
    def made(seed: int) -> list[dict]:
        shares = {"source_share": 0.5, "covariate_share": 0.5, "description_share": 0.5}
        return instructed(corpus(), list(TASKS.values()), 40, seed, **shares).to_list()

    assert made(3) == made(3) != made(4)


def test_comparisons_of_a_corpus_come_last_with_their_own_scans() -> None:
    rows, tasks = corpus(), [TASKS["sex"], TASKS["age"]]
    compared = 0
    for chat in instructed(rows, tasks, 200, row_weights=[0.3, 0.5, 0.2], questions=4):
        blocks = [[block["type"] for block in message["content"]].count("fmri") for message in chat["messages"][::2]]
        assert sum(blocks) == len(chat["codes"]) == len(chat["scores"])
        for place, (text, answer) in enumerate(zip(asked(chat), texts(chat)[1::2], strict=True)):
            assert blocks[place] == (2 if text == COMPARISON else place == 0)
            if text == COMPARISON:
                compared += 1
                assert place == len(blocks) - 1
                own, other = map(window_of, chat["codes"][-2:])
                assert answer == "first" and other == (own + 1) % SCANS and window_of(chat["codes"][0]) == own
            if text == SINGLE:
                # about no descriptor that was asked for, whose level in the window may be another
                assert place == len(blocks) - 1
                assert not {ASKED.get(each) for each in asked(chat)[:-1]} & set(CORE_NAMES[:40])
    assert compared > 20
    # one with a scan that is not there is left out
    without = [row for number, row in enumerate(rows) if number % 2]
    made = instructed(without, [], 30, row_weights=[0, 1, 0], questions=4)
    assert COMPARISON not in {question for chat in made for question in asked(chat)}


def test_known_labels_stand_before_other_questions() -> None:
    rows = labelled()
    told = 0
    tasks = [TASKS[name] for name in ("sex", "age", "age_group", "handedness")]
    for chat in instructed(rows, tasks, 100, row_weights=[0.5, 0.5, 0], questions=2, label_share=1, covariate_share=1):
        row = rows[window_of(chat["codes"][0])]
        said = texts(chat)[0].split("\n")[:-1]
        columns = {OF_QUESTION[text].column for text in asked(chat) if text in OF_QUESTION}
        statements = {task.statement(row[task.column]): task.column for task in tasks}
        for sentence in said:
            of = [column for text, column in statements.items() if sentence.lower() == f"{text}.".lower()]
            assert of and not columns & set(of)
            told += 1
    assert told > 50


# --- nothing tells an answer


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+(?:\.\d+)?", text.lower()))


def own_words(task) -> set[str]:
    """Single words that give an answer of the task away."""
    values = {value for value in task.choices or {} if len(value) > 1}
    return {word.lower() for word in {*task.choice_words, *values, *task.reveals} if words(word) == {word.lower()}}


def test_no_label_stands_before_its_question() -> None:
    """Every packaged task, with sites, sentences, covariates and descriptions that say much."""
    sites = ["ADHD200-1", "Female cohort", "Alzheimer_study", "Leipzig", "APOE4 carriers", "London"]
    rows = labelled(96, site=[sites[(row // 4) % len(sites)] for row in range(96)])
    for number, row in enumerate(rows):
        told = [f"{task.name} {row[task.column]}" for task in TASKS.values()]
        told += [task.statement(row[task.column]) for task in TASKS.values()]
        row["description"] = "The amplitude is unknown." if number % 3 == 0 else told[number % len(told)]
    shares = {"label_share": 1, "source_share": 1, "covariate_share": 0.5, "description_share": 1}
    told_anything = 0
    for chat in instructed(rows, list(TASKS.values()), 400, row_weights=[0.6, 0.3, 0.1], questions=3, **shares):
        before, _, question = texts(chat)[0].rpartition("\n")
        row = rows[window_of(chat["codes"][0])]
        about = [OF_QUESTION[text] for text in asked(chat) if text in OF_QUESTION]
        if question in REQUESTS:
            answer = texts(chat)[1].lower()
            about = [task for task in TASKS.values() if task.statement(row[task.column]).lower() in answer]
        for task in about:
            assert not words(before) & own_words(task), (task.name, before)
            if task.choices is None:
                assert task.answer(row[task.column]) not in words(before)
        told_anything += bool(before)
    # what is harmless stays
    assert told_anything > 150


@pytest.mark.parametrize("name", sorted(TASKS))
def test_chat_that_tells_its_answer_is_refused(name: str) -> None:
    task = TASKS[name]
    values = [30.0, 7.0] if task.choices is None or task.cuts else list(task.choices)
    value = next(value for value in values if task.range is None or value <= task.range[1])
    turn = task_turn(task, task.label(value), np.random.default_rng(0))
    assert conversation([turn], ["The amplitude is unknown."], "Nothing is known.")
    for text in (f"It is {task.answer(value)}.", task.statement(value), *(f"With {word}." for word in task.reveals)):
        for said, description in (([text], None), ([], text)):
            with pytest.raises(ValueError, match="a text that does not tell the answer"):
                conversation([turn], said, description)


def test_answers_do_not_tell_one_another() -> None:
    rng = np.random.default_rng(0)
    turns = [task_turn(TASKS["age"], 30.0, rng), task_turn(TASKS["age_group"], 30.0, rng)]
    with pytest.raises(ValueError, match="one task of column 'age' in a chat, got 'age' and 'age_group'"):
        conversation(turns)
    with pytest.raises(ValueError, match="no description of the scan before a question about its descriptors"):
        conversation([Turn("Is it low, typical or high?", "high")], [], "It is high.")
    shares = {"label_share": 0.7, "description_share": 1}
    made = instructed(corpus(), [TASKS["sex"]], 100, row_weights=[0.5, 0.5, 0], questions=2, **shares)
    described = [chat for chat in made if "The signal of scan" in texts(chat)[0]]
    assert described and all(text in OF_QUESTION for chat in described for text in asked(chat))


def test_source_sentence_leaves_out_what_tells_the_answer() -> None:
    """The name of a study whose subjects all have one answer, and ages where age is asked for."""
    site = ["memory-clinic", "twins"] * 12
    rows = labelled(site=site, age=[20 + row for row in range(SCANS)], ad=["AD", "CN"] * 12)

    def said(name: str, share: float = 1) -> list[str]:
        shares = {"label_share": 1, "source_share": share}
        made = instructed(rows, [TASKS[name]], 60, row_weights=[1, 0, 0], questions=1, **shares)
        return [texts(chat)[0].rpartition("\n")[0] for chat in made]

    names = ["The scan was taken in the study memory-clinic.", "The scan was taken in the study twins."]
    ages = "People in this study are 20 to 50 years old."
    assert set(said("handedness")) == {f"{name}\n{ages}" for name in names}
    assert set(said("age")) == set(names)
    assert set(said("ad")) == {""}
    assert 5 < sum(map(bool, said("handedness", 0.3))) < 31
