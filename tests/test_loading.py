"""Options of from_pretrained that users of transformers expect."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from fmrilm import FmriLMForConditionalGeneration


@pytest.fixture
def inputs(processor, signal) -> dict:
    block = {"type": "fmri", "fmri": signal, "tr": 2.0, "atlas": "tiny"}
    chat = [{"role": "user", "content": [block, {"type": "text", "text": "Is it connected?"}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


@torch.no_grad()
def logits(model: FmriLMForConditionalGeneration, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).logits


def load(folder: Path, **options) -> FmriLMForConditionalGeneration:
    return AutoModelForMultimodalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_places_the_whole_model(device_map, model_folder: Path, inputs: dict) -> None:
    model = load(model_folder, device_map=device_map)
    assert torch.equal(logits(model, inputs).cpu(), logits(load(model_folder), inputs))
    assert model.generate(**inputs.to(model.device), max_new_tokens=2).shape[0] == 1


def test_attention_implementation_is_chosen_for_each_part(model_folder: Path, inputs: dict) -> None:
    model = load(model_folder, attn_implementation={"text_config": "eager", "codec_config": "sdpa"})
    assert model.model.causal_lm.config._attn_implementation == "eager"
    assert model.model.codec.config._attn_implementation == "sdpa"
    assert torch.allclose(logits(model, inputs), logits(load(model_folder), inputs), atol=1e-4)
