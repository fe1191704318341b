"""What goes to the Hub: folders are refused whole before anything is uploaded, cards say what is known."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.training.alignment.joint import add_lora
from fmrilm.training.cli.main import app
from fmrilm.training.hub import push as publish
from fmrilm.training.hub.model_card import UNKNOWN_REPO, fill_card, read_card
from fmrilm.training.hub.push import find_problems, push
from helpers import evaluation_results


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "tiny"))


@pytest.fixture
def adapter(saved_model: Path, processor, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    add_lora(FmriLMForConditionalGeneration.from_pretrained(saved_model), 2).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").unlink()
    change(folder / "adapter_config.json", base_model_name_or_path="someone/base")
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def forget_atlas(folder: Path) -> None:
    values = json.loads((folder / "processor_config.json").read_text())
    values["feature_extractor"]["atlases"] = []
    (folder / "processor_config.json").write_text(json.dumps(values))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def card(folder: Path, metadata: str) -> None:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n# Tiny\n")


def enormous(path: Path) -> None:
    with open(path, "wb") as handle:
        # takes no place on the disk
        handle.truncate(50 * 10**9 + 1)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected weights in model.safetensors, got none"),
    "half of the weights": (lambda f: truncate(f / "model.safetensors"), "expected whole safetensors"),
    "a shard missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}'),
        "weights that are not there: model-00001.safetensors",
    ),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "expected processor_config.json with an atlas"),
    "no atlas": (forget_atlas, "expected at least one atlas"),
    "a pickle by name": (lambda f: (f / "training_args.bin").touch(), "training_args.bin: expected no pickle"),
    "a pickle by content": (
        lambda f: torch.save({"a": 1}, f / "notes.txt", _use_new_zipfile_serialization=False),
        "notes.txt: expected no pickle",
    ),
    "a pickle named as weights": (
        lambda f: torch.save({"a": 1}, f / "model.safetensors", _use_new_zipfile_serialization=False),
        "model.safetensors: expected no pickle",
    ),
    "a pickle in an archive": (lambda f: torch.save({"a": 1}, f / "notes.dat"), "notes.dat: expected no pickle"),
    "a pickle in an array": (
        lambda f: np.save(f / "codes.npy", np.array([{}], dtype=object), allow_pickle=True),
        "codes.npy: expected no",
    ),
    "a pickle in arrays": (
        lambda f: np.savez(f / "codes.npz", np.array([{}], dtype=object)),
        "codes.npz: expected no pickle",
    ),
    "a pickle in a subfolder": (
        lambda f: ((f / "checkpoint-1").mkdir(), (f / "checkpoint-1" / "optimizer.pt").touch()),
        "checkpoint-1/optimizer.pt: expected no pickle",
    ),
    "labels of subjects": (lambda f: (f / "labels.csv").touch(), "labels.csv: expected what a model consists of"),
    "series of subjects": (
        lambda f: ((f / "codes").mkdir(), np.save(f / "codes" / "0.npy", np.zeros(3))),
        "codes/0.npy: expected what a model consists of",
    ),
    "an evaluation": (lambda f: (f / "settings.json").write_text("{}"), "settings.json: expected what a model"),
    "other code": (lambda f: (f / "setup.py").touch(), "setup.py: expected no Python but"),
    "code in a subfolder": (
        lambda f: ((f / "more").mkdir(), shutil.copy(f / "scan_io_fmrilm.py", f / "more")),
        "more/scan_io_fmrilm.py: expected no",
    ),
    "changed code": (
        lambda f: (f / "scan_io_fmrilm.py").write_text("pass\n"),
        "scan_io_fmrilm.py: expected this version's code",
    ),
    "code missing": (
        lambda f: (f / "modeling_fmricodec.py").unlink(),
        "without modeling_fmricodec.py it does not load",
    ),
    "auto classes missing": (lambda f: change(f / "config.json", auto_map={}), "config.json: expected auto_map"),
    "another model": (lambda f: change(f / "config.json", model_type="llama"), "expected model_type fmrilm, got 'll"),
    "neither model nor adapter": (lambda f: (f / "config.json").unlink(), "got neither"),
    "placeholders may be spoken": (
        lambda f: change(f / "generation_config.json", suppress_tokens=None),
        "expected suppress_tokens with",
    ),
    "broken JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected JSON"),
    "a file too large": (lambda f: enormous(f / "model.dat"), "expected at most 50000000000 bytes"),
    "no licence": (lambda f: card(f, "language: en"), "expected a license that the Hub knows"),
    "another licence without a name": (lambda f: card(f, "license: other"), "expected license_name"),
    "broken YAML": (lambda f: card(f, "license: [mit"), "expected metadata in YAML"),
    "metadata that is no mapping": (lambda f: card(f, "- mit"), "expected metadata in YAML"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_folder_is_refused_before_anything_is_asked(bad: str, folder: Path) -> None:
    spoil, message = BAD[bad]
    spoil(folder)
    # not a dry run: the tests' environment has no Hub, so that a question would be another error
    with pytest.raises(ValueError, match="was not pushed") as error:
        push(folder, "me/tiny")
    assert message in str(error.value)


@pytest.mark.parametrize("base", [None, "", "/somewhere/base", "a/b/c", "base model", "runs/base"])
def test_adapter_without_a_base_on_the_hub_is_refused(base: str | None, adapter: Path, monkeypatch) -> None:
    monkeypatch.chdir(adapter)
    Path("runs/base").mkdir(parents=True)
    change(adapter / "adapter_config.json", base_model_name_or_path=base)
    reason = "which only this machine has" if base == "runs/base" else "expected the Hub id of the base model"
    with pytest.raises(ValueError, match=reason):
        push(adapter, "me/adapter")


def test_weights_whose_header_begins_like_a_pickle_are_taken(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights, size = load_file(path), 0
    while path.read_bytes()[:1] != b"\x80":
        size += 8
        save_file(weights, path, {"format": "pt" + " " * size})
    assert not list(find_problems(adapter))


def test_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert list(find_problems(adapter)) == ["expected weights in adapter_model.safetensors, got none"]


def test_all_problems_are_named_at_once(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "more.pkl").touch()
    forget_atlas(folder)
    assert len(list(find_problems(folder))) == 3


def test_folder_of_too_many_files_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(publish, "MAX_FILES", 3)
    with pytest.raises(ValueError, match=r"expected at most 3 files, got \d+"):
        push(folder, "me/tiny", dry_run=True)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder"):
        push(tmp_path / "nowhere", "me/tiny")


@pytest.mark.parametrize("repo", ["a/b/c", "-tiny", "me/ti ny"])
def test_impossible_repository_is_refused(repo: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="Repo id must"):
        push(folder, repo)


def test_dry_run_lists_every_file_and_changes_none(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left.pt").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = CliRunner().invoke(app, ["push", str(folder), "me/tiny", "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "nothing was uploaded"
    listed = {line.split()[-1] for line in lines[:-1]}
    assert listed == {path.name for path in folder.iterdir() if path.is_file()} | {"README.md"}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_card_is_filled_from_folder_and_results(folder: Path) -> None:
    card = ModelCard(str(fill_card(folder, evaluation_results(), "me/tiny")))
    metadata = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "base_model": "someone/words",
        "base_model_relation": "finetune",
    }
    assert card.data.to_dict().items() >= metadata.items()
    for expected in (
        '"me/tiny", "<commit>"',
        "2 latent\ntokens of 3 levels for each 8.0 s, 16 codes a level",
        "| tiny | 5 |",
        "| codec | 1.0 |",
        "| study | the study's own |",
        "2 CPU cores, no GPU, 1.5 GB of memory",
        "11 windows of 5 scans; 2 held-out subjects",
        "| descriptors, connectivity | zero-shot | right | balanced accuracy | 0.60 | 0.40 to 0.70 |",
        "| descriptors, connectivity | zero-shot | minus shuffled | balanced accuracy | 0.20 | -0.05 to 0.30 |",
        "In short: nothing beats anything.",
        "**Not a medical device, and not for diagnosis**",
        "- code: Apache-2.0\n- weights: apache-2.0\n- data: not part of this repository",
        "arXiv:2511.21760",
    ):
        assert expected in card.text, expected
    right, difference = card.data.eval_results
    assert (right.metric_type, right.metric_value) == ("balanced_accuracy", 0.6)
    assert right.dataset_config == "descriptors, connectivity, zero-shot"
    assert right.metric_args == {"interval_95": [0.4, 0.7]}
    assert (difference.metric_name, difference.metric_value) == ("balanced accuracy, right minus shuffled", 0.2)


def test_results_go_to_a_leaderboard_on_demand(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(evaluation_results()))
    card = fill_card(folder, evaluation_results(), "me/tiny")
    assert yaml.safe_load(publish._benchmark_results(card, "some/benchmark")) == [
        {"dataset": {"id": "some/benchmark", "task_id": "descriptors, connectivity, zero-shot"}, "value": 0.6}
    ]
    # one number of a task
    others = [replace(card.data.eval_results[0], metric_type=name) for name in ("calibration_error", "accuracy")]
    card.data.eval_results = [replace(each, metric_value=0.1) for each in others] + card.data.eval_results
    assert [entry["value"] for entry in yaml.safe_load(publish._benchmark_results(card, "some/benchmark"))] == [0.6]
    options = {"results": tmp_path / "results.json", "dry_run": True}
    assert publish.EVAL_RESULTS in push(folder, "me/tiny", benchmark="some/benchmark", **options)[1]
    assert publish.EVAL_RESULTS not in push(folder, "me/tiny", **options)[1]
    with pytest.raises(ValueError, match="a card with results for the leaderboard of some/benchmark, got none"):
        push(folder, "me/tiny", benchmark="some/benchmark", dry_run=True)


def test_card_without_results_claims_nothing(folder: Path) -> None:
    card = ModelCard(str(fill_card(folder)))
    assert card.data.license == "unknown" and card.data.eval_results is None and card.data.base_model is None
    assert "Not stated: this card was filled without results." in card.text
    assert "## Evaluation" not in card.text and UNKNOWN_REPO in card.text


@pytest.mark.parametrize("part", ["data", "tasks"])
def test_incomplete_results_are_refused(part: str, folder: Path) -> None:
    incomplete = evaluation_results()
    del incomplete[part]
    with pytest.raises(ValueError, match="expected the results of `fmrilm demo` or `evaluate`, got some without"):
        fill_card(folder, incomplete)


def test_own_card_goes_along_with_the_repository_filled_in(folder: Path, tmp_path: Path) -> None:
    fill_card(folder, evaluation_results()).save(folder / "README.md")
    own = len((folder / "README.md").read_bytes())
    assert read_card(folder / "README.md").data.license == "apache-2.0"
    _, sizes = push(folder, "me/tiny", dry_run=True)
    # "<repository>" in the snippet has become the repository's name
    assert sizes["README.md"] == own - len(UNKNOWN_REPO) + len("me/tiny")
    longer = evaluation_results()
    longer["descriptors"]["verdict"] += " at all"
    (tmp_path / "results.json").write_text(json.dumps(longer))
    _, anew = push(folder, "me/tiny", results=tmp_path / "results.json", dry_run=True)
    assert anew["README.md"] == sizes["README.md"] + len(" at all")
