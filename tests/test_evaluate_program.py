"""A model is evaluated on subjects it never learned from, beside baselines and a subject-shuffled control."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from evaluation_data import AGE, AGE_GROUP, GROUP, SUBJECTS, build_model, encoded, save_model, write_cohort
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fmrilm.training.cli.main import app
from fmrilm.training.data.splits import SplitArguments, held_out_subjects
from fmrilm.training.data.tasks import Task, load_task, with_columns
from fmrilm.training.evaluation import program
from fmrilm.training.evaluation.ask import score_windows
from fmrilm.training.evaluation.program import EvaluationSettings, evaluate
from fmrilm.training.evaluation.report import add_to_card, table
from fmrilm.training.evaluation.results import FULL
from fmrilm.training.evaluation.tuning import Tuning, tune


FEW = EvaluationSettings(conditions=("zero-shot", "majority"), described=0)


def write_task(task: Task, folder) -> str:
    values = {name: value for name, value in asdict(task).items() if value}
    if task.cuts:
        values["choices"] = list(task.choices)
    path = folder / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory):
    return write_cohort(tmp_path_factory.mktemp("data") / "cohort")


@pytest.fixture
def model(make_codec, make_language_model, processor):
    return build_model(make_codec(), make_language_model("llama", len(processor.tokenizer) - 4), processor)


@pytest.fixture
def saved(model, processor, tmp_path):
    return save_model(model, processor, tmp_path / "model")


@pytest.fixture
def tasks(tmp_path) -> list[str]:
    return [write_task(task, tmp_path) for task in (GROUP, AGE, AGE_GROUP)]


def entry_of(results: dict, task: Task, *key) -> dict:
    entries = results["tasks"][task.name]["conditions"]
    return next(each for each in entries if (each["condition"], each["shots"], each["variant"]) == key)


def test_written_tasks_are_the_tasks(tasks) -> None:
    assert [load_task(path) for path in tasks] == [GROUP, AGE, AGE_GROUP]


def test_several_tasks_and_descriptors_in_one_report(cohort, saved, tasks, tmp_path, monkeypatch) -> None:
    settings = replace(EvaluationSettings.quick(), shots=(0, 2, FULL), resamples=2, tuning=Tuning(1))
    settings = replace(settings, conditions=program.CONDITIONS, window_stride=None)
    arguments = {"folds": 2, "new_subjects": True, "settings": settings}
    output = tmp_path / "results"
    results = evaluate(saved, cohort, output, tasks, descriptors=True, **arguments)
    for condition in ("tuned", "probe", "fc_ridge", "tangent_ridge", "codes_ridge", "covariates", "majority"):
        assert entry_of(results, GROUP, condition, 2, "")["resamples"] == 2
        entry = entry_of(results, GROUP, condition, FULL, "")
        assert entry["resamples"] == 1 and entry["scans"] == SUBJECTS
        # numbers have no classes to draw subjects from
        of_numbers = entry_of(results, AGE, condition, FULL, "")["metrics"]["right"]
        assert of_numbers.keys() == {"mean_absolute_error", "pearson_r"}
    zero = entry_of(results, GROUP, "zero-shot", 0, "")["metrics"]
    assert set(zero) == {"right", "shuffled", "minus shuffled", *(f"minus {name}" for name in program.BASELINES)}
    of_classes = {"accuracy", "balanced_accuracy", "f1", "roc_auc", "within_site_auc", "calibration_error"}
    assert zero["right"].keys() == of_classes
    assert entry_of(results, GROUP, "few-shot", 2, "")["resamples"] == 2
    # half of the ROIs have a series in common in one group
    for baseline in ("fc_ridge", "tangent_ridge"):
        assert entry_of(results, GROUP, baseline, FULL, "")["metrics"]["right"]["roc_auc"]["value"] > 0.9
    assert entry_of(results, AGE, "fc_ridge", FULL, "")["metrics"]["right"]["pearson_r"]["value"] > 0.7
    shuffled = entry_of(results, GROUP, "fc_ridge", FULL, "")["metrics"]["shuffled"]["roc_auc"]["value"]
    assert 0.1 < shuffled < 0.9
    majority = entry_of(results, GROUP, "majority", FULL, "")["metrics"]["right"]
    assert majority["balanced_accuracy"]["value"] == 0.5
    # by expected value, answers of a number and of its ranges stand beside baselines of the number
    for task in (AGE, AGE_GROUP):
        expected = entry_of(results, task, "zero-shot", 0, "expected value")["metrics"]
        assert "pearson_r" in expected["right"] and "pearson_r" in expected["minus fc_ridge"]

    families = results["descriptors"]["families"]
    assert families["all"]["questions"] == 2 * SUBJECTS * (len(families) - 1)
    assert results["codec"]["r_squared"]["value"] is not None
    # nothing but totals: nobody's answer, and no name
    assert "made-up-0" not in (output / "results.json").read_text() + (output / "results.csv").read_text()
    assert (output / "results.png").stat().st_size > 5000
    rows = pd.read_csv(output / "results.csv")
    assert {"made_up_group", "made_up_age", "descriptors, all"} <= set(rows.task)

    # stopped and called again, it asks nothing a second time
    monkeypatch.setattr(program, "tune", None)
    monkeypatch.setattr(program.descriptor_questions, "ask_descriptors", None)
    (output / "results.json").unlink()
    assert evaluate(saved, cohort, output, tasks, descriptors=True, **arguments) == results
    with pytest.raises(ValueError, match="other settings, split"):
        evaluate(saved, cohort, output, tasks, descriptors=True, **{**arguments, "folds": 3})
    # nor does it take the answers of one model for those of another in its place
    other = shutil.copytree(saved, tmp_path / "trained anew")
    evaluate(other, cohort, tmp_path / "anew", tasks[:1], settings=FEW)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="other settings, weights"):
        evaluate(other, cohort, tmp_path / "anew", tasks[:1], settings=FEW)

    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    add_to_card(card, results)
    add_to_card(card, results)
    entries = ModelCard.load(card).data.eval_results
    names = [(e.dataset_config, e.metric_type) for e in entries]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
    shown = {(e.dataset_config, e.metric_type): e.metric_value for e in entries}
    found = entry_of(results, GROUP, "tuned", FULL, "")["metrics"]["right"]["roc_auc"]
    assert shown["made_up_group, tuned, full", "roc_auc"] == round(found["value"], 4)
    add_to_card(card, {**results, "data": {**results["data"], "dataset": "another"}})
    both = [(e.dataset_name, e.dataset_config, e.metric_type) for e in ModelCard.load(card).data.eval_results]
    assert len(set(both)) == len(both) == 2 * len(names)


def test_single_answers_are_shown_under_pseudonyms(cohort, saved, tmp_path) -> None:
    quick = EvaluationSettings.quick()
    results = evaluate(saved, cohort, tmp_path / "out", descriptors=True, settings=quick, show=True)
    shown = results["descriptors"]["answers"]
    tested = held_out_subjects(f"made-up-{row:03d}" for row in range(SUBJECTS))
    assert {answer["subject"] for answer in shown} == {each["subject"] for each in results["codec"]["subjects"]}
    assert len({answer["subject"] for answer in shown}) == len(tested)
    for answer in shown:
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert answer["answer"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert len(results["descriptors"]["descriptions"]["examples"]) == 2
    assert "made-up-0" not in json.dumps(results)


def test_numbers_are_parsed_and_failures_counted(cohort, saved, tasks, tmp_path, monkeypatch) -> None:
    given = iter(["34 years", "no idea", "between 20 and 40", *["50"] * 1000])
    monkeypatch.setattr(program, "answer_windows", lambda *args: [next(given) for _ in args[2]])
    # one window a scan
    settings = replace(FEW, window_stride=100)
    results = evaluate(saved, cohort, tmp_path / "ages", tasks[1:2], settings=settings)
    entry = entry_of(results, AGE, "zero-shot", 0, "")
    assert entry["parse_failures"] == entry["scans"] - 1
    assert entry_of(results, AGE, "majority", FULL, "")["metrics"]["right"]["pearson_r"]["value"] is None


def test_held_out_subjects_are_those_of_every_program(cohort, saved, tasks, tmp_path) -> None:
    def counts(folder: str, **arguments) -> tuple[list[int], list[int]]:
        data = evaluate(saved, cohort, tmp_path / folder, tasks[:1], settings=FEW, **arguments)["data"]
        return data["test_subjects"], data["training_subjects"]

    everyone = [f"made-up-{row:03d}" for row in range(SUBJECTS)]
    assert counts("hash")[0] == [len(held_out_subjects(everyone))]
    splits = tmp_path / "splits.csv"
    lines = [f"{name},{'test' if name[-1] in '01' else 'train'}\n" for name in everyone]
    splits.write_text("".join(["subject,split\n", *lines]))
    of_file, each_site = SplitArguments(splits=str(splits)), SplitArguments(leave_out="site")
    assert counts("file", split=of_file) == ([6], [18])
    assert counts("one", split=SplitArguments(leave_out="site=site 1"))[0] == [12]
    assert counts("each", split=each_site, new_subjects=True)[0] == [12, 12]
    with pytest.raises(ValueError, match="expected no folds.*new_subjects"):
        counts("trained", split=each_site)
    splits.write_text("".join(["subject,split\n", *lines, "made-up-001,train\n"]))
    with pytest.raises(ValueError, match="each subject in one split, got in both: made-up-001"):
        counts("two", split=of_file)


def test_a_site_of_one_class_is_named_and_left_out_of_the_auc_within_sites(saved, tasks, tmp_path) -> None:
    groups = ["a" if row // 2 % 2 else "ab"[row % 2] for row in range(SUBJECTS)]
    cohort = write_cohort(tmp_path / "one-class", group=groups)
    arguments = {"folds": 3, "new_subjects": True, "settings": replace(FEW, conditions=("fc_ridge",))}
    results = evaluate(saved, cohort, tmp_path / "out", tasks[:1], **arguments)["tasks"][GROUP.name]
    assert results["sites_of_one_class"] == {"site 1": "only 'younger' in 12 test scans"}
    assert results["conditions"][0]["metrics"]["right"]["within_site_auc"]["value"] is not None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"group": ["x", *"ab" * 11, "b"]}, "expected one of a, b, got 'x' in row 0"),
        ({"group": ["a"] * 24}, "only 'younger'"),
    ],
)
def test_unusable_labels_are_refused_before_anything_is_written(saved, tasks, tmp_path, labels, message) -> None:
    cohort = write_cohort(tmp_path / "labels", **labels)
    with pytest.raises(ValueError, match=message):
        evaluate(saved, cohort, tmp_path / "out", tasks[:1], settings=FEW)
    assert not (tmp_path / "out" / "answers").exists() and not (tmp_path / "out" / "results.json").exists()


def test_folds_take_subjects_of_several_sites_and_labels_that_some_scans_lack() -> None:
    rows = {"subject": np.repeat([f"sub-{number}" for number in range(10)], 2), "sex": [*"MMFF" * 5]}
    for more in ({"site": ["second", "first"] * 10}, {"sex": [None, "M", None, "F", *"MMFF" * 4]}):
        scans: Any = SimpleNamespace(table=pd.DataFrame(rows | more))
        splits = program.make_splits(scans, SplitArguments(), 2, True, [load_task("sex")], 0)
        assert sorted(np.concatenate([split.test for split in splits])) == list(range(20))
        for split in splits:
            assert not set(rows["subject"][split.training]) & set(rows["subject"][split.test])


def test_conditions_without_anything_to_ask_are_refused(tmp_path) -> None:
    settings = EvaluationSettings(conditions=("few-shot", "tuned"))
    with pytest.raises(ValueError, match="expected conditions that ask something.*got few-shot, tuned"):
        evaluate(tmp_path, tmp_path, tmp_path / "out", ["sex"], settings=settings)


def test_unknown_conditions_shots_and_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="expected conditions of zero-shot.*got vibes"):
        EvaluationSettings(conditions=("vibes",))
    with pytest.raises(ValueError, match="expected shots of 0"):
        EvaluationSettings(shots=(-1,))
    assert [task.column for task in with_columns([GROUP, AGE], ["made_up_age=years"])] == ["group", "years"]
    # another task of the same column, where it may find the name
    groups = replace(AGE_GROUP, other_columns=("years",))
    assert [task.column for task in with_columns([groups, GROUP, AGE], ["made_up_age=years"])] == [
        "years",
        "group",
        "years",
    ]
    per_scan = replace(GROUP, per_session=True, per_scan=True)
    asked = EvaluationSettings((0, 2, FULL), 1, ("zero-shot", "tuned")).asked
    assert [list(asked(task)) for task in (GROUP, per_scan)] == [
        [("zero-shot", 0, 0), ("tuned", 2, 0), ("tuned", FULL, 0)],
        [("zero-shot", 0, 0), ("tuned", FULL, 0)],
    ]
    with pytest.raises(ValueError, match="expected TASK=COLUMN with a task of made_up_group, made_up_age"):
        with_columns([GROUP, AGE], ["diagnosis"])


def test_column_of_the_command_goes_before_all_names_in_the_yaml(cohort, saved, tmp_path) -> None:
    named = replace(GROUP, other_columns=("group",))
    for given in ("diagnosis", "made_up_group=diagnosis"):
        [task] = with_columns([named], [given])
        assert (task.column, task.other_columns) == ("diagnosis", ())
    file = tmp_path / "task.yaml"
    values = {"name": "a_task", "column": "absent", "other_columns": ["group"], "choices": GROUP.choices}
    file.write_text(yaml.safe_dump({**values, "questions": list(GROUP.questions)}))
    assert evaluate(saved, cohort, tmp_path / "yaml", [str(file)], settings=FEW)["tasks"]["a_task"]
    with pytest.raises(ValueError, match="no column 'diagnosis' among"):
        evaluate(saved, cohort, tmp_path / "named", [str(file)], columns=["diagnosis"], settings=FEW)


@pytest.mark.parametrize("rank", [4, None])
def test_tuning_learns_the_answers_and_leaves_the_model_as_it_was(model, processor, rank: int | None) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scans, labels = [[encoded(model, 4, seed)] for seed in range(4)], ["a", "b", "a", "b"]
    subjects = [f"subject {row}" for row in range(4)]
    tuned, own = tune(model, processor, GROUP, scans, labels, subjects, Tuning(40, 4, 2e-2, rank), seed=0)
    windows, words = [windows[0] for windows in scans], [*GROUP.choice_words, "person", "scan", "default"]
    choices = [processor.encode_choices([GROUP.sentence(word) for word in words])]
    untuned, learned = (
        np.exp(score_windows(*each, windows, [GROUP.questions[0]], choices)[0])[:, :2].sum(1)
        for each in ((model, processor), (tuned, own))
    )
    assert (untuned < 0.2).all() and (learned > 0.7).all()
    assert tuned.config.score_names == [*model.config.score_names, "made_up_group=the older"]
    known = [each.config.calibration(GROUP.questions[0], GROUP.choice_words) for each in (model, tuned)]
    assert known[0] is None and known[1]["slope"] > 0
    assert own.summary_tokens == tuned.config.num_summary_tokens > processor.summary_tokens
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tuning_in_closed_form_leaves_the_language_model_as_it_was(model, processor) -> None:
    scans, labels = [[encoded(model, 4, seed)] for seed in range(6)], ["a", "b"] * 3
    subjects = [f"subject {row}" for row in range(6)]
    tuned, own = tune(model, processor, GROUP, scans, labels, subjects, Tuning(0), seed=0)
    name = "made_up_group=the older"
    assert tuned.config.score_names == [*model.config.score_names, name]
    before, after = (dict(each.model.causal_lm.named_parameters()) for each in (model, tuned))
    assert all(torch.equal(after[key], value) for key, value in before.items() if value.shape == after[key].shape)
    assert tuned.config.calibration(GROUP.questions[0], GROUP.choice_words)["slope"] > 0
    assert own.summary_tokens == tuned.config.num_summary_tokens
    of_sessions = replace(GROUP, per_session=True)
    assert tune(model, processor, of_sessions, scans, labels, subjects, Tuning(0), seed=0)[0].config.calibrations
    # a subject who is not among them is read, too
    choices = [own.encode_choices(GROUP.choice_words)]
    assert np.isfinite(score_windows(tuned, own, [encoded(model, 4, 9)], [GROUP.questions[0]], choices)[0]).all()


def test_too_few_subjects_for_the_shots_are_noticed_before_anything_is_asked(cohort, saved, tasks, tmp_path) -> None:
    settings = replace(FEW, conditions=("zero-shot", "majority"), shots=(0, 13))
    with pytest.raises(ValueError, match="at least 13 training subjects with the answer 'younger' for so many shots"):
        evaluate(saved, cohort, tmp_path / "out", tasks[:1], settings=settings)
    assert evaluate(saved, cohort, tmp_path / "out", tasks[:1], settings=replace(settings, shots=(0, 2)))


def test_a_site_of_one_subject_is_not_asked_about_descriptors(saved, tmp_path) -> None:
    sites = [["one", "two"][row % 2] for row in range(SUBJECTS - 1)] + ["alone"]
    data = write_cohort(tmp_path / "sites", site=sites)
    each_site, quick = SplitArguments(leave_out="site"), EvaluationSettings.quick()
    found = evaluate(
        saved, data, tmp_path / "out", descriptors=True, split=each_site, new_subjects=True, settings=quick
    )
    assert found["descriptors"]["families"]["all"]["questions"] > 0 and found["data"]["test_subjects"] == [12, 11, 1]


def test_command_prints_the_metrics_and_names_what_is_wrong(cohort, saved, tasks, tmp_path) -> None:
    arguments = ["evaluate", str(saved), str(cohort), "--task", tasks[0], "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--conditions", "zero-shot, majority"])
    assert done.exit_code == 0 and "balanced_accuracy" in done.output and "shuffled" in done.output, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    more = [*arguments[:-1], str(tmp_path / "half"), "--held-out-share", "0.5", "--conditions", "majority", "--json"]
    found = json.loads(CliRunner().invoke(app, more).stdout)
    assert found["data"]["test_subjects"] > results["data"]["test_subjects"]
    failed = CliRunner().invoke(app, [*arguments, "--shots", "some"])
    assert failed.exit_code == 1 and "expected shots of 0" in failed.output
    failed = CliRunner().invoke(app, arguments[:3])
    assert failed.exit_code == 1 and "tasks or descriptor questions" in failed.output


def test_table_has_a_row_for_each_metric(cohort, saved, tasks, tmp_path) -> None:
    results = evaluate(saved, cohort, tmp_path / "out", tasks[:1], settings=FEW)
    rows = table(results).query("condition == 'zero-shot' and comparison == 'right' and variant == ''")
    bounded = rows[rows.metric != "calibration_error"]
    assert rows.metric.is_unique and (bounded.low <= bounded.high).all() and len(bounded) == len(rows) - 1
