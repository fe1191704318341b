"""The quick demo, once, with the real scans and the real language model, and what it leaves behind."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fmrilm.training import demo
from fmrilm.training.cli.main import app
from fmrilm.training.data.splits import held_out_subjects
from fmrilm.training.demo import run_demo
from fmrilm.training.hub.model_card import read_card
from fmrilm.training.hub.push import find_problems


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo, with the real scans and the real language model. To be read alone."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    run_demo(folder, quick=True)
    return folder


@pytest.fixture(scope="module")
def results(quick_demo: Path) -> dict:
    return json.loads((quick_demo / "results.json").read_text())


@pytest.fixture(scope="module")
def subjects(quick_demo: Path) -> set[str]:
    with open(quick_demo / "scans" / "manifest.csv", newline="") as handle:
        return {row["subject"] for row in csv.DictReader(handle)}


def test_run_leaves_its_stages_model_results_and_report(quick_demo: Path) -> None:
    folders = {"scans", "prepared", "corpus", "codec", "model", "evaluation"}
    assert {path.name for path in quick_demo.iterdir()} == {*folders, "results.json", "report.html"}
    assert {path.name for path in quick_demo.parent.iterdir()} == {"run"}
    assert (quick_demo / "model" / "model.safetensors").stat().st_size > 400e6
    parcels = {path.stem for path in (quick_demo / "model" / "atlases").iterdir()}
    assert parcels == {"aal2-94", "schaefer-100-7networks", "schaefer-400-7networks"}


def test_results_are_about_the_held_out_subjects(results: dict, subjects: set[str]) -> None:
    held_out = held_out_subjects(subjects)
    assert results["data"]["training_subjects"] == [len(subjects) - len(held_out)]
    assert results["data"]["test_subjects"] == [len(held_out)]
    assert len({answer["subject"] for answer in results["descriptors"]["answers"]}) <= len(held_out)
    families = results["descriptors"]["families"]
    assert set(families) == {"connectivity", "strength", "autocorrelation", "all"}
    for family in families.values():
        interval = family["difference"]["interval"]
        assert family["beats_shuffled"] == (interval is not None and interval[0] > 0)
        assert all(0 <= family[condition]["accuracy"] <= 1 for condition in ("right", "shuffled", "majority"))


def test_no_identifier_of_a_subject_is_written(quick_demo: Path, subjects: set[str]) -> None:
    for path in (quick_demo / "results.json", quick_demo / "report.html", *(quick_demo / "model").glob("*.[jm]*")):
        assert not [name for name in subjects if name.encode() in path.read_bytes()], path.name


def test_finished_run_is_not_repeated(quick_demo: Path, capsys: pytest.CaptureFixture) -> None:
    before = (quick_demo / "results.json").stat().st_mtime_ns
    run_demo(quick_demo, quick=True)
    assert "holds a finished run" in capsys.readouterr().out
    assert (quick_demo / "results.json").stat().st_mtime_ns == before


def test_folder_with_anything_else_is_left_as_it_is(quick_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder, quick in ((tmp_path, True), (quick_demo, False)):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match="--output"):
            run_demo(folder, quick=quick)
        assert sorted(folder.rglob("*")) == before


def test_seed_of_the_command_reaches_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = {}
    monkeypatch.setattr(demo, "write_open_scans", lambda folder: folder)
    for name in ("find_scans", "prepare", "load_source"):
        monkeypatch.setattr(demo, name, lambda *arguments: None)
    monkeypatch.setattr(demo, "describe_dataset", lambda *arguments: taken.update(corpus=arguments[2].seed))
    monkeypatch.setattr(demo, "train_stage", lambda *arguments: taken.update({arguments[1]: arguments[3:5]}))
    monkeypatch.setattr(demo.shutil, "move", lambda *arguments: None)

    def stop(*arguments, settings, **options) -> None:
        taken["evaluation"] = settings.seed
        raise ValueError("enough")

    monkeypatch.setattr(demo, "evaluate", stop)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "run"), "--quick", "--seed", "7"])
    assert "enough" in result.output
    stages = dict.fromkeys(("codec", "alignment", "sft"), ("--seed", "7"))
    assert taken == {"corpus": 7, "evaluation": 7, **stages}


def test_card_of_the_model_states_what_was_measured(quick_demo: Path, results: dict) -> None:
    card = read_card(quick_demo / "model" / "README.md")
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "learned next to nothing" in card.text
    families = results["descriptors"]["families"]
    accuracies = [result for result in card.data.eval_results if result.metric_type == "balanced_accuracy"]
    expected = {f"descriptors, {name}, zero-shot": each["right"]["accuracy"] for name, each in families.items()}
    found = {result.dataset_config: result.metric_value for result in accuracies}
    assert found == pytest.approx(expected, abs=1e-4)
    assert not list(find_problems(quick_demo / "model"))
