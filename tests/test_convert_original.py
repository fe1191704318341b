"""Official checkpoints: opened safely, complete, and computing what their documentation says, on small random ones."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_plain_tokenizer
from omegaconf import OmegaConf
from scipy.interpolate import interp1d
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel, pipeline

from fmrilm.modeling_fmrilm_original import FmriOriginalForConditionalGeneration
from fmrilm.training.hub.convert_original import convert_original, load_checkpoint
from official_checkpoint import (
    CODE_DIM,
    ROIS,
    WIDTH,
    Tensors,
    brain_tensors,
    features,
    language_tensors,
    mask_and_positions,
)


MEDIAN, IQR = 14000.0, 6500.0


@pytest.fixture
def backbone_folder(make_language_model, tiny_tokenizer, tmp_path: Path) -> Callable:
    """Saves configuration and tokenizer of a tiny language model; gives the folder and the model."""

    def save(backbone: str, spare: int = 3) -> tuple[Path, PreTrainedModel]:
        model = make_language_model(backbone, len(tiny_tokenizer) + spare)
        model.config.save_pretrained(tmp_path / backbone)
        tiny_tokenizer.save_pretrained(tmp_path / backbone)
        return tmp_path / backbone, model

    return save


def settings(language_model: str | Path, kind: str):
    """As the released checkpoint has them, and as the training code writes them: another name, and no alpha."""
    values = {"lm_name": str(language_model), "lora": {"lora_r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}}
    if kind == "namespace":
        values = {"llm": {"base_model": str(language_model)}, "lora_r": 1}
    return OmegaConf.create(values) if kind == "omegaconf" else argparse.Namespace(**values)


CASES = {
    "released": ("released", "qwen3", "llm.base_model.base_model.model.", "q_proj k_proj", 160, WIDTH, "omegaconf"),
    "released, codebook features": ("released", "qwen3", "llm.base_model.", None, 160, CODE_DIM, "omegaconf"),
    "december": ("december-2025", "qwen3", "llm.", "q_proj k_proj", 80, WIDTH, "namespace"),
    "december, GPT-2": ("december-2025", "gpt2", "llm.base_model.model.", "c_attn", 160, CODE_DIM, "namespace"),
}


@pytest.mark.parametrize("case", CASES)
def test_converted_checkpoint_computes_the_documented_formulas(
    case: str, backbone_folder, tiny_atlas, tmp_path: Path
) -> None:
    layout, backbone, prefix, lora, patch, feature_dim, kind = CASES[case]
    # Qwen's vocabulary has rows to spare for the fMRI tokens, GPT-2's has none
    folder, reference = backbone_folder(backbone, spare=0 if backbone == "gpt2" else 3)
    torch.manual_seed(1)
    brain = brain_tensors(layout, patch, feature_dim)
    alpha = {"released": 2, "december": 16, "december, GPT-2": 32}[case.removesuffix(", codebook features")]
    language, plain = language_tensors(reference, prefix, lora, alpha)
    more = {"model_args": settings(folder, kind), "validation_results": {"sex": np.float64(0.9)}}
    tensors = brain | language if layout == "released" else {"model": brain | language}
    torch.save({**tensors, **more}, tmp_path / "model.pt")
    output = tmp_path / "converted"
    report = convert_original(tmp_path / "model.pt", output, MEDIAN, IQR, atlas=tiny_atlas)

    # every tensor is used or listed
    assert report["layout"] == layout and report["lora_alpha"] == (alpha if lora else None)
    assert report == json.loads((output / "conversion.json").read_text())
    assert sorted([*report["used"], *report["unused"]]) == sorted(brain | language)
    head = {"released": "tokenizer.encoder.conv_out", "december-2025": "tokenizer.encode_task_layer"}[layout]
    spare = {name for name in brain if name.startswith("tokenizer.quantize")}
    if layout == "released":
        spare |= {name for name in brain if name.startswith("tokenizer.patch_embed")}
    if feature_dim == WIDTH:
        spare |= {name for name in brain if name.startswith(head)}
    assert set(report["unused"]) == spare

    model = AutoModelForMultimodalLM.from_pretrained(output, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    torch.manual_seed(2)
    scan = MEDIAN + 3000 * torch.randn(ROIS) + 140 * torch.randn(200, ROIS)
    chat = [{"role": "user", "content": [{"type": "fmri", "fmri": scan, "tr": 2.0}, {"type": "text", "text": "Old?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    x = (scan[:160].T - MEDIAN) / IQR
    assert torch.allclose(inputs["fmri_values"][0], scan[:160].T, rtol=1e-6)
    with torch.no_grad():
        expected = features(brain, layout, x, patch, feature_dim)
        found = model.get_fmri_features(inputs["fmri_values"])[0]
        assert torch.allclose(found, expected, atol=1e-5)

        # the language model: a plain one with merged weights, and the documented mask and positions
        reference.load_state_dict(plain)
        is_fmri = inputs["input_ids"][0] == model.config.fmri_token_id
        kinds = "".join("f" if scan else "t" for scan in is_fmri)
        steps = 160 // patch
        assert kinds.count("f") == ROIS * steps
        seen, places = mask_and_positions(kinds, steps)
        embeddings = reference.get_input_embeddings()(inputs["input_ids"][0].masked_fill(is_fmri, 0))
        embeddings[is_fmri] = expected
        logits = reference(
            inputs_embeds=embeddings[None],
            attention_mask=torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
            position_ids=places[None],
        ).logits
        outputs = model(**inputs, labels=inputs["input_ids"])
    assert torch.allclose(outputs.logits, logits, atol=1e-5 * float(logits.abs().max()))
    targets = inputs["input_ids"][0].masked_fill(is_fmri, -100)
    assert torch.allclose(outputs.loss, F.cross_entropy(logits[0, :-1], targets[1:]), rtol=1e-4)

    # generation with a cache continues as whole runs would, in a padded batch and alone
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    answer = model.generate(**inputs, **options)
    longer = [{"role": "user", "content": [chat[0]["content"][0], {"type": "text", "text": "Older than forty?"}]}]
    batch = processor.apply_chat_template([chat, longer], add_generation_prompt=True)
    answers = model.generate(**batch, **options)
    assert answers[0, -3:].tolist() == answer[0, -3:].tolist()
    ids = inputs["input_ids"]
    for token in answer[0, -3:]:
        with torch.no_grad():
            following = model(input_ids=ids, fmri_values=inputs["fmri_values"]).logits[0, -1]
        never = (model.config.fmri_token_id, model.generation_config.eos_token_id)
        following[[token for token in never if token < len(following)]] = -torch.inf
        assert following.argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], 1)
    pipe = pipeline("fmri-text-to-text", model=str(output), trust_remote_code=True)
    assert pipe(scan, "Old?", tr=2.0, **options)["answer"] == processor.decode_answers(answer[:, -3:])[0]
    choices = processor.encode_choices([" Yes", " No"])
    scores = model.score_choices(batch, choices)
    assert torch.allclose(scores[:1], model.score_choices(inputs, choices), atol=1e-4)
    pushed: list[str] = []
    processor.push_to_hub = pushed.append
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/converted")
    assert pushed == ["me/converted"]
    found = pipe(scan, "Old?", tr=2.0, choices=[" Yes", " No"])["probabilities"]
    assert list(found.values()) == pytest.approx(scores[0].softmax(-1).tolist(), abs=1e-4)


OFFICIAL_END = (
    "### Question: Old?\n### Answer:<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n Yes<|endoftext|>\n"
)


@pytest.mark.parametrize(
    ("case", "beginning"),
    [("released", "<|im_start|>user\n<fmri>SCAN</fmri>"), ("december", "<fmri>SCAN</fmri><|im_start|>user\n")],
)
def test_prompt_is_the_official_one(case: str, beginning: str, backbone_folder, tiny_atlas, tmp_path: Path) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES[case]
    folder, reference = backbone_folder(backbone)
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(reference, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    given = {"text_config": str(folder), "atlas": tiny_atlas}
    convert_original(tmp_path / "model.pt", tmp_path / "with", MEDIAN, IQR, **given)
    convert_original(tmp_path / "model.pt", tmp_path / "without", MEDIAN, IQR, **given, delimiters=False)
    scan = MEDIAN + 140 * np.random.default_rng(0).normal(size=(160, ROIS))
    blocks = [{"type": "fmri", "fmri": scan, "tr": 2.0}, {"type": "text", "text": "Old?"}]
    chat = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "Yes"}]
    described = [*blocks[:1], {"type": "text", "text": "From UKB."}, {"type": "text", "text": "### Description: d"}]
    for name, start, end in (("with", "<fmri>", "</fmri>"), ("without", "", "")):
        processor = AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        pads = "<|fmri_pad|>" * (ROIS * 160 // patch)
        text = processor.apply_chat_template(chat, tokenize=False)
        expected = beginning.replace("<fmri>", start).replace("</fmri>", end).replace("SCAN", pads) + OFFICIAL_END
        assert text == expected
        ids = processor.apply_chat_template(chat)["input_ids"][0]
        assert processor.tokenizer.decode(ids) == text
        more = [{"role": "user", "content": [*described, *blocks[1:]]}]
        found = processor.apply_chat_template(more, tokenize=False)
        assert "From UKB.\n### Description: d\n### Question: Old?\n### Answer:" in found
        # answers are tokenised as in the prompt
        assert processor.tokenizer.decode(processor.encode_choices(["Yes"])[0]) == " Yes"


def test_prompt_of_a_tokenizer_without_chat_ml_has_no_delimiters(
    make_language_model, tiny_atlas, tmp_path: Path
) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES["december, GPT-2"]
    tokenizer = build_plain_tokenizer(eos_token="<|endoftext|>")
    reference = make_language_model(backbone, len(tokenizer))
    reference.config.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(reference, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    given = {"text_config": str(tmp_path / "gpt2"), "atlas": tiny_atlas}
    convert_original(tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, **given)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    blocks = [{"type": "fmri", "fmri": "scan.npy"}, {"type": "text", "text": "Old?"}]
    text = processor.apply_chat_template([{"role": "user", "content": blocks}], tokenize=False)
    assert text == "<|fmri_pad|>" * (ROIS * 160 // patch) + "### Question: Old?\n### Answer:"


@pytest.mark.parametrize("tr", [0.735, 2.0, 3.0])
def test_scans_are_interpolated_as_by_the_official_code(
    tr: float, backbone_folder, tiny_atlas, tmp_path: Path
) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES["released"]
    folder, reference = backbone_folder(backbone)
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(reference, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    convert_original(tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, text_config=str(folder), atlas=tiny_atlas)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    scan = MEDIAN + 140 * np.random.default_rng(0).normal(size=(500, ROIS))
    chat = [{"role": "user", "content": [{"type": "fmri", "fmri": scan, "tr": tr}, {"type": "text", "text": "Old?"}]}]
    duration = tr * 499
    grid = np.linspace(0, duration, round(duration / 2) + 1)
    expected = interp1d(tr * np.arange(500), scan, axis=0)(grid)[:160].T
    assert np.allclose(processor.apply_chat_template(chat)["fmri_values"][0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="expected window first, .*got 'full'"):
        processor.apply_chat_template(chat, window="full")


class Malice:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class Unknown:
    pass


@pytest.mark.parametrize(("content", "named"), [(Malice(), "posix.system"), (Unknown(), "Unknown")])
def test_file_that_names_anything_else_is_refused(content, named: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (content, [argparse.Namespace(a=OmegaConf.create({"b": 1}), c=content)]):
        torch.save({"pos_embed.weight": torch.zeros(1), "model_args": place}, "model.pt")
        with pytest.raises(ValueError, match=f"model.pt: refused, it names .*{named}; expected tensors and settings"):
            load_checkpoint(Path("model.pt"))
    assert not Path("harmed").exists()
    # what was allowed while it was opened is not allowed afterwards
    torch.save(argparse.Namespace(a=1), "namespace.pt")
    with pytest.raises(Exception, match="argparse.Namespace"):
        torch.load("namespace.pt", weights_only=True)


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: expected a dict of tensors, got list"):
        load_checkpoint(tmp_path / "model.pt")


def test_settings_are_read_as_plain_data(tmp_path: Path) -> None:
    values = {"lm_name": "some/model", "lora": {"lora_alpha": 2.0, "on": True, "targets": ["q", "k"]}, "none": None}
    for args in (OmegaConf.create(values), argparse.Namespace(**values), values):
        torch.save({"pos_embed.weight": torch.ones(2), "model_args": args}, tmp_path / "model.pt")
        tensors, found = load_checkpoint(tmp_path / "model.pt")
        assert found == values and tensors["pos_embed.weight"].tolist() == [1, 1]


def test_missing_and_misshapen_tensors_are_named(backbone_folder, tiny_atlas, tmp_path: Path) -> None:
    layout, backbone, prefix, lora, patch, feature_dim, _ = CASES["released"]
    folder, reference = backbone_folder(backbone)
    whole = brain_tensors(layout, patch, feature_dim) | language_tensors(reference, prefix, lora)[0]

    def convert(tensors: Tensors, **options) -> None:
        torch.save(tensors, tmp_path / "model.pt")
        options = {"lora_alpha": 2.0, "text_config": str(folder), "atlas": tiny_atlas, **options}
        convert_original(tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, **options)

    def without(*names: str) -> Tensors:
        return {name: value for name, value in whole.items() if name not in names}

    qkv, down = "tokenizer.encoder.blocks.1.attn.qkv.bias", prefix + "model.layers.0.mlp.down_proj.weight"
    adapter = prefix + "model.layers.1.self_attn.q_proj.lora_"
    other = prefix + "lm_head.weight"
    refused = [
        (without(qkv, down), f"lacks 2 tensors: {down}, {qkv}$"),
        *((without(name), name) for name in ("pos_embed.weight", "encode_transform_layer.0.weight")),
        *((without(name), name) for name in ("tokenizer.encoder.pos_embed", "tokenizer.encoder.ln_post.weight")),
        (without(adapter + "B.default.weight"), adapter + "B.default.weight"),
        (without(adapter + "A.default.weight"), "expected one LoRA adapter, got 0"),
        (without(prefix + "model.embed_tokens.weight"), r"one tensor llm.\*model.embed_tokens.weight, got 0"),
        (
            {**whole, "tokenizer.encoder.pos_embed": torch.ones(1, ROIS, 100)},
            "a multiple of 64 and patches that divide 160 frames, got 100 and",
        ),
        (
            {**whole, "tokenizer.encoder.blocks.0.norm1.weight": torch.ones(64)},
            r"blocks.0.norm1.weight: expected shape \(128,\), got \(64,\)",
        ),
        ({**whole, other: whole[other] + 1}, "head of its own"),
    ]
    for tensors, message in refused:
        with pytest.raises(ValueError, match=message):
            convert(tensors)
    with pytest.raises(ValueError, match="which language model"):
        convert(whole, text_config=None)
    with pytest.raises(ValueError, match="knows 5 ROIs, expected an atlas of as many, got Atlas"):
        convert(whole, atlas=None)
    convert({**without(other), "tokenizer.extra": torch.ones(3)})
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["unused"]["tokenizer.extra"] == [3]
    with pytest.raises(ValueError, match="which exists"):
        convert(whole)
    assert not list(tmp_path.glob("*.partial"))


def test_converted_model_refuses_scans_it_cannot_know(backbone_folder, tiny_atlas, tmp_path: Path) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES["released"]
    folder, reference = backbone_folder(backbone)
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(reference, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    convert_original(tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, text_config=str(folder), atlas=tiny_atlas)
    model = FmriOriginalForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"\[5, 160\], got \[5, 320\]"):
        model.get_fmri_features(torch.zeros(1, 5, 320))
    with pytest.raises(ValueError, match="one scan and its 5 fMRI tokens in each row"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    short = MEDIAN + np.random.default_rng(0).normal(size=(150, ROIS))
    with pytest.raises(ValueError, match="expected 160 frames of every ROI at 2.0 s, got 150 frames"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "fmri", "fmri": short, "tr": 2.0}]}])
