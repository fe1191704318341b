"""Joint models on disk: a whole one, or an adapter on top of another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig
from transformers.utils import find_adapter_config_file

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration


def base_of(name: str) -> str | None:
    """What the adapter in a folder or Hub repository was trained on; None where there is a whole model."""
    path = find_adapter_config_file(name)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_model(
    name: str, dtype: torch.dtype | str | None, merge: bool, quantization: BitsAndBytesConfig | None = None
) -> FmriLMForConditionalGeneration | PeftModel:
    """
    A joint model out of a folder or the Hub. An adapter comes with what it was trained on: merged into it, or
    trainable on top of it. quantization: of the language model's matrices.
    """
    base = base_of(name)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    model = FmriLMForConditionalGeneration.from_pretrained(base or name, dtype=dtype, **options)
    if base is None:
        return model
    adapted = PeftModel.from_pretrained(model, name, is_trainable=not merge)
    return adapted.merge_and_unload() if merge else adapted


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder with all that `write` puts into the one it is given, or as it was before."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    write(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
