"""The codec: which inputs a code depends on, decoding anywhere, saving, and that it learns."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModel

from fmrilm import FmriCodecConfig, FmriCodecModel
from fmrilm.layers_fmricodec import FmriCodecAttention
from fmrilm.training.codec.optimizers import MuonWithAdamW
from fmrilm.training.codec.trainer import CodecTrainer, CodecTrainingArguments, encode_items
from fmrilm.training.data.dataset import collate_signals


MakeCodec = Callable[..., FmriCodecModel]


def scan(batch: int = 2, rois: int = 5, time: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fmri_values": torch.randn(batch, rois, time, generator=generator),
        "roi_coordinates": torch.rand(batch, rois, 3, generator=generator) * 120 - 60,
    }


def items(count: int, descriptors: int = 3) -> list[dict[str, np.ndarray]]:
    """Slow waves, whose phase differs from ROI to ROI, as `collate_signals` takes them."""
    rng = np.random.default_rng(0)
    time = np.arange(16)[:, None] / 16
    return [
        {
            "signal": np.sin(2 * np.pi * (rng.uniform(0.5, 2) * time + rng.uniform(size=5))).astype(np.float32),
            "coordinates": rng.uniform(-60, 60, (5, 3)).astype(np.float32),
            "descriptors": rng.standard_normal(descriptors).astype(np.float32),
        }
        for _ in range(count)
    ]


def training_arguments(folder, **changes) -> CodecTrainingArguments:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 12,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "unquantized_steps": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return CodecTrainingArguments(**values)


def codec_trainer(model: FmriCodecModel, folder, **changes) -> CodecTrainer:
    args = training_arguments(folder, **changes)
    return CodecTrainer(model=model, args=args, train_dataset=items(24), data_collator=collate_signals)


@pytest.mark.parametrize(("time", "steps"), [(16, 4), (13, 4), (4, 1), (3, 1)])
def test_codes_are_one_per_slot_and_step(tiny_codec: FmriCodecModel, time: int, steps: int) -> None:
    codes = tiny_codec.encode(**scan(3, 5, time))
    assert codes.shape == (3, 2 * steps) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 16
    assert len(codes.unique()) > (2 if steps == 1 else 3)


def test_codes_of_padding_steps_are_minus_one(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(2, 5, 16)
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, :, 9:] = False
    codes = tiny_codec.encode(**inputs, fmri_mask=mask)
    assert ((codes == -1) == (torch.arange(8) >= torch.tensor([[8], [6]]))).all()
    outputs = tiny_codec(**inputs, fmri_mask=mask)
    assert torch.equal(outputs.codes, codes)
    counts = torch.bincount(codes[codes >= 0], minlength=16).float()
    shares = counts[counts > 0] / counts.sum()
    assert outputs.codebook_usage == (counts > 0).float().mean()
    assert torch.allclose(outputs.perplexity, (-(shares * shares.log()).sum()).exp())


@given(
    rois=st.integers(1, 6),
    time=st.integers(1, 16),
    more_rois=st.integers(0, 4),
    before=st.integers(0, 2),
    after=st.integers(0, 8),
    filling=st.sampled_from([0.0, 50.0, float("nan")]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_padding_and_batch_mates_never_change_a_code(
    make_codec: MakeCodec, rois: int, time: int, more_rois: int, before: int, after: int, filling: float, seed: int
) -> None:
    codec = make_codec()
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
    codes = codec.encode(**padded, fmri_mask=mask)
    assert torch.equal(codes[1, : expected.shape[1]], expected[0])
    assert (codes[1, expected.shape[1] :] == -1).all()


def test_padding_changes_no_loss(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(1, 3, 8)
    padded = scan(1, 5, 16, seed=9)
    mask = torch.zeros(1, 5, 16, dtype=torch.bool)
    mask[:, :3, :8] = True
    padded["fmri_values"][:, :3, :8] = inputs["fmri_values"]
    padded["roi_coordinates"][:, :3] = inputs["roi_coordinates"]
    first, second = tiny_codec(**inputs), tiny_codec(**padded, fmri_mask=mask)
    assert torch.allclose(first.loss, second.loss, atol=1e-5)
    assert torch.allclose(first.reconstruction, second.reconstruction[:, :3, :8], atol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_later_frames_leave_earlier_codes_unchanged(tiny_codec: FmriCodecModel, step: int) -> None:
    inputs = scan(8)
    before = tiny_codec.encode(**inputs)
    inputs["fmri_values"][..., 4 * step :] = scan(8, seed=5)["fmri_values"][..., 4 * step :]
    after = tiny_codec.encode(**inputs)
    assert torch.equal(before[:, : 2 * step], after[:, : 2 * step])
    assert not torch.equal(before[:, 2 * step :], after[:, 2 * step :])


def test_earlier_frames_are_context_of_later_codes(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(8)
    before = tiny_codec.encode(**inputs)
    inputs["fmri_values"][..., :4] = scan(8, seed=5)["fmri_values"][..., :4]
    assert not torch.equal(before[:, 2:], tiny_codec.encode(**inputs)[:, 2:])


def test_order_of_rois_is_of_no_importance(tiny_codec: FmriCodecModel) -> None:
    inputs = scan()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: value[:, order] for name, value in inputs.items()}
    assert torch.equal(tiny_codec.encode(**inputs), tiny_codec.encode(**permuted))
    features, permuted_features = (tiny_codec.encode_features(**values)[0] for values in (inputs, permuted))
    assert torch.allclose(features, permuted_features, atol=1e-5)


def test_same_signal_elsewhere_in_the_brain_has_other_codes(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(8)
    moved = {**inputs, "roi_coordinates": inputs["roi_coordinates"].flip(1)}
    assert not torch.equal(tiny_codec.encode(**inputs), tiny_codec.encode(**moved))


def test_decodes_at_any_coordinates(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(2, 5, 16)
    codes = tiny_codec.encode(**inputs)
    elsewhere = scan(2, 9, 16, seed=4)["roi_coordinates"]
    elsewhere[:, 4] = inputs["roi_coordinates"][:, 2]
    signal = tiny_codec.decode(codes, inputs["roi_coordinates"])
    other = tiny_codec.decode(codes, elsewhere)
    assert signal.shape == (2, 5, 16) and other.shape == (2, 9, 16)
    # a place has one signal, whatever other places are asked for
    assert torch.allclose(signal[:, 2], other[:, 4], atol=1e-5)
    assert not torch.allclose(signal[:, 2], other[:, 3], atol=1e-3)


def test_forward_decodes_its_own_codes(tiny_codec: FmriCodecModel) -> None:
    inputs = scan(2, 5, 14)
    outputs = tiny_codec(**inputs)
    decoded = tiny_codec.decode(outputs.codes, inputs["roi_coordinates"])
    assert outputs.reconstruction.shape == (2, 5, 14)
    assert torch.allclose(outputs.reconstruction, decoded[..., :14], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_prefix_of_codes_decodes_to_the_prefix_of_the_signal(tiny_codec: FmriCodecModel, steps: int) -> None:
    inputs = scan()
    codes = tiny_codec.encode(**inputs)
    whole = tiny_codec.decode(codes, inputs["roi_coordinates"])
    prefix = tiny_codec.decode(codes[:, : 2 * steps], inputs["roi_coordinates"])
    assert torch.allclose(prefix, whole[..., : 4 * steps], atol=1e-5)


def test_decoding_does_not_depend_on_padding_steps(tiny_codec: FmriCodecModel) -> None:
    inputs = scan()
    codes = tiny_codec.encode(**inputs)
    # another step's codes in place of the padding would show up in the steps after it
    codes[:, 2:4] = -1
    missing = tiny_codec.decode(codes, inputs["roi_coordinates"])
    codes[:, 2:4] = 5
    wrong = tiny_codec.decode(codes, inputs["roi_coordinates"])
    assert torch.allclose(missing[..., :4], wrong[..., :4], atol=1e-5)
    assert not torch.allclose(missing[..., 8:], wrong[..., 8:], atol=1e-3)


def test_eager_and_sdpa_attention_agree(make_codec: MakeCodec) -> None:
    inputs = scan()
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 9:] = False, False
    results = {}
    for implementation in ("eager", "sdpa"):
        codec = make_codec()
        codec.set_attn_implementation(implementation)
        assert codec.config._attn_implementation == implementation
        results[implementation] = codec(**inputs, fmri_mask=mask).reconstruction
    assert torch.allclose(results["eager"], results["sdpa"], atol=1e-5)


def test_saved_codec_is_the_same_codec(tiny_codec: FmriCodecModel, tmp_path) -> None:
    tiny_codec.train()
    tiny_codec(**scan(8))
    tiny_codec.eval().save_pretrained(tmp_path)
    for loaded in (FmriCodecModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is FmriCodecModel and not loaded.training
        expected = tiny_codec.state_dict()
        assert loaded.state_dict().keys() == expected.keys() and "quantizer.codebook" in expected
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(loaded.encode(**scan()), tiny_codec.encode(**scan()))
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == tiny_codec.config.to_diff_dict()


def test_codebook_stays_in_full_precision(tiny_codec: FmriCodecModel, tmp_path) -> None:
    tiny_codec.save_pretrained(tmp_path)
    loaded = FmriCodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.quantizer.codebook.dtype == torch.float32
    assert loaded(**scan()).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_coordinates": None}, r"roi_coordinates of shape \(2, 5, 3\), got None"),
        ({"roi_coordinates": torch.zeros(2, 4, 3)}, r"roi_coordinates of shape \(2, 5, 3\), got \(2, 4, 3\)"),
        ({"fmri_mask": torch.ones(2, 5, dtype=torch.bool)}, r"fmri_mask of shape \(2, 5, 16\), got \(2, 5\)"),
        ({"fmri_mask": torch.arange(2)[:, None, None].expand(2, 5, 16) > 0}, "fmri_mask is all False"),
        (scan(2, 5, 33), "max_steps=8 steps, got 9"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny_codec: FmriCodecModel, change: dict, message: str) -> None:
    for method in (tiny_codec.encode, tiny_codec):
        with pytest.raises(ValueError, match=message):
            method(**{**scan(), **change})


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="got 16 and 3"):
        FmriCodecConfig(hidden_size=16, num_attention_heads=3)


def test_unknown_descriptors_have_no_part_in_the_loss(make_codec: MakeCodec) -> None:
    codec = make_codec(descriptor_names=["a", "b", "c"])
    inputs = scan()
    targets = torch.tensor([[1.0, float("nan"), 2.0], [float("nan"), float("nan"), 0.5]])
    outputs = codec(**inputs, descriptors=targets)
    known = ~targets.isnan()
    expected = (outputs.descriptors[known] - targets[known]).pow(2).mean()
    assert torch.allclose(outputs.descriptor_loss, expected)
    assert torch.allclose(outputs.loss, outputs.reconstruction_loss + outputs.commitment_loss + expected)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in codec.parameters() if parameter.grad is not None)
    assert codec(**inputs, descriptors=torch.full((2, 3), float("nan"))).descriptor_loss == 0


def test_overfits_one_batch(make_codec: MakeCodec, tmp_path) -> None:
    model = make_codec(
        started=False, descriptor_names=["a", "b", "c"], hidden_size=32, tokens_per_step=3, codebook_size=32
    )
    batch = items(4)
    args = training_arguments(tmp_path, max_steps=100, unquantized_steps=40, learning_rate=1e-2)
    trainer = CodecTrainer(model=model, args=args, train_dataset=batch, data_collator=collate_signals)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reconstruction_loss" in entry]
    assert {"commitment_loss", "descriptor_loss", "perplexity"} <= set(history[0])
    assert history[-1]["reconstruction_loss"] < 0.25 * history[0]["reconstruction_loss"]
    # the first logged steps are unrounded: no codebook yet to commit to
    assert history[0]["commitment_loss"] == 0 < history[-1]["commitment_loss"]
    assert model.quantizer.started


def test_gradient_checkpointing_changes_no_gradient(make_codec: MakeCodec) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_codec().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**scan()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        codebook = model.quantizer.codebook
        # the codebook moves once a step, not once more when layers run again
        gradients[-1]["codebook"] = codebook
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_codes_of_items_come_back_in_their_order(tiny_codec: FmriCodecModel) -> None:
    mixed = items(5)
    mixed[1] = {**mixed[1], "signal": mixed[1]["signal"][:, :3], "coordinates": mixed[1]["coordinates"][:3]}
    codes = encode_items(tiny_codec, mixed, batch_size=2)
    for row, item in enumerate(mixed):
        assert np.array_equal(codes[row], encode_items(tiny_codec, [item])[0])


def test_muon_steps_the_layers_matrices_alone(tiny_codec: FmriCodecModel) -> None:
    optimizer = MuonWithAdamW.for_layers(tiny_codec, 1e-3)
    names = {id(parameter): name for name, parameter in tiny_codec.named_parameters()}
    muon, adamw = ([names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups)
    assert sorted(muon + adamw) == sorted(names.values())
    assert "encoder.layers.0.attention.q_proj.weight" in muon and "encoder.roi_layers.0.mlp.0.weight" in muon
    assert all("layers." in name and name.endswith("weight") and "norm" not in name for name in muon)
    assert {"encoder.queries", "encoder.analysis.weight", "encoder.layers.0.attention.q_proj.bias"} <= set(adamw)


def test_optimizer_loaded_from_its_state_goes_on_the_same(tiny_codec: FmriCodecModel) -> None:
    def steps(model: FmriCodecModel, optimizer: MuonWithAdamW, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(**scan()).loss.backward()
            optimizer.step()

    optimizer = MuonWithAdamW.for_layers(tiny_codec, 1e-2)
    steps(tiny_codec, optimizer, 3)
    twin = copy.deepcopy(tiny_codec)
    loaded = MuonWithAdamW.for_layers(twin, 1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["lr"] == 1e-2
    steps(tiny_codec, optimizer, 3)
    steps(twin, loaded, 3)
    assert all(torch.equal(a, b) for a, b in zip(tiny_codec.parameters(), twin.parameters(), strict=True))
    assert len(loaded.state) == len(list(twin.parameters()))


def test_schedulers_reach_both_optimisers(tiny_codec: FmriCodecModel) -> None:
    optimizer = MuonWithAdamW.for_layers(tiny_codec, 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(tiny_codec.state_dict())
    tiny_codec(**scan()).loss.backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.equal(value, before[name]) for name, value in tiny_codec.state_dict().items())


def test_resumed_training_equals_uninterrupted_training(make_codec: MakeCodec, tmp_path) -> None:
    whole = make_codec(started=False)
    codec_trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    resumed = make_codec(started=False)
    trainer = codec_trainer(resumed, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.global_step == 6 and not torch.equal(whole.quantizer.usage, torch.ones(16))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_attention_weights_are_a_distribution(tiny_codec: FmriCodecModel) -> None:
    attention = tiny_codec.encoder.layers[0].attention
    assert isinstance(attention, FmriCodecAttention)
    states = torch.randn(1, 4, 16)
    only_first = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    only_first[..., 0] = True
    output = attention(states, states, only_first)
    assert torch.allclose(output, output[:, :1].expand_as(output), atol=1e-6)


@pytest.mark.parametrize("layout", ["latent", "roi"])
def test_codec_is_built_where_tensors_have_no_values(make_codec, layout: str) -> None:
    # so are operations counted
    with FakeTensorMode():
        codec = make_codec(started=False, token_layout=layout)
    assert all(isinstance(value, FakeTensor) for value in codec.parameters())
