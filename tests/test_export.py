"""The exported backbone computes what the joint model does, given its mask and positions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fmrilm.training.cli.main import app
from fmrilm.training.hub.export import plain_backbone, plain_inputs, served_difference


def prompts(processor, *questions: str) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    chats = [
        [{"role": "user", "content": [{"type": "fmri", "fmri": scan, "tr": 2.0}, {"type": "text", "text": question}]}]
        for question in questions
        for scan in [1000 + rng.normal(0, 10, (20, 5))]
    ]
    return processor.apply_chat_template(chats, add_generation_prompt=True, padding_side="left")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_plain_backbone_gives_the_same_logits(
    backbone: str, tied: bool, tiny_model, processor, tmp_path: Path
) -> None:
    model = tiny_model(backbone, tied)
    plain_backbone(model).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain).__name__ in ("LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
    assert plain.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    inputs = prompts(processor, "Is it connected?", "And this one, is it?")
    with torch.no_grad():
        expected, found = model(**inputs).logits, plain(**plain_inputs(model, inputs)).logits
    valid = inputs["attention_mask"].bool()
    assert not valid.all() and torch.allclose(found[valid], expected[valid], atol=1e-5)
    text = inputs["input_ids"][:, -5:]
    assert torch.equal(plain(text).logits, model(text).logits)


def test_causal_server_differs_and_the_difference_is_measured(tiny_model, processor) -> None:
    model = tiny_model("llama")
    inputs = prompts(processor, "Is it?", "Is it?")
    difference = served_difference(model, plain_backbone(model), inputs)
    assert 0.01 < difference["total_variation"] < 1
    # where steps have one token, nothing is left to differ
    text = {"input_ids": inputs["input_ids"][:, -6:]}
    assert served_difference(model, plain_backbone(model), text) == {"total_variation": 0.0, "same_word": 1.0}


def test_export_writes_backbone_and_prompt(tiny_model, processor, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "scan.npy", 1000 + np.random.default_rng(0).normal(0, 10, (20, 5)))
    given = ["--scan", str(tmp_path / "scan.npy"), "--question", "Is it connected?", "--tr", "2"]
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), *given]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0 and "of the next word's probability" in run.output
    embeddings = load_file(tmp_path / "out" / "prompt.safetensors")["prompt_embeds"]
    inputs = prompts(processor, "Is it connected?")
    assert torch.allclose(embeddings, plain_inputs(model, inputs)["inputs_embeds"][0], atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == processor.tokenizer.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "qwen3"
    # as servers do: embeddings alone
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(
        inputs_embeds=embeddings[None], max_new_tokens=3, do_sample=False
    )
    assert new.shape == (1, 3)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "which exists" in again.output
    half = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "other"), *given[:2]])
    assert half.exit_code == 1 and "a scan and a question" in half.output
