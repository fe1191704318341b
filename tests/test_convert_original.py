"""Official checkpoints: opened safely, complete, and computing what their documentation says, on small random ones."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_atlas, build_tiny_language_model, build_tiny_tokenizer
from omegaconf import OmegaConf
from transformers import AutoModelForMultimodalLM, AutoProcessor

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import Atlas
from fmrilm.training.convert_original import Conversion, convert_original, official_atlas
from fmrilm.training.original_checkpoint import load_checkpoint


ROIS, WIDTH, HEADS, LAYERS, TEXT_WIDTH, CODE_DIM = 5, 128, 2, 2, 32, 8
MEDIAN, IQR = 14000.0, 6500.0
Tensors = dict[str, torch.Tensor]


def linear(name: str, out: int, inside: int) -> Tensors:
    return {f"{name}.weight": torch.randn(out, inside) / math.sqrt(inside), f"{name}.bias": 0.1 * torch.randn(out)}


def norm(name: str) -> Tensors:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(WIDTH), f"{name}.bias": 0.1 * torch.randn(WIDTH)}


def brain_tensors(layout: str, patch: int, feature_dim: int) -> Tensors:
    """Encoder, projector and what neither needs, by the names that the documentation gives."""
    encoder = "tokenizer.encoder."
    tensors = linear(encoder + "patch_embed.proj", WIDTH, patch)
    tensors[encoder + "patch_embed.proj.weight"] = tensors[encoder + "patch_embed.proj.weight"][:, None, None]
    tensors[encoder + "pos_embed"] = torch.randn(1, ROIS, WIDTH)
    for index in range(LAYERS):
        block = f"{encoder}blocks.{index}."
        tensors |= norm(block + "norm1") | norm(block + "norm2")
        tensors |= linear(block + "attn.qkv", 3 * WIDTH, WIDTH) | linear(block + "attn.proj", WIDTH, WIDTH)
        tensors |= linear(block + "mlp.fc1", 4 * WIDTH, WIDTH) | linear(block + "mlp.fc2", WIDTH, 4 * WIDTH)
    if layout == "released":
        tensors |= norm(encoder + "ln_post")
        tensors |= linear(encoder + "conv_out.0", WIDTH, WIDTH) | linear(encoder + "conv_out.2", CODE_DIM, WIDTH)
        tensors["tokenizer.patch_embed.proj.weight"] = tensors[encoder + "patch_embed.proj.weight"]
    else:
        tensors |= norm(encoder + "norm") | linear("tokenizer.encode_task_layer.0", WIDTH, WIDTH)
        tensors |= linear("tokenizer.encode_task_layer.2", CODE_DIM, WIDTH)
        tensors["tokenizer.quantize.embedding.weight"] = torch.randn(16, CODE_DIM)
    tensors |= linear("encode_transform_layer.0", TEXT_WIDTH, feature_dim)
    tensors["pos_embed.weight"] = torch.randn(ROIS, TEXT_WIDTH)
    return tensors


def language_tensors(backbone: str, vocabulary: int, prefix: str, lora: str | None) -> tuple[Tensors, Tensors]:
    """A random language model by official names, adapters beside their base weights; and its own plain state."""
    model = build_tiny_language_model(backbone, vocabulary)
    tensors, plain = {}, dict(model.state_dict())
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if lora is None or not module.endswith(tuple(lora.split())):
            tensors[prefix + name] = value
            continue
        tensors[f"{prefix}{module}.base_layer.{leaf}"] = value
        if leaf == "bias":
            continue
        out, inside = value.shape if backbone != "gpt2" else value.T.shape
        a, b = torch.randn(1, inside), torch.randn(out, 1)
        tensors[f"{prefix}{module}.lora_A.default.weight"] = a
        tensors[f"{prefix}{module}.lora_B.default.weight"] = b
        # alpha 2 over rank 1
        update = 2 * b @ a
        plain[name] = value + (update.T if backbone == "gpt2" else update)
    return tensors, plain


def features(tensors: Tensors, layout: str, x: torch.Tensor, patch: int, feature_dim: int) -> torch.Tensor:
    """h_fmri [tokens, hidden] of one scan x [rois, time] as sections B.2 and D.1 of the formulas say, ROI-major."""

    def weight(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors[name + ".weight"], tensors[name + ".bias"]

    def affine(name: str, z: torch.Tensor) -> torch.Tensor:
        w, b = weight(name)
        return z @ w.T + b

    def layer_norm(name: str, z: torch.Tensor) -> torch.Tensor:
        w, b = weight(name)
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w + b

    def gelu(z: torch.Tensor) -> torch.Tensor:
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    encoder = "tokenizer.encoder."
    w, b = weight(encoder + "patch_embed.proj")
    steps = x.shape[1] // patch
    z = torch.stack(
        [
            w[:, 0, 0] @ x[roi, step * patch : (step + 1) * patch] + b + tensors[encoder + "pos_embed"][0, roi]
            for roi in range(ROIS)
            for step in range(steps)
        ]
    )
    for index in range(LAYERS):
        block, size = f"{encoder}blocks.{index}.", WIDTH // HEADS
        qkv = affine(block + "attn.qkv", layer_norm(block + "norm1", z))
        heads = []
        for head in range(HEADS):
            q, k, v = (qkv[:, part * WIDTH + head * size :][:, :size] for part in range(3))
            heads.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
        z = z + affine(block + "attn.proj", torch.cat(heads, -1))
        z = z + affine(block + "mlp.fc2", gelu(affine(block + "mlp.fc1", layer_norm(block + "norm2", z))))
    z = layer_norm(encoder + ("ln_post" if layout == "released" else "norm"), z)
    if feature_dim == CODE_DIM:
        head = encoder + "conv_out" if layout == "released" else "tokenizer.encode_task_layer"
        z = affine(head + ".2", affine(head + ".0", z).tanh())
    return gelu(affine("encode_transform_layer.0", z)) + tensors["pos_embed.weight"].repeat_interleave(steps, 0)


def mask_and_positions(kinds: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sections D.3 and D.4: may row i see column j, bool [length, length], and position ids [length]. kinds: "t" for a
    token of text, "f" for one of the scan.
    """
    length, first = len(kinds), kinds.index("f")
    seen, places = torch.zeros(length, length, dtype=torch.bool), []
    for i in range(length):
        for j in range(length):
            same = kinds[i] == kinds[j] == "f" and (j - first) // ROIS <= (i - first) // ROIS
            seen[i, j] = j <= i or same
    for i, kind in enumerate(kinds):
        place = first + (i - first) // ROIS if kind == "f" else i if i < first else i - ROIS * steps + steps
        places.append(place)
    return seen, torch.tensor(places)


@pytest.fixture
def backbone_folder(tmp_path: Path) -> Callable[[str], tuple[Path, int]]:
    """Saves configuration and tokenizer of a tiny language model, with as many rows as the tokenizer will need."""

    def save(backbone: str) -> tuple[Path, int]:
        tokenizer = build_tiny_tokenizer()
        vocabulary = len(tokenizer) + 3
        folder = tmp_path / backbone
        build_tiny_language_model(backbone, vocabulary).config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, vocabulary

    return save


def settings(lm_name: str | Path, kind: str):
    values = {"lm_name": str(lm_name), "lora": {"lora_r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj"]}}
    return OmegaConf.create(values) if kind == "omegaconf" else argparse.Namespace(**values)


CASES = {
    "released": ("released", "qwen3", "llm.base_model.base_model.model.", "q_proj k_proj", 160, WIDTH, "omegaconf"),
    "released, codebook features": ("released", "qwen3", "llm.base_model.", None, 160, CODE_DIM, "omegaconf"),
    "december": ("december-2025", "qwen3", "llm.", "q_proj k_proj", 80, WIDTH, "namespace"),
    "december, GPT-2": ("december-2025", "gpt2", "llm.base_model.model.", "c_attn", 160, CODE_DIM, "namespace"),
}


@pytest.mark.parametrize("case", CASES)
def test_converted_checkpoint_computes_the_documented_formulas(case: str, backbone_folder, tmp_path: Path) -> None:
    layout, backbone, prefix, lora, patch, feature_dim, kind = CASES[case]
    folder, vocabulary = backbone_folder(backbone)
    torch.manual_seed(1)
    brain = brain_tensors(layout, patch, feature_dim)
    language, plain = language_tensors(backbone, vocabulary, prefix, lora)
    more = {"model_args": settings(folder, kind), "validation_results": {"sex": np.float64(0.9)}}
    tensors = brain | language if layout == "released" else {"model": brain | language}
    torch.save({**tensors, **more}, tmp_path / "model.pt")
    output = tmp_path / "converted"
    report = convert_original(tmp_path / "model.pt", output, MEDIAN, IQR, atlas=build_tiny_atlas(ROIS))

    # every tensor is used or listed
    assert report["layout"] == layout and report == json.loads((output / "conversion.json").read_text())
    assert sorted([*report["used"], *report["unused"]]) == sorted(brain | language)
    head = {"released": "tokenizer.encoder.conv_out", "december-2025": "tokenizer.encode_task_layer"}[layout]
    spare = {name for name in brain if name.startswith(("tokenizer.patch_embed", "tokenizer.quantize"))}
    if feature_dim == WIDTH:
        spare |= {name for name in brain if name.startswith(head)}
    assert set(report["unused"]) == spare

    model = AutoModelForMultimodalLM.from_pretrained(output).eval()
    processor = AutoProcessor.from_pretrained(output)
    torch.manual_seed(2)
    scan = MEDIAN + 3000 * torch.randn(ROIS) + 140 * torch.randn(200, ROIS)
    chat = [{"role": "user", "content": [{"type": "fmri", "fmri": scan, "tr": 2.0}, {"type": "text", "text": "Old?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    x = (scan[:160].T - MEDIAN) / IQR
    assert torch.allclose(inputs["fmri_values"][0], x, atol=1e-5)
    with torch.no_grad():
        expected = features(brain, layout, x, patch, feature_dim)
        found = model.model.get_fmri_features(model.model.read_scans(inputs["fmri_values"], inputs["roi_coordinates"]))
        assert torch.allclose(found, expected, atol=1e-5)

        # the language model: a plain one with merged weights, and the documented mask and positions
        reference = build_tiny_language_model(backbone, vocabulary)
        reference.load_state_dict(plain)
        kinds = "".join("f" if token == model.config.fmri_token_id else "t" for token in inputs["input_ids"][0])
        steps = 160 // patch
        assert kinds.count("f") == ROIS * steps
        seen, places = mask_and_positions(kinds, steps)
        embeddings = reference.get_input_embeddings()(inputs["input_ids"])[0].clone()
        embeddings[inputs["input_ids"][0] == model.config.fmri_token_id] = expected
        logits = reference(
            inputs_embeds=embeddings[None],
            attention_mask=torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
            position_ids=places[None],
        ).logits
        outputs = model(**inputs, labels=inputs["input_ids"])
    assert torch.allclose(outputs.logits, logits, atol=1e-5 * float(logits.abs().max()))
    assert outputs.fmri_loss is None and outputs.text_loss == outputs.loss
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "released",
            "<|im_start|>user\n<fmri>SCAN</fmri>### Question: Old?\n### Answer:<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nYes<|endoftext|>\n",
        ),
        (
            "december",
            "<fmri>SCAN</fmri><|im_start|>user\n### Question: Old?\n### Answer:<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nYes<|endoftext|>\n",
        ),
    ],
)
def test_prompt_is_the_official_one(case: str, expected: str, backbone_folder, tmp_path: Path) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES[case]
    folder, vocabulary = backbone_folder(backbone)
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(backbone, vocabulary, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    given = {"text_config": str(folder), "atlas": build_tiny_atlas(ROIS)}
    convert_original(tmp_path / "model.pt", tmp_path / "with", MEDIAN, IQR, **given)
    convert_original(tmp_path / "model.pt", tmp_path / "without", MEDIAN, IQR, **given, delimiters=False)
    scan = MEDIAN + 140 * np.random.default_rng(0).normal(size=(160, ROIS))
    blocks = [{"type": "fmri", "fmri": scan, "tr": 2.0}, {"type": "text", "text": "Old?"}]
    chat = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "Yes"}]
    for name, start, end in (("with", "<fmri>", "</fmri>"), ("without", "", "")):
        processor = AutoProcessor.from_pretrained(tmp_path / name)
        pads = "<|fmri_pad|>" * (ROIS * 160 // patch)
        text = processor.apply_chat_template(chat, tokenize=False)
        assert text == expected.replace("<fmri>", start).replace("</fmri>", end).replace("SCAN", pads)
        ids = processor("<|fmri_pad|> Old?", fmri=scan, tr=2.0)["input_ids"][0]
        assert processor.tokenizer.decode(ids) == f"{start}{pads}{end} Old?"


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


def test_settings_are_read_as_plain_data(tmp_path: Path) -> None:
    values = {"lm_name": "some/model", "lora": {"lora_alpha": 2.0, "on": True, "targets": ["q", "k"]}, "none": None}
    for args in (OmegaConf.create(values), argparse.Namespace(**values), values):
        torch.save({"pos_embed.weight": torch.ones(2), "model_args": args}, tmp_path / "model.pt")
        tensors, found = load_checkpoint(tmp_path / "model.pt")
        assert found == values and tensors["pos_embed.weight"].tolist() == [1, 1]


def test_missing_and_misshapen_tensors_are_named(backbone_folder, tmp_path: Path) -> None:
    layout, backbone, prefix, lora, patch, feature_dim, _ = CASES["released"]
    folder, vocabulary = backbone_folder(backbone)
    whole = brain_tensors(layout, patch, feature_dim) | language_tensors(backbone, vocabulary, prefix, lora)[0]

    def convert(tensors: Tensors, **options) -> None:
        torch.save(tensors, tmp_path / "model.pt")
        options = {"lora_alpha": 2.0, "text_config": str(folder), "atlas": build_tiny_atlas(ROIS), **options}
        convert_original(tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, **options)

    def without(*names: str) -> Tensors:
        return {name: value for name, value in whole.items() if name not in names}

    qkv, down = "tokenizer.encoder.blocks.1.attn.qkv.bias", prefix + "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"lacks 2 tensors: {down}, {qkv}$"):
        convert(without(qkv, down))
    for name in (
        "pos_embed.weight",
        "tokenizer.encoder.pos_embed",
        "encode_transform_layer.0.weight",
        "tokenizer.encoder.ln_post.weight",
        prefix + "model.layers.1.self_attn.q_proj.lora_B.default.weight",
    ):
        with pytest.raises(ValueError, match=name):
            convert(without(name))
    with pytest.raises(ValueError, match="expected one LoRA adapter, got 0"):
        convert(without(prefix + "model.layers.1.self_attn.q_proj.lora_A.default.weight"))
    with pytest.raises(ValueError, match=r"one tensor llm.\*model.embed_tokens.weight, got 0"):
        convert(without(prefix + "model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"blocks.0.norm1.weight: expected shape \(128,\), got \(64,\)"):
        convert({**whole, "tokenizer.encoder.blocks.0.norm1.weight": torch.ones(64)})
    with pytest.raises(ValueError, match="give it .the official code says 2"):
        convert(whole, lora_alpha=None)
    with pytest.raises(ValueError, match="which language model"):
        convert(whole, text_config=None)
    with pytest.raises(ValueError, match="knows 5 ROIs, expected an atlas of as many, got Atlas"):
        convert(whole, atlas=None)
    other = prefix + "lm_head.weight"
    with pytest.raises(ValueError, match="head of its own"):
        convert({**whole, other: whole[other] + 1})
    convert({**without(other), "tokenizer.extra": torch.ones(3)})
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["unused"]["tokenizer.extra"] == [3]
    with pytest.raises(ValueError, match="which exists"):
        convert(whole)
    assert not list(tmp_path.glob("*.partial"))


def test_official_atlas_has_subcortex_first() -> None:
    atlas = official_atlas()
    assert len(atlas) == 450 and atlas.labels == tuple(range(1, 451))
    assert atlas.rois[:50] == Atlas.load("tian-s3").rois
    assert np.array_equal(atlas.coordinates[50:], Atlas.load("schaefer-400-7networks").coordinates)


@pytest.mark.parametrize(("patch", "width", "heads"), [(160, 384, 6), (32, 768, 12), (160, 1024, 16)])
def test_sizes_are_read_off_the_tensors(patch: int, width: int, heads: int) -> None:
    shapes = {
        "tokenizer.encoder.pos_embed": (1, 450, width),
        "tokenizer.encoder.patch_embed.proj.weight": (width, 1, 1, patch),
        "tokenizer.encoder.blocks.0.mlp.fc1.weight": (4 * width, width),
        "tokenizer.encoder.blocks.11.mlp.fc1.weight": (4 * width, width),
        "tokenizer.encoder.ln_post.weight": (width,),
        "encode_transform_layer.0.weight": (1024, 128),
    }
    config = Conversion({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}).encoder_config()
    assert (config.num_rois, config.num_patches, config.tokens_per_step) == (450, 160 // patch, 450)
    assert (config.num_attention_heads, config.intermediate_size, config.feature_dim) == (heads, 4 * width, 128)


def test_converted_model_refuses_scans_it_cannot_know(backbone_folder, tmp_path: Path) -> None:
    layout, backbone, prefix, *_, patch, feature_dim, _ = CASES["released"]
    folder, vocabulary = backbone_folder(backbone)
    tensors = brain_tensors(layout, patch, feature_dim) | language_tensors(backbone, vocabulary, prefix, None)[0]
    torch.save(tensors, tmp_path / "model.pt")
    convert_original(
        tmp_path / "model.pt", tmp_path / "out", MEDIAN, IQR, text_config=str(folder), atlas=build_tiny_atlas(ROIS)
    )
    model = FmriLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"\[5, 160\], got \[5, 320\]"):
        model.model.read_scans(torch.zeros(1, 5, 320), torch.zeros(1, 5, 3))
    mask = F.pad(torch.ones(1, 5, 150, dtype=torch.bool), (0, 10))
    with pytest.raises(ValueError, match="without padding, got a mask with 50 frames of it"):
        model.model.read_scans(torch.zeros(1, 5, 160), torch.zeros(1, 5, 3), mask)
