"""The exported backbone, given a prompt's embeddings, computes what the joint model does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fmrilm.training.alignment.joint import add_lora
from fmrilm.training.cli.main import app
from fmrilm.training.hub.export import prompt_embeddings


QUESTION = "Is it connected?"


@pytest.mark.parametrize(("backbone", "tied"), [("qwen3", True), ("gpt2", False)])
def test_a_causal_server_gives_the_same_logits(
    backbone: str, tied: bool, tiny_model, processor, scan_file: Path, tmp_path: Path
) -> None:
    model = tiny_model(backbone, tied)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = ["--scan", str(scan_file), "--question", QUESTION, "--tr", "2"]
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), *given]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ in ("Qwen3ForCausalLM", "GPT2LMHeadModel")
    assert plain.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == processor.tokenizer.get_vocab()

    content = [{"type": "fmri", "fmri": scan_file, "tr": 2.0}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    embeddings = load_file(tmp_path / "out" / "prompt.safetensors")["prompt_embeds"][None]
    assert torch.equal(embeddings, prompt_embeddings(model, inputs))
    # as servers do: embeddings alone, at ordinary positions
    with torch.no_grad():
        assert torch.equal(plain(inputs_embeds=embeddings).logits, model(**inputs).logits)
        assert torch.equal(plain(inputs["input_ids"][:, -5:]).logits, model(inputs["input_ids"][:, -5:]).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    new = plain.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(new, model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])


def test_an_adapter_is_exported_with_what_it_was_trained_on(
    tiny_model, processor, scan_file: Path, tmp_path: Path
) -> None:
    model = tiny_model("qwen3", True)
    for name in ("base", "adapter"):
        processor.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "base")
    adapted = add_lora(model, 2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    run = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = processor.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapted.merge_and_unload()(ids).logits
        assert torch.allclose(plain(ids).logits, expected, atol=1e-5)


def test_unfit_exports_are_refused(model_folder: Path, scan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    again = CliRunner().invoke(app, ["export", str(model_folder), str(tmp_path / "out")])
    assert again.exit_code == 1 and "which exists" in again.output
    half = CliRunner().invoke(app, ["export", str(model_folder), str(tmp_path / "new"), "--scan", str(scan_file)])
    assert half.exit_code == 1 and "a scan and a question" in half.output
    assert not list(tmp_path.glob(".new*"))
