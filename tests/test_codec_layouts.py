"""What holds for every token layout and quantiser of the codec."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm import FmriCodecConfig, FmriCodecModel, latent_fmricodec, modeling_fmricodec, roi_fmricodec
from fmrilm.layers_fmricodec import FmriCodecAttention


MakeCodec = Callable[..., FmriCodecModel]
FSQ = {"quantizer": "fsq", "fsq_levels": [5, 4, 3]}
KINDS = {
    "latent-vq": {},
    "latent-fsq": FSQ,
    "roi-vq": {"token_layout": "roi"},
    "roi-fsq": {"token_layout": "roi", **FSQ},
}


def scan(batch: int = 2, rois: int = 5, time: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fmri_values": torch.randn(batch, rois, time, generator=generator),
        "roi_coordinates": torch.rand(batch, rois, 3, generator=generator) * 120 - 60,
    }


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def codec(request: pytest.FixtureRequest, make_codec: MakeCodec) -> FmriCodecModel:
    return make_codec(**request.param)


def per_step(codec: FmriCodecModel, rois: int) -> int:
    return rois if codec.config.token_layout == "roi" else codec.config.tokens_per_step


def test_tokens_are_counted_by_the_layout(codec: FmriCodecModel) -> None:
    for rois, time, steps in ((5, 16, 4), (3, 13, 4), (7, 3, 1)):
        inputs = scan(2, rois, time)
        codes = codec.encode(**inputs)
        assert codes.shape == (2, steps * per_step(codec, rois)) and codes.dtype == torch.int64
        assert 0 <= codes.min() and codes.max() < codec.config.codebook_size
        assert codec.decode(codes, inputs["roi_coordinates"]).shape == (2, rois, 4 * steps)


def test_features_are_what_codes_are_rounded_from(codec: FmriCodecModel) -> None:
    inputs = scan()
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 9:] = False, False
    features, token_mask = codec.encode_features(**inputs, fmri_mask=mask)
    codes = codec.encode(**inputs, fmri_mask=mask)
    assert torch.equal(token_mask, codes >= 0) and features.dtype == torch.float32
    assert features.shape == (*codes.shape, codec.config.codebook_dim)
    embedded = codec.embed_codes(codes[token_mask])
    if codec.config.quantizer == "vq":
        assert torch.allclose(features.norm(dim=-1), torch.ones(codes.shape))
        assert torch.equal(codec.quantizer.encode(features)[token_mask], codes[token_mask])
    else:
        half_widths = torch.tensor([2, 2, 1])
        assert ((features[token_mask] - embedded) * half_widths).abs().max() <= 0.5 + 1e-5
    assert torch.equal(codec(**inputs, fmri_mask=mask).codes, codes)


@given(
    rois=st.integers(1, 6),
    time=st.integers(1, 16),
    more_rois=st.integers(0, 4),
    before=st.integers(0, 2),
    after=st.integers(0, 8),
    filling=st.sampled_from([0.0, 50.0, float("nan")]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_padding_and_batch_mates_never_change_a_code(
    codec: FmriCodecModel, rois: int, time: int, more_rois: int, before: int, after: int, filling: float, seed: int
) -> None:
    # whole steps of padding in front move the scan in time: only what stands between and behind is free
    alone = scan(1, rois, time + 4 * before, seed)
    alone_mask = torch.ones_like(alone["fmri_values"], dtype=torch.bool)
    alone_mask[..., : 4 * before] = False
    expected = codec.encode(**alone, fmri_mask=alone_mask)

    padded = scan(3, rois + more_rois, time + 4 * before + after, seed + 1)
    mask = torch.ones_like(padded["fmri_values"], dtype=torch.bool)
    mask[1] = False
    mask[1, :rois, 4 * before : time + 4 * before] = True
    padded["fmri_values"][1, :rois, : time + 4 * before] = alone["fmri_values"][0]
    padded["fmri_values"] = padded["fmri_values"].where(mask, torch.tensor(filling))
    padded["roi_coordinates"][1, :rois] = alone["roi_coordinates"][0]
    codes = codec.encode(**padded, fmri_mask=mask)[1]
    if codec.config.token_layout == "roi":
        steps = codes.unflatten(0, (-1, rois + more_rois))
        assert (steps[:, rois:] == -1).all()
        codes = steps[:, :rois].flatten()
    assert torch.equal(codes[: expected.shape[1]], expected[0])
    assert (codes[expected.shape[1] :] == -1).all()


@given(step=st.integers(1, 4), size=st.sampled_from([0.1, 1.0, 100.0]), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_later_frames_leave_earlier_codes_unchanged_bit_for_bit(
    codec: FmriCodecModel, step: int, size: float, seed: int
) -> None:
    inputs = scan(2, 5, 20, seed)
    features, _ = codec.encode_features(**inputs)
    codes = codec.encode(**inputs)
    inputs["fmri_values"][..., 4 * step :] += size * scan(2, 5, 20, seed + 1)["fmri_values"][..., 4 * step :]
    later, _ = codec.encode_features(**inputs)
    first = step * per_step(codec, 5)
    assert torch.equal(features[:, :first], later[:, :first])
    assert torch.equal(codes[:, :first], codec.encode(**inputs)[:, :first])
    assert step == 5 or not torch.equal(features[:, first:], later[:, first:])


def test_earlier_frames_are_context_of_later_tokens(codec: FmriCodecModel) -> None:
    inputs = scan(2)
    before, _ = codec.encode_features(**inputs)
    inputs["fmri_values"][..., :4] = scan(2, seed=5)["fmri_values"][..., :4]
    after, _ = codec.encode_features(**inputs)
    assert (before - after)[:, per_step(codec, 5) :].abs().max() > 1e-3


@given(st.permutations(range(6)), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_order_of_rois_is_of_no_importance(codec: FmriCodecModel, order: list[int], seed: int) -> None:
    inputs = scan(2, 6, 12, seed)
    features, _ = codec.encode_features(**inputs)
    permuted, _ = codec.encode_features(**{name: value[:, order] for name, value in inputs.items()})
    if codec.config.token_layout == "roi":
        # tokens go where their ROIs go
        features = features.unflatten(1, (3, 6))[:, :, order].flatten(1, 2)
    assert torch.allclose(features, permuted, atol=1e-5)


def test_roi_layout_agrees_with_attention_under_one_causal_mask(make_codec: MakeCodec) -> None:
    layer = make_codec(token_layout="roi").encoder.layers[0]
    states = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    step = torch.arange(12) // 4
    mask = (step[None, :] <= step[:, None])[None, None]
    assert torch.allclose(layer(states, None, steps=3), layer(states, mask.expand(2, 1, 12, 12)), atol=1e-6)


def test_roi_layout_decodes_its_own_rois_alone(make_codec: MakeCodec) -> None:
    codec = make_codec(token_layout="roi")
    codes = codec.encode(**scan(2, 5, 16))
    with pytest.raises(ValueError, match="multiple of 3 tokens, got 20"):
        codec.decode(codes, scan(2, 3)["roi_coordinates"])


@pytest.mark.parametrize("rois", [4, 6])
def test_language_model_reads_the_roi_layout_with_one_roi_count(tiny_model, make_codec: MakeCodec, rois: int) -> None:
    model = tiny_model().model
    model.codec = make_codec(token_layout="roi", tokens_per_step=5)
    model.config.codec_config = model.codec.config
    assert model.get_fmri_codes(**scan(2, 5, 12)).shape == (2, 15)
    message = f"expected tokens_per_step=5 ROIs with data in each step, got between {rois} and {rois} of {rois}"
    with pytest.raises(ValueError, match=message):
        model.get_fmri_codes(**scan(2, rois, 12))
    mask = torch.ones(2, 5, 12, dtype=torch.bool)
    mask[1, 4] = False
    with pytest.raises(ValueError, match="got between 4 and 5 of 5"):
        model.get_fmri_codes(**scan(2, 5, 12), fmri_mask=mask)


def test_eager_and_sdpa_attention_agree(codec: FmriCodecModel) -> None:
    inputs = scan()
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 9:] = False, False
    other = copy.deepcopy(codec)
    other.set_attn_implementation("eager")
    assert (codec.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    expected, found = codec(**inputs, fmri_mask=mask), other(**inputs, fmri_mask=mask)
    assert torch.equal(expected.codes, found.codes)
    assert torch.allclose(expected.reconstruction, found.reconstruction, atol=1e-5)


@pytest.mark.parametrize("kind", ["latent-vq", "roi-fsq"])
@pytest.mark.parametrize("masked", [False, True])
def test_encode_compiles_to_one_graph(make_codec: MakeCodec, kind: str, masked: bool) -> None:
    codec, inputs = make_codec(**KINDS[kind], num_hidden_layers=1), scan()
    if masked:
        inputs["fmri_mask"] = torch.ones(2, 5, 16, dtype=torch.bool)
        inputs["fmri_mask"][1, 3:] = False
    compiled = torch.compile(codec.encode, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), codec.encode(**inputs))


def test_mask_that_hides_nothing_is_left_out(codec: FmriCodecModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mask = scan(), torch.ones(2, 5, 16, dtype=torch.bool)
    # a ROI with some frames missing still has data in each step
    mask[0, 2, ::4] = False
    values = inputs["fmri_values"].where(mask, 0)
    outputs = codec(**{**inputs, "fmri_values": values})
    seen = []
    attention = FmriCodecAttention.forward
    monkeypatch.setattr(
        FmriCodecAttention, "forward", lambda self, *args: seen.append(args[2]) or attention(self, *args)
    )
    masked = codec(**inputs, fmri_mask=mask)
    # the latents of a step see no later step, whatever is padded
    assert all(visible is None or visible.shape[0] == 1 for visible in seen) and len(seen) >= 3
    assert torch.equal(masked.codes, outputs.codes) and torch.equal(masked.reconstruction, outputs.reconstruction)
    for module in (latent_fmricodec, roi_fmricodec, modeling_fmricodec):
        monkeypatch.setattr(module, "hiding", lambda mask: mask)
    dense = codec(**inputs, fmri_mask=mask)
    assert torch.equal(masked.codes, dense.codes)
    assert torch.allclose(masked.reconstruction, dense.reconstruction, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient(codec: FmriCodecModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(codec).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**scan()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        # a codebook moves once a step, not once more when layers run again
        gradients[-1].update(model.quantizer.named_buffers())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_codes_are_searched_in_full_precision_under_autocast(codec: FmriCodecModel) -> None:
    inputs = scan()
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = codec.encode_features(**inputs)
        codes, outputs = codec.encode(**inputs), codec(**inputs)
    assert features.dtype == torch.float32 and outputs.loss.isfinite()
    # the states are rounded to bfloat16, the search among codes is not
    assert torch.equal(codes, outputs.codes)
    if codec.config.quantizer == "vq":
        assert torch.equal(codes, (features @ codec.quantizer.codebook.T).argmax(-1))


def test_saved_codec_is_the_same_codec(codec: FmriCodecModel, tmp_path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = FmriCodecModel.from_pretrained(tmp_path)
    assert loaded.config.token_layout == codec.config.token_layout
    assert torch.equal(loaded.encode(**scan()), codec.encode(**scan()))


@pytest.mark.parametrize(("size", "million"), [("small", 46.1), ("base", 176.8), ("large", 614.4)])
def test_named_sizes_are_those_of_the_paper(size: str, million: float) -> None:
    config = FmriCodecConfig.from_size(size, patch_length=32)
    with torch.device("meta"):
        codec = FmriCodecModel(config)
    # which the paper's codec has not
    encoder = codec.encoder
    linear = (encoder.analysis, codec.decoder.synthesis, codec.decoder.to_coefficients, codec.functions)
    reading = (encoder.roi_layers, encoder.read_layers, encoder.connectivity, *linear)
    count = codec.num_parameters() - sum(value.numel() for part in reading for value in part.parameters())
    assert abs(count / 1e6 - million) < 0.07 * million
    assert config.patch_length == 32 and FmriCodecConfig.from_size("base").to_dict() == FmriCodecConfig().to_dict()


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="tiny, small, base, large, got 'huge'"):
        FmriCodecConfig.from_size("huge")
