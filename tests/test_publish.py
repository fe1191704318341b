"""What goes to the Hub: folders are refused whole before anything is uploaded, cards say what is known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from huggingface_hub import ModelCard
from transformers import AutoModelForMultimodalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.training.alignment import add_lora, join, train_alignment
from fmrilm.training.cli import app
from fmrilm.training.model_card import UNKNOWN_REPO, fill_card, read_card, subject_hashes
from fmrilm.training.publish import find_problems, push
from helpers import chats


@pytest.fixture(scope="module")
def model(make_codec, make_language_model, extractor, module_tokenizer) -> FmriLMForConditionalGeneration:
    processor = FmriLMProcessor(extractor, module_tokenizer, tokens_per_step=2)
    return join(make_codec(), make_language_model("llama", len(module_tokenizer) - 3), processor).eval()


@pytest.fixture(scope="module")
def saved(model, extractor, module_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.save_pretrained(folder)
    FmriLMProcessor(extractor, module_tokenizer, tokens_per_step=2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def saved_adapter(make_codec, make_language_model, extractor, module_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    processor = FmriLMProcessor(extractor, module_tokenizer, tokens_per_step=2)
    model = join(make_codec(), make_language_model("llama", len(module_tokenizer) - 3), processor)
    add_lora(model, 2).save_pretrained(folder)
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
    "a pickle by name": (lambda f: (f / "training_args.bin").write_bytes(b""), "training_args.bin: expected no pickle"),
    "a pickle by content": (
        lambda f: torch.save({"a": 1}, f / "notes.txt", _use_new_zipfile_serialization=False),
        "notes.txt: expected no pickle",
    ),
    "a pickle in an archive": (lambda f: torch.save({"a": 1}, f / "notes.dat"), "notes.dat: expected no pickle"),
    "a pickle in an array": (
        lambda f: np.save(f / "codes.npy", np.array([{}], dtype=object), allow_pickle=True), "codes.npy: expected no",
    ),
    "a pickle in arrays": (
        lambda f: np.savez(f / "codes.npz", np.array([{}], dtype=object)), "codes.npz: expected no pickle",
    ),
    "a pickle in a subfolder": (
        lambda f: ((f / "checkpoint-1").mkdir(), (f / "checkpoint-1" / "optimizer.pt").touch()),
        "checkpoint-1/optimizer.pt: expected no pickle",
    ),
    "other code": (lambda f: (f / "setup.py").touch(), "setup.py: expected no Python but"),
    "code in a subfolder": (
        lambda f: ((f / "more").mkdir(), shutil.copy(f / "atlases.py", f / "more")), "more/atlases.py: expected no",
    ),
    "changed code": (lambda f: (f / "atlases.py").write_text("pass\n"), "atlases.py: expected this version's code"),
    "code missing": (lambda f: (f / "steps_fmrilm.py").unlink(), "without steps_fmrilm.py it does not load"),
    "auto classes missing": (lambda f: change(f / "config.json", auto_map={}), "config.json: expected auto_map"),
    "another model": (lambda f: change(f / "config.json", model_type="llama"), "expected model_type fmrilm, got 'llama'"),
    "neither model nor adapter": (lambda f: (f / "config.json").unlink(), "got neither"),
    "placeholders may be spoken": (
        lambda f: change(f / "generation_config.json", suppress_tokens=None), "expected suppress_tokens with",
    ),
    "broken JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected JSON"),
    "a file too large": (lambda f: enormous(f / "model.dat"), "expected at most 50000000000 bytes"),
    "an invalid licence": (lambda f: card(f, "license: free"), "expected a license that the Hub knows"),
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


@pytest.mark.parametrize("base", [None, "", "/somewhere/base", "a/b/c", "base model"])
def test_adapter_without_a_base_on_the_hub_is_refused(base: str | None, saved_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))
    change(folder / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match="expected the Hub id of the base model"):
        push(folder, "me/adapter")


def test_adapter_on_a_local_folder_is_refused(saved_adapter: Path, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    Path("runs/base").mkdir(parents=True)
    change(folder / "adapter_config.json", base_model_name_or_path="runs/base")
    with pytest.raises(ValueError, match="which only this machine has"):
        push(folder, "me/adapter")


def test_adapter_without_weights_is_refused(saved_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").unlink()
    assert list(find_problems(folder)) == ["expected weights in adapter_model.safetensors, got none"]


def test_all_problems_are_named_at_once(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "more.pkl").touch()
    forget_atlas(folder)
    assert len(list(find_problems(folder))) == 3


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder"):
        push(tmp_path / "nowhere", "me/tiny")


@pytest.mark.parametrize("repo", ["a/b/c", "-tiny", "me/ti ny"])
def test_impossible_repository_is_refused(repo: str, folder: Path) -> None:
    with pytest.raises(ValueError):
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


def test_command_says_what_is_wrong(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["push", str(folder), "me/tiny"])
    assert result.exit_code == 1
    assert "error:" in result.output and "expected weights" in result.output
