"""`fmrilm push`: a folder is checked to the last file, then goes to the Hub in one commit."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    ModelCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

import fmrilm
from fmrilm import processors
from fmrilm.modeling_fmrilm import AUTO_MAP

from ..evaluation.report import MAIN_METRICS
from .model_card import UNKNOWN_REPO, fill_card, read_card


CARD = "README.md"
# of leaderboards: https://huggingface.co/docs/hub/eval-results
EVAL_RESULTS = ".eval_results/fmrilm.yaml"
ADAPTER = "adapter_config.json"
# of all that a model, its processor and its card consist of; label images are in atlases/
SUFFIXES = ("", ".json", ".safetensors", ".py", ".jinja", ".txt", ".model", ".md", ".png", ".svg", ".jpg")
# what `fmrilm evaluate` writes, which names folders of this machine
EVALUATION = ("settings.json", "results.json", "descriptors.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pkl", ".pickle", ".pth", ".ckpt", ".joblib")
# the Hub's limits: https://huggingface.co/docs/hub/storage-limits
MAX_FILE_BYTES = 50 * 10**9
MAX_FILES = 25_000
# what a push takes off the Hub where the folder has it no more: it would be loaded beside the new files
REPLACED_SUFFIXES = (".py", ".safetensors", ".safetensors.index.json")


def push(
    folder: Path,
    repo: str,
    private: bool = False,
    branch: str = "main",
    message: str = "Upload model",
    results: Path | None = None,
    dry_run: bool = False,
    benchmark: str | None = None,
) -> tuple[str | None, dict[str, int]]:
    """
    Uploads a saved model or adapter with its processor to the repository `repo`, which is made if need be. The
    card is the folder's own README.md, or is filled in where there is none, or anew from `results` (results.json).
    benchmark: id of a dataset on the Hub whose leaderboard the card's results belong to.

    Returns:
        The commit (None in a dry run, which asks the Hub nothing), and the size in bytes of each file by path.
    """
    validate_repo_id(repo)
    problems = list(find_problems(folder))
    card = None
    if not problems:
        try:
            card = _card(folder, repo, results)
            if not dry_run:
                # the Hub's own check, before anything is made there
                card.validate()
        except ValueError as error:
            problems = [str(error)]
    if card is None or problems:
        raise ValueError(f"{folder} was not pushed:\n" + "\n".join(f"- {problem}" for problem in problems))
    own = {CARD: str(card).encode()}
    if benchmark is not None:
        own[EVAL_RESULTS] = _benchmark_results(card, benchmark)
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes |= {name: len(content) for name, content in own.items()}
    if dry_run:
        return None, sizes
    api = HfApi()
    if ADAPTER in files:
        own[ADAPTER] = _pinned(files[ADAPTER], api)
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ValueError(f"expected {repo} to be private, got a public repository of that name: nothing was uploaded")
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
    operations = [CommitOperationAdd(name, own.get(name) or str(files[name])) for name in sizes]
    there = [name for name in api.list_repo_files(repo, revision=branch) if "/" not in name]
    old = [name for name in there if name.endswith(REPLACED_SUFFIXES)]
    operations += [CommitOperationDelete(name) for name in old if name not in sizes]
    return api.create_commit(repo, operations, commit_message=message, revision=branch).oid, sizes


def find_problems(folder: Path) -> Iterator[str]:
    """Everything but its card that keeps a folder from being pushed, a sentence each."""
    if not folder.is_dir():
        yield f"expected a folder, got {folder}"
        return
    files = _files(folder)
    if len(files) > MAX_FILES:
        yield f"expected at most {MAX_FILES} files, got {len(files)}"
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.stat().st_size > MAX_FILE_BYTES:
            yield f"{name}: expected at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}"
        if _is_pickle(path):
            yield f"{name}: expected no pickle, which runs code when it is opened; weights belong in safetensors"
        elif path.suffix not in SUFFIXES and path.parent != folder / "atlases" or name in EVALUATION:
            yield f"{name}: expected what a model consists of and its card, got what may hold data of subjects"
    # one that is no JSON keeps the rest from being judged
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            yield f"{path.name}: expected JSON, {error}"
            return
    yield from _weight_problems(folder)
    if (folder / ADAPTER).exists():
        yield from _adapter_problems(folder)
    else:
        yield from _model_problems(folder)
    yield from _processor_problems(folder)
    yield from _code_problems(folder, files)


def _files(folder: Path) -> list[Path]:
    """All files but hidden ones and compiled code."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    )


def _is_pickle(path: Path) -> bool:
    """By name, or by content whatever the name: a pickle, or an archive or array that holds one."""
    if path.suffix in PICKLE_SUFFIXES:
        return True
    with open(path, "rb") as handle:
        start = handle.read(8)
        # as a number: the length of a safetensors file's header, which may begin like a pickle, and is in the file
        if start[:1] == b"\x80" and int.from_bytes(start, "little") > path.stat().st_size:
            return True
        handle.seek(0)
        if path.suffix == ".npy":
            return _holds_objects(handle)
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(
                name.endswith(PICKLE_SUFFIXES) or name.endswith(".npy") and _holds_objects(archive.open(name))
                for name in archive.namelist()
            )
    return False


def _holds_objects(handle) -> bool:
    """Of an .npy file: an array of Python objects is a pickle."""
    try:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(handle)[2].hasobject
    except ValueError:
        # no array at all: what it is, cannot be told
        return True


def _weight_problems(folder: Path) -> Iterator[str]:
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(expected - {path.name for path in weights}):
            yield f"{index.name} names weights that are not there: {', '.join(missing)}"
    elif (folder / ADAPTER).exists():
        if not (folder / "adapter_model.safetensors").exists():
            yield "expected weights in adapter_model.safetensors, got none"
    elif not (folder / "model.safetensors").exists():
        yield "expected weights in model.safetensors, got none"
    for path in weights:
        try:
            with safe_open(path, framework="numpy") as tensors:
                tensors.keys()
        except SafetensorError as error:
            yield f"{path.name}: expected whole safetensors, got a file that does not open ({error})"


def _adapter_problems(folder: Path) -> Iterator[str]:
    base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    missing = f"{ADAPTER}: expected the Hub id of the base model in base_model_name_or_path, got"
    if not base:
        yield f"{missing} none: push the base model, load it from the Hub and train the adapter on that"
        return
    try:
        validate_repo_id(base)
    except HFValidationError:
        yield f"{missing} {base!r}"
        return
    if Path(base).exists():
        yield f"{missing} the folder {base!r}, which only this machine has"


def _model_problems(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").exists():
        yield f"expected config.json of a model or {ADAPTER}, got neither"
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "fmrilm":
        yield f"config.json: expected model_type fmrilm, got {config.get('model_type')!r}"
        return
    if config.get("auto_map") != AUTO_MAP:
        yield f"config.json: expected auto_map {AUTO_MAP}, got {config.get('auto_map')}"
    tokens = {config[f"fmri_{name}token_id"] for name in ("start_", "", "summary_", "end_")}
    path = folder / "generation_config.json"
    suppressed = json.loads(path.read_text(encoding="utf-8")).get("suppress_tokens") if path.exists() else None
    if not tokens <= set(suppressed or []):
        yield f"{path.name}: expected suppress_tokens with the placeholders {sorted(tokens)}, got {suppressed}"


def _processor_problems(folder: Path) -> Iterator[str]:
    path = folder / "processor_config.json"
    if not path.exists():
        yield f"expected {path.name} with an atlas, got none: save the processor into the folder"
    elif not json.loads(path.read_text(encoding="utf-8")).get("feature_extractor", {}).get("atlases"):
        yield f"{path.name}: expected at least one atlas, got none: scans could not be read"


def _code_problems(folder: Path, files: list[Path]) -> Iterator[str]:
    """Code is the package's own, flat, and all that the configurations name."""
    folders = (Path(str(package.__file__)).parent for package in (fmrilm, processors))
    own = {path.name: path for folder in folders for path in folder.glob("*.py")}
    own.pop("__init__.py")
    present = [path for path in files if path.suffix == ".py"]
    for path in present:
        name = path.relative_to(folder).as_posix()
        if name not in own:
            yield f"{name}: expected no Python but the package's own files, side by side"
        elif path.read_bytes() != own[name].read_bytes():
            yield f"{name}: expected this version's code, got other: load the folder and save it again"
    needed = set()
    for name in ("config.json", "processor_config.json"):
        if (folder / name).exists():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            maps = [values.get("auto_map", {}), values.get("feature_extractor", {}).get("auto_map", {})]
            modules = {entry.split(".")[0] + ".py" for entries in maps for entry in entries.values()}
            for module in modules & own.keys():
                needed |= {module, *(Path(path).name for path in get_relative_import_files(own[module]))}
    if missing := sorted(needed - {path.name for path in present}):
        yield f"expected the code that the configurations name, without {', '.join(missing)} it does not load"


def _pinned(path: Path, api: HfApi) -> bytes:
    """
    The adapter's configuration with the commit its base model is at, if it names none: the base model's code and
    weights stay those it was trained on, whatever comes to that repository later.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    values["revision"] = values.get("revision") or api.model_info(values["base_model_name_or_path"]).sha
    return json.dumps(values, indent=2).encode()


def _card(folder: Path, repo: str, results: Path | None) -> ModelCard:
    if results is not None:
        return fill_card(folder, json.loads(results.read_text(encoding="utf-8")), repo)
    if not (folder / CARD).exists():
        return fill_card(folder, repo=repo)
    card = read_card(folder / CARD)
    card.text = card.text.replace(UNKNOWN_REPO, repo)
    return card


def _benchmark_results(card: ModelCard, benchmark: str) -> bytes:
    """The main metric of each task in the card's results, as entries of a benchmark's leaderboard."""
    validate_repo_id(benchmark)
    facts: Any = card.data
    chosen: dict[str, float] = {}
    for metric in (*MAIN_METRICS, "accuracy"):
        for result in facts.eval_results or []:
            if result.metric_type == metric:
                chosen.setdefault(str(result.dataset_config), result.metric_value)
    entries = [EvalResultEntry(dataset_id=benchmark, task_id=task, value=value) for task, value in chosen.items()]
    if not entries:
        raise ValueError(f"expected a card with results for the leaderboard of {benchmark}, got none")
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
