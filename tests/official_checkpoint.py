"""Random checkpoints in the documented official layouts at small size, and the documented formulas, written out."""

import math

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


ROIS, WIDTH, HEADS, LAYERS, TEXT_WIDTH, CODE_DIM = 5, 128, 2, 2, 32, 8
Tensors = dict[str, torch.Tensor]


def linear(name: str, out: int, inside: int) -> Tensors:
    return {f"{name}.weight": torch.randn(out, inside) / math.sqrt(inside), f"{name}.bias": 0.1 * torch.randn(out)}


def norm(name: str) -> Tensors:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(WIDTH), f"{name}.bias": 0.1 * torch.randn(WIDTH)}


# the training code saves the encoder itself as the tokenizer
PREFIXES = {"released": "tokenizer.encoder.", "december-2025": "tokenizer."}


def brain_tensors(layout: str, patch: int, feature_dim: int) -> Tensors:
    """Encoder, projector and what neither needs, by the names of the official code."""
    encoder = PREFIXES[layout]
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


def language_tensors(
    model: PreTrainedModel, prefix: str, lora: str | None, alpha: float = 2.0
) -> tuple[Tensors, Tensors]:
    """
    A language model by official names, random adapters beside the weights that `lora` names; and its own state with
    these merged.
    """
    transposed = model.config.model_type == "gpt2"
    tensors, plain = {}, dict(model.state_dict())
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if lora is None or not module.endswith(tuple(lora.split())):
            tensors[prefix + name] = value
            continue
        tensors[f"{prefix}{module}.base_layer.{leaf}"] = value
        if leaf == "bias":
            continue
        out, inside = value.T.shape if transposed else value.shape
        a, b = torch.randn(1, inside), torch.randn(out, 1)
        tensors[f"{prefix}{module}.lora_A.default.weight"] = a
        tensors[f"{prefix}{module}.lora_B.default.weight"] = b
        # over rank 1
        update = alpha * b @ a
        plain[name] = value + (update.T if transposed else update)
    return tensors, plain


def features(tensors: Tensors, layout: str, x: torch.Tensor, patch: int, feature_dim: int) -> torch.Tensor:
    """h_fmri [tokens, hidden] of one scan x [rois, time] as sections B.2 and D.1 of the formulas say, ROI-major."""

    def weight(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors[name + ".weight"], tensors[name + ".bias"]

    def affine(name: str, z: torch.Tensor) -> torch.Tensor:
        return F.linear(z, *weight(name))

    def layer_norm(name: str, z: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(z, (WIDTH,), *weight(name), eps=1e-6)

    encoder = PREFIXES[layout]
    w, b = weight(encoder + "patch_embed.proj")
    steps = x.shape[1] // patch
    patches = F.linear(x.unflatten(1, (steps, patch)), w[:, 0, 0], b)
    z = (patches + tensors[encoder + "pos_embed"][0, :, None]).flatten(0, 1)
    for index in range(LAYERS):
        block = f"{encoder}blocks.{index}."
        qkv = affine(block + "attn.qkv", layer_norm(block + "norm1", z))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        heads = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        z = z + affine(block + "attn.proj", heads.transpose(0, 1).flatten(1))
        z = z + affine(block + "mlp.fc2", F.gelu(affine(block + "mlp.fc1", layer_norm(block + "norm2", z))))
    z = layer_norm(encoder + ("ln_post" if layout == "released" else "norm"), z)
    if feature_dim == CODE_DIM:
        head = encoder + "conv_out" if layout == "released" else "tokenizer.encode_task_layer"
        z = affine(head + ".2", affine(head + ".0", z).tanh())
    return F.gelu(affine("encode_transform_layer.0", z)) + tensors["pos_embed.weight"].repeat_interleave(steps, 0)


def mask_and_positions(kinds: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sections D.3 and D.4: may row i see column j, bool [length, length], and position ids [length]. kinds: "t" for a
    token of text, "f" for one of the scan.
    """
    index, is_scan, first = torch.arange(len(kinds)), torch.tensor([kind == "f" for kind in kinds]), kinds.index("f")
    roi = (index - first) // ROIS
    same = is_scan & is_scan[:, None] & (roi <= roi[:, None])
    text = torch.where(index < first, index, index - ROIS * steps + steps)
    return (index <= index[:, None]) | same, torch.where(is_scan, first + roi, text)
