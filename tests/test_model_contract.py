"""What transformers expects of any model: the codec with either quantiser and the joint model on each backbone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from fmrilm import FmriCodecModel, FmriLMForConditionalGeneration, FmriLMModel
from scan_rows import BACKBONES, LONG, SHORT, codes, ids, pad


CODECS = {"vq": {}, "fsq": {"quantizer": "fsq", "fsq_levels": [5, 4, 3]}}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=[*CODECS, *BACKBONES])
def built(request, make_codec: Callable, tiny_model: Callable) -> PreTrainedModel:
    """Each model with every part that a configuration can ask for."""
    if request.param in BACKBONES:
        return tiny_model(request.param)
    heads = {"descriptor_names": ["a", "b"], "text_hidden_size": 12, "alignment_size": 8}
    codec = make_codec(**CODECS[request.param], **heads)
    for transformer in (codec.patch_encoder, codec.patch_decoder):
        # at zero nothing before it has a gradient
        torch.nn.init.normal_(transformer.output_proj.weight, std=0.1)
    return codec


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch with padding, with all that the model's losses need."""
    if isinstance(model, FmriLMForConditionalGeneration):
        batch = pad([ids(model, "a", LONG, "answer"), ids(model, SHORT, "b")], "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "fmri_codes": codes(LONG, SHORT), "labels": labels}
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 5, 16, dtype=torch.bool)
    mask[1, :, 8:] = False
    return {
        "fmri_values": torch.randn(4, 5, 16, generator=generator),
        "roi_coordinates": 60 * torch.randn(4, 5, 3, generator=generator),
        "fmri_mask": mask,
        "descriptors": torch.randn(4, 2, generator=generator),
        "text_embeddings": torch.randn(4, 12, generator=generator),
    }


@torch.no_grad()
def answer(model: PreTrainedModel) -> torch.Tensor:
    """What the model says to `inputs_of` it, in evaluation."""
    outputs = model.eval()(**inputs_of(model))
    return outputs.logits if isinstance(model, FmriLMForConditionalGeneration) else outputs.reconstruction


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def trainable(model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_save_and_load_miss_nothing_and_keep_every_output(shard_size: str, built, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path, max_shard_size=shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_size == "20KB")
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    loaded, report = type(built).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training and torch.equal(answer(loaded), answer(built))
    assert equal(loaded.state_dict(), built.state_dict())
    assert trainable(loaded) == trainable(built)
    inner = built.model if isinstance(built, FmriLMForConditionalGeneration) else built
    assert inner is not built or loaded.config.to_diff_dict() == built.config.to_diff_dict()
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is type(inner) and not any(report.values()), report
    assert equal(base.state_dict(), inner.state_dict())
    # each tensor is stored once
    names = [name for path in shards for name in safe_open(path, "pt").keys()]
    tied = set(built.all_tied_weights_keys)
    assert len(names) == len(set(names)) and set(names) == set(built.state_dict()) - tied


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tied_weights_are_one_tensor_through_copies_casts_and_training(backbone: str, tiny_model) -> None:
    model = tiny_model(backbone, True).train()
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64).float()):
        assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    before = model.get_output_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model(**inputs_of(model)).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_output_embeddings().weight, before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = tiny_model(backbone, False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_token_embeddings_are_resized_with_their_head(backbone: str, tied: bool, tiny_model, tmp_path) -> None:
    model = tiny_model(backbone, tied)
    before, size = answer(model), model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 1, pad_to_multiple_of=64)
    padded = -(-(size + 1) // 64) * 64
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == padded
    assert model.get_output_embeddings().out_features == padded == model.get_output_embeddings().weight.shape[0]
    assert torch.allclose(answer(model)[..., :size], before, atol=1e-5)
    assert model(**inputs_of(model)).loss.isfinite()
    model.resize_token_embeddings(size)
    assert torch.allclose(answer(model), before, atol=1e-5)
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.config.text_config.vocab_size == size + 5 == answer(model).shape[-1]
    assert torch.allclose(answer(model)[..., :size], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    for resized in (model, loaded):
        assert (resized.get_output_embeddings().weight is resized.get_input_embeddings().weight) == tied


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    model.train()(**inputs_of(model)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(built) -> None:
    plain, checkpointed = copy.deepcopy(built), built
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing
    layers = [name for name, module in checkpointed.named_modules() if getattr(module, "gradient_checkpointing", None)]
    # the joint model's codec is frozen and runs without gradients
    trained = "causal_lm" if isinstance(built, FmriLMForConditionalGeneration) else "coder"
    assert any(trained in name for name in layers)
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name
    # codebooks move once
    assert equal(dict(plain.named_buffers()), dict(checkpointed.named_buffers()))
    checkpointed.activation_checkpointing_disable()
    assert not checkpointed.is_activation_checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_trainable_parameter_is_trained(dtype: torch.dtype, built) -> None:
    for name, gradient in gradients(built.to(dtype)).items():
        assert gradient is not None and gradient.isfinite().all(), name
        # softmax does not see what is added to all keys alike
        assert name.endswith("k_proj.bias") or gradient.abs().max() > 0, name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_hidden_states_and_attentions_come_out_on_request(backbone: str, tiny_model) -> None:
    model = tiny_model(backbone)
    inputs = inputs_of(model)
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    batch, length = inputs["input_ids"].shape
    layers, heads = 2, 2
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(batch, length, 32)] * (layers + 1)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(batch, heads, length, length)] * layers
    assert torch.equal(model.get_output_embeddings()(outputs.hidden_states[-1]), outputs.logits)
    valid = inputs["attention_mask"].bool()
    for weights in outputs.attentions:
        assert torch.allclose(weights.sum(-1).transpose(1, 2)[valid], torch.ones(()), atol=1e-5)
        assert weights.triu(1).abs().max() == 0
    asked = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(asked, tuple) and torch.equal(asked[0], outputs.loss)
    inner = model.model(inputs["input_ids"], fmri_codes=inputs["fmri_codes"], output_hidden_states=True)
    assert torch.equal(inner.hidden_states[-1], inner.last_hidden_state)


def test_codec_gives_the_hidden_states_of_its_encoder(make_codec: Callable) -> None:
    codec = make_codec()
    inputs = inputs_of(codec)
    scan = {name: inputs[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask")}
    assert codec(**scan).hidden_states is None
    outputs = codec(**scan, output_hidden_states=True)
    tokens, layers = outputs.codes.shape[1], codec.config.num_hidden_layers
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(4, tokens, 16)] * (layers + 1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_embeddings_stand_for_ids_and_scans(backbone: str, tiny_model) -> None:
    model = tiny_model(backbone)
    inputs = inputs_of(model)
    embeddings = model.model.embed(inputs["input_ids"], fmri_codes=inputs["fmri_codes"])
    given = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(model(inputs_embeds=embeddings, **given).logits, answer(model))
    labelled = model(inputs_embeds=embeddings, **given, labels=inputs["labels"])
    assert torch.equal(labelled.text_loss, model(**inputs).text_loss) and labelled.fmri_loss is None
    # gradients reach whoever made the embeddings
    embeddings = embeddings.detach().requires_grad_()
    model(inputs_embeds=embeddings, **given, labels=inputs["labels"]).loss.backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_model_made_without_memory_is_filled_by_a_load(built, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = type(built)(copy.deepcopy(built.config))
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    saved, shapes = built.state_dict(), {name: value.shape for name, value in empty.state_dict().items()}
    assert shapes == {name: value.shape for name, value in saved.items()}
    empty.load_state_dict(saved, assign=True)
    empty.tie_weights()
    left = [name for name, buffer in empty.named_buffers() if buffer.is_meta]
    # buffers outside of checkpoints are the backbone's own
    assert all("rotary_emb" in name or name.endswith("attn.bias") or "masked_bias" in name for name in left), left


def test_weights_missing_from_a_file_start_as_in_a_new_model(built, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = type(built)(copy.deepcopy(built.config))
    fresh_state = fresh.state_dict()
    own = FmriLMModel if isinstance(built, FmriLMForConditionalGeneration) else FmriCodecModel
    prefix = "model.causal_lm." if own is FmriLMModel else ""
    state = load_file(tmp_path / WEIGHTS)
    # nothing but the backbone's weights stays
    kept = {name: value for name, value in state.items() if prefix and name.startswith(prefix)}
    save_file(kept or {"none": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded, report = type(built).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(state) - set(kept)
    for name, value in loaded.state_dict().items():
        if name in kept or name in built.all_tied_weights_keys:
            continue
        expected = fresh_state[name]
        assert value.isfinite().all(), name
        if not value.is_floating_point() or expected.float().std(correction=0) == 0 or name.endswith("codebooks"):
            # constants and what is derived without chance
            assert torch.equal(value, expected), name
        elif value.numel() >= 64:
            assert 0.6 < value.std() / expected.std() < 1.6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_keep_a_working_model_and_every_code_and_score(dtype: torch.dtype, built, tmp_path: Path) -> None:
    expected, is_joint = answer(built), isinstance(built, FmriLMForConditionalGeneration)
    exact = {name: value.clone() for name, value in built.state_dict().items() if is_exact(name, is_joint)}
    inputs = inputs_of(built.model.codec if is_joint else built)
    scan = {name: inputs[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask")}
    codec_codes = built.model.get_fmri_codes(**scan) if is_joint else built.encode(**scan)
    scores = built.model.get_fmri_scores(codec_codes) if is_joint else None
    built.save_pretrained(tmp_path / "full")
    loaded = type(built).from_pretrained(tmp_path / "full", dtype=dtype)
    loaded.save_pretrained(tmp_path / "half")
    again = type(built).from_pretrained(tmp_path / "half")
    for model in (loaded, again, built.to(dtype)):
        for name, value in model.state_dict().items():
            if is_exact(name, is_joint):
                assert torch.equal(value, exact[name]), name
            elif value.is_floating_point():
                assert value.dtype == dtype, name
        if is_joint:
            assert torch.equal(model.model.get_fmri_codes(**scan), codec_codes)
            assert torch.equal(model.model.get_fmri_scores(codec_codes), scores)
        else:
            assert torch.equal(model.encode(**scan), codec_codes)
        assert (answer(model).float() - expected).abs().mean() < 0.1 * expected.float().std()


def is_exact(name: str, is_joint: bool) -> bool:
    """What stays in float32: codes, scores and forecasts are others in half precision."""
    return not is_joint or name.startswith(("model.codec.", "model.summary.readout.", "model.dynamics."))
