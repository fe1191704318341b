"""Labelled scans as chats: what is asked and answered, how often, and that nothing tells an answer before it."""

import re

import numpy as np
import pytest
from datasets import Dataset

from fmrilm.processors.descriptors.text import REQUESTS as SCAN_REQUESTS
from fmrilm.training.alignment.chats import assistant, scan_block, text_block, user
from fmrilm.training.data.collator import ChatCollator
from fmrilm.training.data.tasks import load_task, task_names
from fmrilm.training.sft.task_chats import REQUESTS, Turn, conversation, task_dataset, task_turn


TASKS = {name: load_task(name) for name in task_names()}
OF_QUESTION = {question: task for task in TASKS.values() for question in task.questions}
SCANS = 24


def labelled(scans: int = SCANS, **columns) -> list[dict]:
    """Rows of different people with a label of every packaged task; columns go before them."""
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


def codes_of(scans: int) -> np.ndarray:
    """Codes whose first says which row they are of."""
    return np.stack([np.arange(scans), *np.random.default_rng(1).integers(16, size=(3, scans))], axis=1)


def corpus(scans: int = SCANS) -> list[dict]:
    """Rows with the columns of `fmrilm describe`, two scans compared in every second one."""
    rows = labelled(scans)
    for number, row in enumerate(rows):
        level = {
            "kind": "level",
            "text": "Is scan signal low, typical or high?",
            "answer": "high",
            "scans": [100 + number],
        }
        pair = [100 + number, 100 + (number + 1) % scans]
        compare = {
            "kind": "compare",
            "text": "In which of the two scans is it higher?",
            "answer": "first",
            "scans": pair,
        }
        row["scan"] = 100 + number
        row["questions"] = [level, compare] if number % 2 else [level]
        row["description"] = f"The signal of scan {number} is high."
        row["messages"] = [user(scan_block(), text_block(SCAN_REQUESTS[0])), assistant(row["description"])]
    return rows


def texts(row: dict) -> list[str]:
    return [message["content"][-1]["text"] for message in row["messages"]]


def asked(row: dict) -> list[str]:
    """The last line of what the user says each time: the question without what stands before it."""
    return [text.split("\n")[-1] for text in texts(row)[::2]]


# --- what is asked


def test_answers_are_the_labels_of_the_scan() -> None:
    rows = labelled()
    chats = task_dataset(rows, codes_of(SCANS), list(TASKS.values()), 150, 4, [0.4, 0.4, 0.2], seed=0)
    seen = set()
    for chat in chats:
        row = rows[chat["codes"][0][0]]
        assert len(chat["codes"]) == 1 and chat["text"] is None
        if asked(chat)[0] in REQUESTS:
            (answer,) = texts(chat)[1::2]
            statements = {task.statement(row[task.column]) for task in TASKS.values()}
            said = [part[0].lower() + part[1:] for part in re.split(r"\. ", answer.removesuffix("."))]
            assert {part.lower() for part in said} <= {statement.lower() for statement in statements}
            assert len(said) == len({task.column for task in TASKS.values()})
            continue
        for question, answer in zip(asked(chat), texts(chat)[1::2], strict=True):
            task = OF_QUESTION[question]
            assert answer == task.answer(row[task.column])
            seen.add((task.name, question))
    assert {name for name, _ in seen} == set(TASKS)
    assert len(seen) > 2 * len(TASKS)


def test_paradigms_come_with_their_weights_and_every_scan_in_turn() -> None:
    weights = np.array([0.2, 0.5, 0.3])
    tasks = [TASKS[name] for name in ("sex", "age", "ad")]
    size = 400
    chats = task_dataset(labelled(), codes_of(SCANS), tasks, size, 3, weights, seed=1)
    counts = np.zeros(3)
    for chat in chats:
        counts[2 if asked(chat)[0] in REQUESTS else int(len(asked(chat)) > 1)] += 1
    assert (np.abs(counts - size * weights) < 4 * np.sqrt(size * weights * (1 - weights))).all()
    assert sorted(chat["codes"][0][0] for chat in chats.select(range(SCANS))) == list(range(SCANS))


def test_scans_without_a_label_are_not_drawn() -> None:
    rows = labelled(4)
    rows[2]["sex"] = None
    chats = task_dataset(rows, codes_of(4), [TASKS["sex"]], 12, 1, [1, 0, 0], seed=0)
    assert {chat["codes"][0][0] for chat in chats} == {0, 1, 3}
    with pytest.raises(ValueError, match="a row with a label or a question"):
        task_dataset(rows, codes_of(4), [], 12, 1, [1, 0, 0], seed=0)


def test_chats_depend_on_the_seed_alone() -> None:
    def made(seed: int) -> list[dict]:
        tasks = list(TASKS.values())
        return task_dataset(corpus(), codes_of(SCANS), tasks, 40, 3, [0.3, 0.4, 0.3], seed, 0.5, 0.5).to_list()

    assert made(3) == made(3) != made(4)


def test_codes_and_rows_must_pair_up() -> None:
    with pytest.raises(ValueError, match="expected codes for each of the 4 rows, got 3"):
        task_dataset(labelled(4), codes_of(3), [TASKS["sex"]], 2, 1, [1, 0, 0], seed=0)


def test_batches_are_made_of_the_chats(processor) -> None:
    chats = task_dataset(corpus(), codes_of(SCANS), [TASKS["sex"], TASKS["age"]], 16, 4, [0.2, 0.6, 0.2], 0, 0.5)
    batch = ChatCollator(processor)(list(chats))
    assert len(batch["fmri_codes"]) == sum(len(chat["codes"]) for chat in chats) > 16
    assert (batch["labels"] != -100).any(-1).all()


# --- the questions of a corpus


def test_questions_of_a_corpus_stand_in_the_same_chats() -> None:
    rows = corpus()
    tasks = [TASKS["sex"], TASKS["age"]]
    chats = task_dataset(Dataset.from_list(rows), codes_of(SCANS), tasks, 200, 4, [0.3, 0.5, 0.2], seed=2)
    mixed = compared = described = 0
    for chat in chats:
        first = chat["messages"][0]["content"][-1]["text"]
        kinds = [question in OF_QUESTION for question in asked(chat)]
        mixed += any(kinds) and not all(kinds)
        described += first in SCAN_REQUESTS
        blocks = [[block["type"] for block in message["content"]].count("fmri") for message in chat["messages"][::2]]
        assert sum(blocks) == len(chat["codes"])
        for place, (question, answer) in enumerate(zip(asked(chat), texts(chat)[1::2], strict=True)):
            if question == "In which of the two scans is it higher?":
                compared += 1
                assert place == len(blocks) - 1 and blocks[place] == 2
                own, other = (codes[0] for codes in chat["codes"][-2:])
                assert answer == "first" and other == (own + 1) % SCANS
                assert len(chat["codes"]) == 2 or chat["codes"][0][0] == own
            else:
                assert blocks[place] == (place == 0)
    assert mixed and compared and described


def test_comparison_with_a_scan_that_is_not_there_is_left_out() -> None:
    rows = corpus()
    without = [row for number, row in enumerate(rows) if number % 2]
    chats = task_dataset(without, codes_of(len(without)), [], 30, 4, [0, 1, 0], seed=0)
    assert {question for chat in chats for question in asked(chat)} == {"Is scan signal low, typical or high?"}


# --- nothing tells an answer


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+(?:\.\d+)?", text.lower()))


def own_words(task) -> set[str]:
    """Single words that give an answer of the task away."""
    values = {value for value in task.choices or {} if len(value) > 1}
    return {word.lower() for word in {*task.choice_words, *values, *task.reveals} if words(word) == {word.lower()}}


def test_no_label_stands_before_its_question() -> None:
    """Every packaged task, with sites, sentences and descriptions that tell much."""
    sites = ["ADHD200-1", "Female cohort", "Alzheimer_study", "Leipzig", "APOE4 carriers", "London"]
    # sites do not tell the labels
    site = [sites[(row // 4) % len(sites)] for row in range(96)]
    rows = labelled(96, site=site)
    for number, row in enumerate(rows):
        told = [f"{task.name} {value}" for task in TASKS.values() for value in [row[task.column]]]
        told += [task.statement(row[task.column]) for task in TASKS.values()]
        row["description"] = "The amplitude is unknown." if number % 3 == 0 else told[number % len(told)]
    tasks = list(TASKS.values())
    chats = task_dataset(rows, codes_of(96), tasks, 500, 3, [0.6, 0.3, 0.1], 0, source_share=1, description_share=1)
    told_anything = 0
    for chat in chats:
        before, _, question = texts(chat)[0].rpartition("\n")
        row = rows[chat["codes"][0][0]]
        about = TASKS.values() if question in REQUESTS else [OF_QUESTION[text] for text in asked(chat)]
        for task in about:
            assert not words(before) & own_words(task), (task.name, before)
            if task.choices is None:
                assert task.answer(row[task.column]) not in words(before)
        told_anything += bool(before)
    # the guard leaves what is harmless
    assert told_anything > 200


@pytest.mark.parametrize("name", sorted(TASKS))
def test_chat_that_tells_its_answer_is_refused(name: str) -> None:
    task = TASKS[name]
    rng = np.random.default_rng(0)
    values = [30.0, 7.0] if task.choices is None or task.cuts else list(task.choices)
    value = next(value for value in values if task.range is None or value <= task.range[1])
    turn = task_turn(task, task.label(value), rng)
    assert conversation([turn], ["The amplitude is unknown."], "Nothing is known.")
    for text in (f"It is {task.answer(value)}.", task.statement(value), *(f"With {word}." for word in task.reveals)):
        with pytest.raises(ValueError, match="a text that does not tell the answer"):
            conversation([turn], [text])
        with pytest.raises(ValueError, match="a text that does not tell the answer"):
            conversation([turn], [], text)


def test_answer_to_one_question_does_not_tell_the_next() -> None:
    rng = np.random.default_rng(0)
    turns = [task_turn(TASKS["age"], 30.0, rng), task_turn(TASKS["age_group"], 30.0, rng)]
    with pytest.raises(ValueError, match="one task of column 'age' in a chat, got 'age' and 'age_group'"):
        conversation(turns)


def test_description_does_not_stand_before_a_question_about_its_descriptors() -> None:
    with pytest.raises(ValueError, match="no description of the scan before a question about its descriptors"):
        conversation([Turn("Is it low, typical or high?", "high")], [], "It is high.")
    rows = corpus()
    chats = task_dataset(rows, codes_of(SCANS), [TASKS["sex"]], 100, 2, [0.5, 0.5, 0], 0, description_share=1)
    described = [chat for chat in chats if "The signal of scan" in texts(chat)[0]]
    assert described and all(question in OF_QUESTION for chat in described for question in asked(chat))


def test_source_sentence_leaves_out_what_tells_the_answer() -> None:
    """The name of a study whose people all have one answer, and ages where age is asked for."""
    site = ["memory-clinic", "twins"] * 12
    rows = labelled(site=site, age=[20 + row for row in range(SCANS)], ad=["AD", "CN"] * 12)

    def said(name: str) -> set[str]:
        chats = task_dataset(rows, codes_of(SCANS), [TASKS[name]], 60, 1, [1, 0, 0], seed=0, source_share=1)
        return {texts(chat)[0].rpartition("\n")[0] for chat in chats}

    names = ["The scan was taken in the study memory-clinic.", "The scan was taken in the study twins."]
    ages = "People in this study are 20 to 50 years old."
    assert said("handedness") == {f"{name}\n{ages}" for name in names}
    assert said("age") == set(names)
    assert said("ad") == {""}


def test_source_sentence_comes_with_its_share() -> None:
    rows = labelled(site=["A", "B"] * 12)
    chats = task_dataset(rows, codes_of(SCANS), [TASKS["handedness"]], 400, 1, [1, 0, 0], seed=0, source_share=0.3)
    share = np.mean(["study" in texts(chat)[0] for chat in chats])
    assert abs(share - 0.3) < 0.1


def test_description_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no column 'description' among"):
        task_dataset(labelled(4), codes_of(4), [TASKS["sex"]], 2, 1, [1, 0, 0], 0, description_share=0.5)
