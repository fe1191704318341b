"""A model is evaluated on subjects it never learned from, beside baselines and other people's scans."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from fmrilm.training.alignment.chats import assistant, scan_block, text_block, user
from fmrilm.training.cli.main import app
from fmrilm.training.data.collator import pad_codes, with_token_counts
from fmrilm.training.data.held_out import held_out_people
from fmrilm.training.data.synthetic import PlantedCohort, write_planted
from fmrilm.training.data.tasks import Task, load_task
from fmrilm.training.evaluation import program as evaluate_program
from fmrilm.training.evaluation.adapt import Tuning, embed_scans, task_rows, tune
from fmrilm.training.evaluation.ask import Example, answer_scans, calibrated, parse_answer, score_scans
from fmrilm.training.evaluation.labelled_scans import load_labelled
from fmrilm.training.evaluation.program import FULL, Protocol, evaluate
from fmrilm.training.evaluation.report import add_to_card
from helpers import labelled_atlas, prepared


GROUP = Task("planted_group", "group", ("Which group?", "Which of the two?"), {"a": "younger", "b": "the older"})
AGE = Task("planted_age", "age", ("How old?",), range=(20, 80), unit="years")
# made-up people: a third of them is tested
NEW = {"new_people": True, "test_share": 1 / 3}
SCANS = [np.array([3, 1, 4, 1]), np.array([5, 9, 2, 6, 5, 3]), np.array([1, 1, 1, 2])]


def write_task(task: Task, folder) -> str:
    values = {"name": task.name, "column": task.column, "questions": list(task.questions)}
    values |= {"choices": task.choices} if task.choices else {"range": list(task.range), "unit": task.unit}
    path = folder / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory):
    """24 planted people of two sites."""
    folder = tmp_path_factory.mktemp("data") / "planted-cohort"
    scans = [prepared(name, frames=200, of=labelled_atlas()) for name in "abc"]
    # ROIs that have something in common, as those of a brain do
    scans = [dataclasses.replace(scan, signal=scan.signal + scan.signal[:, :1]) for scan in scans]
    write_planted(folder, PlantedCohort(scans, 24, effect=1.0, frames=20))
    return folder


@pytest.fixture
def saved(llama, processor, tmp_path):
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def slow_scores(model, processor, question: str, words, codes, examples=()) -> torch.Tensor:
    """By one uncached run over each whole conversation."""
    chat = []
    for example in examples:
        chat += [user(scan_block(), text_block(question)), assistant(example.answer)]
    every = [*(example.codes for example in examples), codes]
    chat = with_token_counts([*chat, user(scan_block(), text_block(question))], every)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    totals = []
    for word in words:
        answer = torch.tensor([processor.tokenizer(word, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer], -1), fmri_codes=pad_codes(every)).logits
        likely = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1).gather(1, answer[0, :, None])
        totals.append(likely.sum())
    return torch.stack(totals).log_softmax(0)


@pytest.mark.parametrize("examples", [(), (Example(SCANS[2], "younger"), Example(SCANS[0], "the older"))])
def test_scans_of_several_lengths_score_as_if_asked_one_by_one(llama, processor, examples) -> None:
    scores = score_scans(llama, processor, "Which group?", GROUP.choice_words, SCANS, examples)
    for row, codes in enumerate(SCANS):
        expected = slow_scores(llama, processor, "Which group?", GROUP.choice_words, codes, examples)
        np.testing.assert_allclose(scores[row], expected, atol=1e-4)
    assert np.ptp(scores[:, 0]) > 1e-3


def test_answers_in_words_do_not_depend_on_the_other_scans(llama, processor) -> None:
    together = answer_scans(llama, processor, "Which group?", SCANS)
    assert together == [answer_scans(llama, processor, "Which group?", [codes])[0] for codes in SCANS]


def test_calibration_takes_out_what_the_model_prefers_whatever_the_scan() -> None:
    rng = np.random.default_rng(0)
    informative = rng.normal(0, 1, (200, 1)) * [1, -1]
    preference = np.array([3.0, -1.0])
    scores = informative + preference
    scores -= np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    found = calibrated(scores[100:], scores[:100], np.full(2, 0.5))
    expected = np.exp(2 * informative[100:, 0])
    np.testing.assert_allclose(found[:, 0] / found[:, 1], expected, rtol=0.7)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found.argmax(1).mean() == pytest.approx(0.5, abs=0.15) and scores.argmax(1).mean() < 0.1
    # the order of the scans stays, and known shares of the classes come back
    assert (np.argsort(found[:, 0]) == np.argsort(scores[100:, 0])).all()
    shares = calibrated(scores[100:], scores[:100], np.array([0.9, 0.1]))
    np.testing.assert_allclose(shares[:, 0] / shares[:, 1], 9 * found[:, 0] / found[:, 1])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Younger.", "younger"),
        ("This person is the older one", "the older"),
        ("younger or the older", None),
        ("youngers", None),
        ("", None),
    ],
)
def test_an_answer_names_one_choice(text: str, expected: str | None) -> None:
    assert parse_answer(GROUP, text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("34 years", 34), ("about 34.5.", 34.5), ("between 30 and 40", None), ("7", None), ("old", None), ("x34", None)],
)
def test_an_answer_holds_one_number_in_the_range(text: str, expected: float | None) -> None:
    assert parse_answer(AGE, text) == expected


def test_embeddings_of_scans_do_not_depend_on_longer_ones_beside_them(llama) -> None:
    together = embed_scans(llama, SCANS)
    alone = np.concatenate([embed_scans(llama, [codes]) for codes in SCANS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_every_scan_is_asked_about_before_any_again() -> None:
    codes = [np.array([[row, row]]) for row in range(3)]
    rows = task_rows(GROUP, codes, ["younger", "the older", "younger"], 6, seed=0)
    asked = [row["codes"][0][0] for row in rows]
    assert sorted(asked[:3]) == sorted(asked[3:]) == [0, 1, 2]
    answers = {row["codes"][0][0]: row["messages"][1]["content"][0]["text"] for row in rows}
    assert answers == {0: "younger", 1: "the older", 2: "younger"}


@pytest.mark.parametrize("rank", [4, None])
def test_tuning_learns_the_answers_and_leaves_the_model_as_it_was(llama, processor, rank: int | None) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    codes, answers = [scan[None] for scan in SCANS[:2]], ["younger", "the older"]
    tuned = tune(llama, processor, GROUP, codes, answers, Tuning(30, 60, 4, 2e-2, rank), seed=0)
    words = [*answers, "person", "scan", "default"]
    untuned, learned = (
        np.exp(score_scans(each, processor, GROUP.questions[0], words, SCANS[:2]))[:, :2].sum(1)
        for each in (llama, tuned)
    )
    assert (untuned < 0.1).all() and (learned > 0.7).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_labelled_scans_are_those_of_their_rows(cohort, llama, processor) -> None:
    scans = load_labelled(cohort, GROUP, processor.feature_extractor, llama.model.codec)
    assert len(scans) == 24 and scans.unlabelled == 0
    assert sorted(scans.subjects)[:2] == ["planted-00000", "planted-00001"]
    assert [GROUP.choice_words[truth] for truth in scans.truth] == scans.answers
    assert scans.answers.count("younger") == 12
    # 20 frames hold one window of 16
    assert all(codes.shape == (1, 8) for codes in scans.codes)
    assert scans.features.shape == (24, 40 * 39 // 2)
    ages = load_labelled(cohort, AGE, processor.feature_extractor, llama.model.codec)
    assert ages.truth.min() >= 20 and ages.answers[0] == f"{ages.truth[0]:.0f}"


def test_the_model_stands_beside_baselines_and_swapped_scans(cohort, saved, tmp_path, monkeypatch) -> None:
    protocol = Protocol(
        shots=(0, 2, FULL),
        draws=2,
        methods=evaluate_program.METHODS,
        **NEW,
        tuning=Tuning(1),
    )
    output = tmp_path / "results"
    results = evaluate(saved, cohort, write_task(GROUP, tmp_path), output, protocol)
    found = {(entry["method"], entry["shots"], entry["variant"]): entry for entry in results["methods"]}
    for method in ("tuned", "probe", "connectivity", "majority"):
        assert found[method, 2, ""]["draws"] == 2 and found[method, FULL, ""]["draws"] == 1
    assert found["context", 2, ""]["draws"] == 2 and ("context", FULL, "") not in found
    assert found["zero-shot", 0, "uncalibrated"]["rows"] == 8
    for entry in results["methods"]:
        right = entry["metrics"]["right"]
        assert set(right) == {"accuracy", "balanced_accuracy", "f1", "roc_auc", "calibration_error"}
        assert {"swapped", "right minus swapped"} <= set(entry["metrics"])
        assert np.mean(entry["by_draw"]["roc_auc"]) == pytest.approx(right["roc_auc"]["value"])
    assert found["majority", FULL, ""]["metrics"]["right"]["balanced_accuracy"]["value"] == 0.5
    # nothing but totals: nobody's answer, and no name
    assert "planted-0" not in (output / "results.json").read_text() + (output / "results.csv").read_text()
    table = pd.read_csv(output / "results.csv")
    assert set(table.reading) == {"right", "swapped", "right minus swapped", "minus connectivity"}
    assert (output / "metrics.png").stat().st_size > 5000 and (output / "calibration.png").stat().st_size > 5000

    # stopped and called again, it asks nothing a second time
    monkeypatch.setattr(evaluate_program, "tune", None)
    (output / "results.json").unlink()
    assert evaluate(saved, cohort, write_task(GROUP, tmp_path), output, protocol) == results
    with pytest.raises(ValueError, match="another protocol"):
        evaluate(saved, cohort, write_task(GROUP, tmp_path), output, Protocol(seed=1))

    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    add_to_card(card, results)
    add_to_card(card, results)
    entries = ModelCard.load(card).data.eval_results
    assert len(entries) == len({(e.task_name, e.dataset_config, e.metric_type) for e in entries})
    tuned = [e for e in entries if e.dataset_config == "tuned-full" and e.metric_type == "roc_auc"]
    assert tuned[0].metric_value == round(found["tuned", FULL, ""]["metrics"]["right"]["roc_auc"]["value"], 4)
    assert tuned[0].metric_args["interval_95"]


def test_ages_are_answered_in_words_and_failures_counted(cohort, saved, tmp_path, monkeypatch) -> None:
    said = iter(["34 years", "no idea", "between 20 and 40", *["50"] * 100])
    monkeypatch.setattr(evaluate_program, "answer_scans", lambda *args: [next(said) for _ in args[-1]])
    protocol = Protocol(shots=(0,), methods=("zero-shot", "connectivity", "majority"), **NEW)
    results = evaluate(saved, cohort, write_task(AGE, tmp_path), tmp_path / "ages", protocol)
    found = {entry["method"]: entry for entry in results["methods"]}
    assert found["zero-shot"]["parse_failures"] == 2
    assert set(found["zero-shot"]["metrics"]["right"]) == {"mean_absolute_error", "pearson_r"}
    # the baselines that know all labels stand beside a model that knows none
    assert found["connectivity"]["shots"] == found["majority"]["shots"] == FULL
    assert found["majority"]["metrics"]["right"]["pearson_r"]["value"] is None


def test_open_answers_count_failures_as_wrong(cohort, saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate_program, "answer_scans", lambda *args: ["hm" for _ in args[-1]])
    protocol = Protocol(shots=(0,), methods=("zero-shot",), open_ended=True, **NEW)
    (entry,) = evaluate(saved, cohort, write_task(GROUP, tmp_path), tmp_path / "open", protocol)["methods"]
    assert entry["parse_failures"] == entry["rows"] == 8
    assert entry["metrics"]["right"]["accuracy"]["value"] == 0 and "roc_auc" not in entry["metrics"]["right"]


def test_every_subject_is_tested_once_in_a_cross_validation(cohort, saved, tmp_path) -> None:
    protocol = Protocol(shots=(FULL,), methods=("connectivity", "majority"), folds=3, new_people=True)
    results = evaluate(saved, cohort, write_task(GROUP, tmp_path), tmp_path / "folds", protocol)
    assert results["data"]["test_subjects"] == [8, 8, 8] and results["methods"][0]["rows"] == 24
    assert json.loads((tmp_path / "folds" / "results.json").read_text()) == results


def test_people_who_may_have_been_trained_on_are_not_tested(cohort, saved, tmp_path) -> None:
    protocol = Protocol(shots=(FULL,), methods=("majority",))
    results = evaluate(saved, cohort, write_task(GROUP, tmp_path), tmp_path / "known", protocol)
    away = held_out_people(f"planted-{number:05}" for number in range(24))
    assert results["data"]["test_subjects"] == [len(away)] and 1 < len(away) < 8
    for changes in ({"folds": 3}, {"test_share": 0.3}):
        with pytest.raises(ValueError, match="test_share of at most 0.2.*new_people"):
            Protocol(**changes)


def test_unknown_methods_and_shots_are_refused() -> None:
    with pytest.raises(ValueError, match="expected methods of zero-shot.*got vibes"):
        Protocol(methods=("vibes",))
    with pytest.raises(ValueError, match="expected shots of 0"):
        Protocol(shots=(-1,))


def test_written_task_is_the_task(tmp_path) -> None:
    assert load_task(write_task(GROUP, tmp_path)) == GROUP


def test_command_prints_the_metrics_and_names_what_is_wrong(cohort, saved, tmp_path) -> None:
    task = write_task(GROUP, tmp_path)
    arguments = ["evaluate", str(saved), str(cohort), "--task", task, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--shots", "full", "--methods", "connectivity, majority"])
    assert done.exit_code == 0 and "balanced_accuracy" in done.output and "swapped" in done.output, done.output
    failed = CliRunner().invoke(app, [*arguments, "--shots", "some"])
    assert failed.exit_code == 1 and "expected shots of 0" in failed.output
