"""Losses of the codec: golden numbers, and where each of them sends its gradient."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fmrilm import FmriCodecModel
from fmrilm.modeling_fmricodec import siglip_loss


MakeCodec = Callable[..., FmriCodecModel]
ENCODER = {"spatial_basis", "analysis", "patch_encoder"}
# scans are described by what is decoded
DECODER = {"synthesis", "patch_decoder"}
GRADIENT_REACHES = {
    "reconstruction_loss": ENCODER | DECODER,
    "commitment_loss": ENCODER,
    "descriptor_loss": ENCODER | DECODER | {"descriptor_head"},
    "alignment_loss": ENCODER
    | DECODER
    | {f"alignment_head.{name}" for name in ("scan_proj", "text_proj", "log_scale", "bias")},
}


@pytest.fixture(scope="module")
def codec(make_codec: MakeCodec) -> FmriCodecModel:
    model = make_codec(descriptor_names=["a", "b"], text_hidden_size=12, alignment_size=5)
    # what the transformers add starts at zero, where no gradient passes
    for part in (model.patch_encoder, model.patch_decoder):
        torch.nn.init.normal_(part.output_proj.weight, std=0.1)
    return model


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fmri_values": torch.randn(4, 5, 16, generator=generator),
        "roi_coordinates": torch.rand(4, 5, 3, generator=generator) * 120 - 60,
        "descriptors": torch.randn(4, 2, generator=generator),
        "text_embeddings": torch.randn(4, 12, generator=generator),
    }


def part_of(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("alignment_head") else 1])


def gradients(model: FmriCodecModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None and value.any()}


def test_golden_number_of_the_sigmoid_loss() -> None:
    scale, value = 14.2857, 0.802779
    scans = F.normalize(torch.arange(32.0).sin().reshape(4, 8), dim=-1)
    texts = F.normalize((0.3 * torch.arange(32.0)).cos().reshape(4, 8), dim=-1)
    # ours is summed over the four texts, as its authors have it; the golden number is their mean
    assert siglip_loss(scans, texts, scale, 0.0).item() / 4 == pytest.approx(value, abs=1e-5)
    halves = siglip_loss(scans[:2], texts, scale, 0.0) + siglip_loss(scans[2:], texts, scale, 0.0, first=2)
    assert halves == pytest.approx(8 * value, abs=1e-4)


@pytest.mark.parametrize("name", GRADIENT_REACHES)
def test_each_loss_sends_gradient_where_it_should_and_nowhere_else(codec: FmriCodecModel, name: str) -> None:
    outputs = codec(**batch())
    expected = GRADIENT_REACHES[name]
    assert {part_of(parameter) for parameter in gradients(codec, outputs[name])} == expected


def test_total_is_the_weighted_sum_and_reaches_every_parameter(codec: FmriCodecModel) -> None:
    outputs = codec(**batch())
    config = codec.config
    weights = [1, config.commitment_weight, config.descriptor_weight, config.alignment_weight]
    expected = sum(weight * outputs[name] for weight, name in zip(weights, GRADIENT_REACHES, strict=True))
    assert torch.allclose(outputs.loss, expected)
    reached = gradients(codec, outputs.loss)
    # rows of steps that no scan has, and keys' biases, which softmax does not see
    unreached = {name for name, _ in codec.named_parameters()} - set(reached)
    assert all(name.endswith("k_proj.bias") for name in unreached)


def test_descent_matches_scans_with_their_texts(make_codec: MakeCodec) -> None:
    # fine levels: two scans must not round to the same codes
    grid = {"quantizer": "fsq", "fsq_levels": [33, 33, 33], "num_quantizers": 1}
    codec = make_codec(text_hidden_size=12, alignment_size=5, **grid)
    inputs = batch()
    del inputs["descriptors"]
    codec.alignment_head.fit_texts(inputs["text_embeddings"])
    optimizer = torch.optim.Adam(codec.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        losses.append(codec(**inputs).alignment_loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    similarity = codec(**inputs).scan_embeddings @ codec.alignment_head.embed_texts(inputs["text_embeddings"]).T
    assert torch.equal(similarity.argmax(-1), torch.arange(4))


def test_codec_without_a_text_size_has_no_heads(make_codec: MakeCodec) -> None:
    codec = make_codec()
    assert codec.alignment_head is None and codec(**batch()).scan_embeddings is None
