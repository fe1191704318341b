"""The fmrilm command: what it prints for people and for programs, how it fails, what it forwards."""

import contextlib
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import logging
from typer.testing import CliRunner, Result

import fmrilm
from fmrilm.training.cli.main import app
from fmrilm.training.cli.options import WAIT_VARIABLES, let_threads_sleep
from fmrilm.training.cli.read import QUESTIONS


QUESTION, CHOICES = "Is this person older?", ["yes", "no", "maybe so"]
OPTIONS, WORDS = {"tr": 2.0, "atlas": "tiny"}, ("--tr", "2", "--atlas", "tiny")


@pytest.fixture(autouse=True)
def no_progress() -> Iterator[None]:
    """As in a process of its own, where the command says so before anything is imported."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def read(folder: Path, command: str, scan: Path, *words: str) -> Result:
    return run(command, scan, *words, "--model", folder, *WORDS, "--device", "cpu")


def test_ask_prints_answers_and_probabilities(model_folder: Path, scan_file: Path) -> None:
    expected = fmrilm.load(model_folder, "cpu").ask(scan_file, QUESTION, CHOICES, **OPTIONS)
    printed = read(model_folder, "ask", scan_file, QUESTION, "--choices", "yes, no,maybe so")
    lines = printed.stdout.splitlines()
    assert printed.exit_code == 0 and lines[0] == expected["answer"]
    assert lines[1:-1] == [f"{value:7.1%}  {choice}" for choice, value in expected["probabilities"].items()]
    window = expected["window"]
    assert lines[-1].startswith(f"read: {window['start']:g} to {window['stop']:g} s") and "5 ROIs of tiny" in lines[-1]
    found = json.loads(read(model_folder, "ask", scan_file, QUESTION, "--choices", ",".join(CHOICES), "--json").stdout)
    assert list(found.pop("seconds")) == ["import", "load", "answer"]
    assert found == {"scan": str(scan_file), "question": QUESTION, **expected}


def test_words_are_printed_as_the_model_says_them(model_folder: Path, scan_file: Path) -> None:
    reader = fmrilm.load(model_folder, "cpu")
    # half of the vocabulary ends an answer, so that it is short
    reader.model.generation_config.eos_token_id = list(range(0, 400, 2))
    reader.model.save_pretrained(model_folder)
    answer, description = reader.ask(scan_file, QUESTION, **OPTIONS)["answer"], reader.describe(scan_file, **OPTIONS)
    assert read(model_folder, "ask", scan_file, QUESTION).stdout == f"{answer}\n"
    assert json.loads(read(model_folder, "ask", scan_file, QUESTION, "--json").stdout)["answer"] == answer
    assert read(model_folder, "describe-scan", scan_file).stdout == f"{description}\n"
    found = json.loads(read(model_folder, "describe-scan", scan_file, "--json").stdout)
    assert (found["description"], found["window"]["stop"]) == (description, 32)


def test_forecast_is_a_table_that_can_be_read_again(model_folder: Path, scan_file: Path, signal: np.ndarray) -> None:
    signal[:, 2] = np.nan
    np.save(scan_file, signal)
    expected = fmrilm.load(model_folder, "cpu").forecast(scan_file, 12.0, **OPTIONS)
    header, *rows = csv.reader(read(model_folder, "forecast", scan_file, "--seconds", "12").stdout.splitlines())
    assert header == [f"tiny_{roi}" for roi in range(5)]
    table = np.array([[float(cell or "nan") for cell in row] for row in rows], dtype=np.float32)
    assert np.allclose(table, expected, rtol=1e-6, equal_nan=True)
    found = json.loads(read(model_folder, "forecast", scan_file, "--seconds", "12", "--json").stdout)
    assert found["rois"] == header and found["repetition_time"] == 2.0
    assert np.allclose(np.array(found["signal"], dtype=np.float32), table, equal_nan=True)


def test_bad_input_is_one_line_and_a_hint(model_folder: Path, scan_file: Path) -> None:
    failed = run("ask", scan_file, QUESTION, "--model", model_folder)
    assert (failed.exit_code, failed.stdout) == (1, "")
    error, hint = failed.stderr.splitlines()
    assert error.startswith("error: scan.npy: the scan's repetition time is not known")
    assert error.endswith("give it in seconds (tr=..., or --tr)")
    assert hint.startswith("hint: ") and "ask --help` describes" in hint and "--debug ask" in hint
    with pytest.raises(ValueError, match="repetition time is not known"):
        raise run("--debug", "ask", scan_file, QUESTION, "--model", model_folder).exception


def test_empty_questions_and_choices_are_refused(model_folder: Path, scan_file: Path) -> None:
    refused = run("ask", scan_file, " ")
    assert refused.exit_code == 2 and "expected a question about the scan" in refused.stderr
    failed = run("ask", scan_file, QUESTION, "--choices", "low,,high", "--model", model_folder, *WORDS)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: expected choices that are not empty, got ['low', '', 'high']")


def test_unforeseen_failures_and_missing_packages_are_one_line_too(scan_file: Path, monkeypatch) -> None:
    def fail(error: BaseException) -> Result:
        monkeypatch.setattr(fmrilm.scan_reader, "load", Mock(side_effect=error))
        return run("ask", scan_file, QUESTION)

    failed = fail(RuntimeError("CUDA\n  out of   memory"))
    assert failed.exit_code == 1 and failed.stderr.splitlines()[0] == "error: CUDA out of memory"
    assert len(failed.stderr.splitlines()) == 2
    failed = fail(ModuleNotFoundError("No module named 'trl'"))
    assert failed.exit_code == 1 and "pip install 'fmri-lm[train]'" in failed.stderr.splitlines()[1]
    assert fail(KeyError()).stderr.startswith("error: KeyError\n")
    assert fail(KeyboardInterrupt()).exit_code == 130


def test_wrong_usage_has_a_code_of_its_own(tmp_path: Path) -> None:
    assert run("ask", tmp_path / "nowhere.npy", QUESTION).exit_code == 2
    assert run("ask").exit_code == 2
    assert run("train", "codec", "--config", tmp_path / "nowhere.yaml").exit_code == 2


def test_info_tells_versions_and_devices() -> None:
    found = json.loads(run("info", "--json").stdout)
    assert found["packages"]["torch"].startswith("2.") and "fmri-lm" not in found["packages"]
    assert found["program"]["python"] == ".".join(map(str, sys.version_info[:3])) and "cpu" in found["devices"]
    assert "devices" in run("info").stdout.splitlines()


def test_info_describes_a_model_folder(model_folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("info", model_folder, "--json").stdout)
    assert found["model"] == {"stage": "2 or 3 (codec and language model)", "language model": "llama", "scores": 2}
    assert (found["codec"]["num_quantizers"], found["codec"]["codebook_size"]) == (3, 16)
    assert found["atlases"] == {"tiny": "5 ROIs"}
    assert "  tiny                      5 ROIs" in run("info", model_folder).stdout.splitlines()
    failed = run("info", tmp_path)
    assert failed.exit_code == 1 and "got none; there is one in its folder model/" in failed.stderr


def test_info_names_stages_data_and_figures(model_folder: Path, make_codec, extractor) -> None:
    cohort = {"subjects": 10, "windows": 90}
    (model_folder / "cohort.json").write_text(json.dumps(cohort))
    data = {"test_subjects": [2, 3], "scans": 17, "terms": {"hcp": "its own"}}
    written = {"run": {"seconds": {"codec": 90.0, "total": 120.0}}, "data": data}
    (model_folder.parent / "results.json").write_text(json.dumps(written))
    figure = EvalResult(
        "any-to-any", "held-out-subjects", "5 held-out subjects", "accuracy", 0.0, metric_name="accuracy"
    )
    card = ModelCardData(model_name="tiny", eval_results=[figure]).to_yaml()
    (model_folder / "README.md").write_text(f"---\n{card}\n---\n")
    found = json.loads(run("info", model_folder, "--json").stdout)
    assert found["stages"] == {"codec": "1.5 minutes", "total": "2.0 minutes"}
    counts = {"training subjects": 10, "training windows": 90, "held-out subjects": 5, "scans": 17}
    assert found["data"] == {**counts, "hcp": "its own"}
    assert found["results"] == {"5 held-out subjects, accuracy": 0.0}
    assert "  5 held-out subjects, accuracy  0.0" in run("info", model_folder).stdout.splitlines()
    # a codec has figures beside it and no card
    codec = model_folder.parent / "codec"
    make_codec().save_pretrained(codec / "model")
    (codec / "results.json").write_text(json.dumps({"r_squared": 0.5, "codebook_usage": [1.0]}))
    found = json.loads(run("info", codec / "model", "--json").stdout)
    assert (found["model"], found["results"]) == ({"stage": "1 (codec)"}, {"held-out scans, r_squared": 0.5})


def test_missing_model_comes_with_the_way_to_get_one(scan_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for words in (["evaluate", "runs/model", "."], ["info", "runs/model"], ["export", "runs/model", "out"]):
        refused = run(*words)
        assert refused.exit_code == 2
        assert "got runs/model, which is none: `fmrilm demo` makes a model" in refused.stderr
    failed = run("ask", scan_file, QUESTION, "--tr", "2")
    assert failed.exit_code == 1
    assert "got runs/demo/model, which is neither: `fmrilm demo` makes a model in runs/demo/model" in failed.stderr
    unreachable = Mock(side_effect=OSError("no repository of that name"))
    monkeypatch.setattr("fmrilm.scan_reader.FmriLMConfig.get_config_dict", unreachable)
    failed = run("ask", scan_file, QUESTION, "--tr", "2", "--model", "me/model")
    expected = "got me/model, which is no folder (`fmrilm demo` makes a model in runs/demo/model): no repository"
    assert expected in failed.stderr


def test_shell_completion_is_offered() -> None:
    assert "--install-completion" in run("--help").stdout
    command = [str(Path(sys.executable).with_name("fmrilm"))]
    asked = {"_FMRILM_COMPLETE": "complete_bash", "COMP_WORDS": "fmrilm fore", "COMP_CWORD": "1"}
    found = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["forecast"]


def test_commands_that_write_files_say_so_as_json(
    model_folder: Path, scan_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, written = ["--question", QUESTION, "--output", "o.html", "--json"], []

    def write(path: Path, reader, scan, asked: dict, title: str, **_) -> None:
        path.touch()
        written.append((asked, title))

    # the page itself has tests of its own
    with monkeypatch.context() as patch:
        patch.setattr("fmrilm.training.report.scan_report.write_scan_report", write)
        found = json.loads(read(model_folder, "report", scan_file, *options, "--choices", "yes,no").stdout)
        # answers are known from the question
        read(model_folder, "report", scan_file, "--question", QUESTIONS[0], "--question", QUESTION)
    assert found == {"scan": str(scan_file), "output": "o.html", "questions": [QUESTION]} and Path("o.html").exists()
    known = {QUESTIONS[0]: ("low", "typical", "high"), QUESTION: None}
    # the page does not name the file
    assert written == [({QUESTION: ["yes", "no"]}, "One scan"), (known, "One scan")]
    found = json.loads(run("export", model_folder, tmp_path / "plain", "--json").stdout)
    assert found["output"] == str(tmp_path / "plain") and "config.json" in found["files"]

    def demo(output: Path, quick: bool, seed: int) -> dict:
        print("== preparing")
        return {"settings": {"quick": quick}}

    monkeypatch.setattr("fmrilm.training.demo.run_demo", demo)
    printed = run("demo", "--quick", "--output", tmp_path, "--json")
    assert json.loads(printed.stdout) == {"output": str(tmp_path), "settings": {"quick": True}}
    assert "== preparing" in printed.stderr


def test_threads_sleep_while_they_wait_unless_the_user_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("words, status", [(["--version"], 0), (["info", "nowhere"], 2), (["info", "."], 1)])
def test_process_ends_with_the_status_of_its_command(words: list[str], status: int, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("fmrilm")), *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, bool(ended.stderr)) == (status, status != 0)
    assert ended.stdout == ("" if status else f"fmri-lm {version('fmri-lm')}\n")


def read_terminal(descriptor: int) -> str:
    """All that is written to a pseudo-terminal until its other end is closed, which then fails to be read."""
    pieces = []
    with contextlib.suppress(OSError), open(descriptor, "rb", buffering=0) as terminal:
        while piece := terminal.read(4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_progress_shows_on_a_terminal_alone(model_folder: Path, scan_file: Path) -> None:
    words = ["ask", scan_file, QUESTION, "--choices", "yes,no", "--model", model_folder, *WORDS]
    command = [str(Path(sys.executable).with_name("fmrilm")), *map(str, words)]
    ours, theirs = os.openpty()
    with ThreadPoolExecutor(1) as pool:
        # read while it writes: what a terminal does not take in, its writer waits for
        reading = pool.submit(read_terminal, ours)
        try:
            on_terminal = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
        finally:
            os.close(theirs)
        assert "opening" in reading.result()
    captured = run(*words)
    assert captured.stderr == "" and captured.stdout == on_terminal.stdout
