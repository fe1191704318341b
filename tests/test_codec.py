"""The codec: which inputs a code depends on, decoding anywhere, its summary, and training."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.connectome import ConnectivityMeasure
from sklearn.base import BaseEstimator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fmrilm import FmriCodecConfig, FmriCodecModel
from fmrilm.modeling_fmricodec import FmriCodecSummary, FmriSpatialBasis, MatrixLogarithm
from fmrilm.training.codec.optimizers import MuonWithAdamW
from fmrilm.training.codec.trainer import CodecTrainer, CodecTrainingArguments
from fmrilm.training.data.dataset import collate_signals


MakeCodec = Callable[..., FmriCodecModel]
LINEAR = {"num_hidden_layers": 0, "num_decoder_layers": 0}
GRID = {"quantizer": "fsq", "fsq_levels": [5, 4, 3], "num_quantizers": 2}


def scan(batch: int = 2, rois: int = 5, time: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fmri_values": torch.randn(batch, rois, time, generator=generator),
        "roi_coordinates": torch.rand(batch, rois, 3, generator=generator) * 120 - 60,
    }


def with_context(codec: FmriCodecModel) -> FmriCodecModel:
    """What its transformers add is no longer zero."""
    torch.manual_seed(3)
    for part in (codec.patch_encoder, codec.patch_decoder):
        if part is not None:
            torch.nn.init.normal_(part.output_proj.weight, std=0.5)
    return codec


@pytest.fixture(scope="module", params=[{}, LINEAR, GRID], ids=["transformers", "linear", "grid"])
def codec(request: pytest.FixtureRequest, make_codec: MakeCodec) -> FmriCodecModel:
    return with_context(make_codec(**request.param))


@pytest.mark.parametrize(("time", "patches"), [(16, 4), (13, 4), (4, 1), (3, 1)])
def test_codes_are_counted_by_patches_tokens_and_levels(codec: FmriCodecModel, time: int, patches: int) -> None:
    codes = codec.encode(**scan(3, 5, time))
    assert codes.shape == (3, 2 * patches, codec.config.num_quantizers) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.config.codebook_size and len(codes.unique()) > 2
    assert codec.decode(codes, scan(3, 7)["roi_coordinates"]).shape == (3, 7, 4 * patches)


@given(
    rois=st.integers(1, 6),
    time=st.integers(1, 16),
    more_rois=st.integers(0, 4),
    before=st.integers(0, 2),
    after=st.integers(0, 8),
    filling=st.sampled_from([0.0, 50.0, float("nan")]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_padding_missing_rois_and_batch_mates_change_no_code(
    codec: FmriCodecModel, rois: int, time: int, more_rois: int, before: int, after: int, filling: float, seed: int
) -> None:
    # whole patches of padding in front move the scan in time: only what is between and behind is free
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
    assert (codes[1, expected.shape[1] :] == -1).all() and (expected[0, : 2 * before] == -1).all()


@given(patch=st.integers(1, 3), size=st.sampled_from([0.1, 100.0]), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_codes_and_decoding_are_causal_over_patches(codec: FmriCodecModel, patch: int, size: float, seed: int) -> None:
    inputs = scan(4, seed=seed)
    before = codec.encode(**inputs)
    inputs["fmri_values"][..., 4 * patch :] = size * scan(4, seed=seed + 1)["fmri_values"][..., 4 * patch :]
    assert torch.equal(before[:, : 2 * patch], codec.encode(**inputs)[:, : 2 * patch])
    whole = codec.decode(before, inputs["roi_coordinates"])
    prefix = codec.decode(before[:, : 2 * patch], inputs["roi_coordinates"])
    assert torch.allclose(prefix, whole[..., : 4 * patch], atol=1e-5)


def test_transformers_read_earlier_patches_and_linear_maps_do_not(codec: FmriCodecModel) -> None:
    inputs = scan(8)
    before = codec.encode(**inputs)
    inputs["fmri_values"][..., :4] = scan(8, seed=5)["fmri_values"][..., :4]
    assert torch.equal(before[:, 2:], codec.encode(**inputs)[:, 2:]) == (codec.patch_encoder is None)


def test_order_of_rois_is_of_no_importance_and_their_place_is(codec: FmriCodecModel) -> None:
    inputs, order = scan(8), torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: value[:, order] for name, value in inputs.items()}
    assert torch.equal(codec.encode(**inputs), codec.encode(**permuted))
    moved = {**inputs, "roi_coordinates": inputs["roi_coordinates"].flip(1)}
    assert not torch.equal(codec.encode(**inputs), codec.encode(**moved))


def test_decodes_at_any_coordinates_and_from_any_prefix_of_levels(codec: FmriCodecModel) -> None:
    inputs, elsewhere = scan(2, 5, 14), scan(2, 9, 16, seed=4)["roi_coordinates"]
    outputs = codec(**inputs)
    elsewhere[:, 4] = inputs["roi_coordinates"][:, 2]
    signal, other = (codec.decode(outputs.codes, places) for places in (inputs["roi_coordinates"], elsewhere))
    assert torch.allclose(signal[:, 2], other[:, 4], atol=1e-5)
    assert torch.allclose(outputs.reconstruction, signal[..., :14], atol=1e-5)
    vectors = codec.embed_codes(outputs.codes)
    errors = [(codec.embed_codes(outputs.codes[..., :level]) - vectors).norm() for level in (1, 2)]
    assert errors[0] > errors[1] or codec.config.num_quantizers == 2
    assert codec.codebooks().shape == (codec.config.num_quantizers, codec.config.codebook_size, vectors.shape[-1])
    with pytest.raises(ValueError, match="expected codes of 1 to . levels, got 4"):
        codec.embed_codes(torch.zeros(1, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="whole patches of 2 tokens, got 3"):
        codec.decode(outputs.codes[:, :3], elsewhere)


def test_codebook_use_of_each_level_leaves_padding_out(codec: FmriCodecModel) -> None:
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, :, 9:] = False
    outputs = codec(**scan(), fmri_mask=mask)
    codes = outputs.codes[outputs.codes[..., 0] >= 0]
    assert len(codes) == 14
    for level in range(codec.config.num_quantizers):
        counts = torch.bincount(codes[:, level], minlength=codec.config.codebook_size).float()
        shares = counts[counts > 0] / counts.sum()
        assert outputs.codebook_usage[level] == (counts > 0).float().mean()
        assert torch.allclose(outputs.perplexity[level], (-(shares * shares.log()).sum()).exp())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_coefficients_are_the_posterior_mean_whatever_is_missing(seed: int, present: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    functions, patches = torch.randn(2, 12, 5, generator=generator), torch.randn(2, 3, 12, 4, generator=generator)
    mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    mask[:, :, torch.randperm(12, generator=generator)[:present]] = True
    found = FmriSpatialBasis.coefficients(functions, patches * mask[..., None], mask)
    kept = mask[0, 0]
    covariance = functions[:, kept] @ functions[:, kept].mT + torch.eye(present)
    expected = functions[:, None, kept].mT @ torch.linalg.solve(covariance[:, None], patches[:, :, kept])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_likelihood_is_the_gaussian_one() -> None:
    torch.manual_seed(0)
    basis = FmriCodecModel(FmriCodecConfig(num_basis_functions=16)).spatial_basis
    coordinates, signal = torch.rand(9, 3) * 100, torch.randn(400, 9)
    covariance = signal.T @ signal / 400
    shape = basis(coordinates) @ basis(coordinates).T + torch.eye(9)
    noise = (torch.linalg.inv(shape) @ covariance).trace() / 9
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(9), noise * shape)
    expected = -gaussian.log_prob(signal).mean().item() / 9
    found = basis.negative_log_likelihood(covariance, coordinates).item()
    # up to what no parameter changes
    assert found / 2 + 0.5 * (1 + np.log(2 * np.pi)) == pytest.approx(expected, abs=1e-3)
    # of coefficients with as much variance as the noise, given the signal
    left = noise * (torch.eye(16) - basis(coordinates).T @ torch.linalg.solve(shape, basis(coordinates)))
    torch.testing.assert_close(basis.posterior_covariance(covariance, coordinates), left, atol=1e-4, rtol=1e-3)


class Shrunk(BaseEstimator):
    """The summary's covariance estimator, for nilearn."""

    def __init__(self, mean: np.ndarray, weight: float):
        self.mean, self.weight = mean, weight

    def fit(self, series: np.ndarray, y=None) -> "Shrunk":
        self.covariance_ = (1 - self.weight) * np.cov(series.T, bias=True) + self.weight * self.mean
        return self


def test_summary_is_nilearns_tangent_space() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6))
    series = [rng.standard_normal((50, 6)) @ (mixing + 0.3 * rng.standard_normal((6, 6))) for _ in range(12)]
    measure = ConnectivityMeasure(
        Shrunk(mixing.T @ mixing, 0.3), kind="tangent", vectorize=True, standardize=False
    ).fit(series)
    # where covariances are shrunk to is where they are whitened
    for _ in range(60):
        measure = ConnectivityMeasure(Shrunk(measure.mean_, 0.3), kind="tangent", vectorize=True, standardize=False)
        expected = measure.fit_transform(series)
    summary = FmriCodecSummary(FmriCodecConfig(num_basis_functions=6))
    summary.whitening.copy_(torch.from_numpy(measure.whitening_))
    padded = torch.from_numpy(np.stack([np.pad(one.T, ((0, 0), (0, 9)), constant_values=7) for one in series])).float()
    mask = torch.arange(59).expand(12, -1) < 50
    found = summary(padded, mask)
    np.testing.assert_allclose(found[:, :21].numpy(), expected, atol=2e-3)
    lagged = [_lag(one[:, k]) for one in series for k in range(6)]
    np.testing.assert_allclose(found[:, 21:27].flatten().numpy(), lagged, atol=1e-4)
    # no networks are known yet
    assert not found[:, 27:].any()
    # what ROIs leave undetermined is added to the series' covariance
    summary.posterior_covariance.copy_(torch.diag(torch.arange(6.0)))
    covariance = summary.covariance(padded, mask) + torch.diag(torch.arange(6.0))
    added = summary(padded, mask)[:, :21]
    summary.posterior_covariance.zero_()
    torch.testing.assert_close(added, summary.tangent(covariance))


def test_network_features_are_those_of_the_mean_series_of_the_networks_rois() -> None:
    rng = np.random.default_rng(0)
    series, functions = rng.standard_normal((6, 50)), rng.standard_normal((9, 6))
    members = np.eye(3)[np.arange(9) % 3]
    summary = FmriCodecSummary(FmriCodecConfig(num_basis_functions=6, num_networks=3))
    summary.network_basis.copy_(torch.from_numpy(members.T @ functions / 3))
    found = summary(torch.from_numpy(series).float()[None], torch.ones(1, 50, dtype=torch.bool))[0, 27:].numpy()
    means = members.T @ (functions @ series) / 3
    row, column = np.tril_indices(3)
    np.testing.assert_allclose(found[:6], np.cov(means, bias=True)[row, column], rtol=1e-4)
    np.testing.assert_allclose(found[6:], [_lag(one) for one in means], atol=1e-4)


def _lag(series: np.ndarray) -> float:
    centred = series - series.mean()
    return float((centred[1:] * centred[:-1]).sum() / (centred**2).sum())


def test_matrix_logarithm_has_a_gradient_at_equal_eigenvalues() -> None:
    roots = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # three of five eigenvalues are the same
    matrices = (roots @ roots.mT + 0.3 * torch.eye(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: MatrixLogarithm.apply((value + value.mT) / 2), (matrices,))


def test_summary_and_descriptors_of_one_patch_half_a_brain_and_padding(make_codec: MakeCodec) -> None:
    codec = make_codec(descriptor_names=["a", "b", "c"])
    inputs = scan(2)
    inputs["roi_coordinates"][..., 0] = -inputs["roi_coordinates"][..., 0].abs()
    codes = codec.encode(**inputs)
    assert codec.scan_features(codes).shape == (2, codec.config.num_scan_features) == (2, 71)
    assert torch.equal(codec.summarize(codes), codec.scan_features(codes)[:, :21])
    assert codec.scan_features(codes[:, :2]).isfinite().all()
    longer = torch.cat([codes, torch.full_like(codes, -1)], 1)
    assert torch.allclose(codec.scan_features(longer), codec.scan_features(codes), atol=1e-5)
    targets = torch.tensor([[1.0, float("nan"), 2.0], [float("nan"), float("nan"), 0.5]])
    outputs = codec.train()(**inputs, descriptors=targets)
    codec.eval()
    known = ~targets.isnan()
    expected = (outputs.descriptors[known] - targets[known]).pow(2).mean()
    assert torch.allclose(outputs.descriptor_loss, expected)
    weighted = codec.config.commitment_weight * outputs.commitment_loss
    assert torch.allclose(outputs.loss, outputs.reconstruction_loss + weighted + expected)
    outputs.descriptor_loss.backward()
    assert all(value.grad.isfinite().all() for value in codec.parameters() if value.grad is not None)
    outputs = codec(**inputs, descriptors=torch.full((2, 3), float("nan")))
    assert outputs.descriptor_loss == 0
    assert torch.allclose(outputs.descriptors, codec.describe(outputs.codes), atol=1e-5)
    with pytest.raises(ValueError, match="with descriptor_names, got one without"):
        make_codec().describe(codes)


def test_everything_is_computed_in_full_precision_under_autocast(codec: FmriCodecModel) -> None:
    expected = codec.encode(**scan())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(**scan()), expected)
        assert codec.scan_features(expected).dtype == torch.float32


def test_attention_implementations_agree_and_encode_compiles_to_one_graph(make_codec: MakeCodec) -> None:
    mask = torch.ones(2, 5, 16, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 9:] = False, False
    results = []
    for implementation in ("eager", "sdpa"):
        codec = with_context(make_codec())
        codec.set_attn_implementation(implementation)
        results.append(codec(**scan(), fmri_mask=mask).reconstruction)
    assert torch.allclose(*results, atol=1e-5)
    compiled = torch.compile(codec.encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**scan(), fmri_mask=mask), codec.encode(**scan(), fmri_mask=mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_coordinates": None}, r"roi_coordinates of shape \(2, 5, 3\), got None"),
        ({"roi_coordinates": torch.zeros(2, 4, 3)}, r"roi_coordinates of shape \(2, 5, 3\), got \(2, 4, 3\)"),
        ({"fmri_mask": torch.ones(2, 5, dtype=torch.bool)}, r"fmri_mask of shape \(2, 5, 16\), got \(2, 5\)"),
        ({"fmri_mask": torch.arange(2)[:, None, None].expand(2, 5, 16) > 0}, "fmri_mask is all False"),
        (scan(2, 5, 33), "max_patches=8 patches, got 9"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny_codec: FmriCodecModel, change: dict, message: str) -> None:
    for method in (tiny_codec.encode, tiny_codec):
        with pytest.raises(ValueError, match=message):
            method(**{**scan(), **change})


@pytest.mark.parametrize(("size", "layers"), [("tiny", (3, 2)), ("base", (12, 12))])
def test_named_sizes_and_construction_without_values(size: str, layers: tuple[int, int]) -> None:
    with FakeTensorMode():
        codec = FmriCodecModel(FmriCodecConfig.from_size(size))
    assert all(isinstance(value, FakeTensor) for value in codec.parameters())
    assert (len(codec.patch_encoder.layers), len(codec.patch_decoder.layers)) == layers
    with pytest.raises(ValueError, match="a size out of tiny, small, base, large, got 'huge'"):
        FmriCodecConfig.from_size("huge")


def items(count: int) -> list[dict[str, np.ndarray]]:
    """Slow waves, whose phase differs from ROI to ROI, as `collate_signals` takes them."""
    rng = np.random.default_rng(0)
    time = np.arange(16)[:, None] / 16
    return [
        {
            "signal": np.sin(2 * np.pi * (rng.uniform(0.5, 2) * time + rng.uniform(size=5))).astype(np.float32),
            "coordinates": rng.uniform(-60, 60, (5, 3)).astype(np.float32),
        }
        for _ in range(count)
    ]


def codec_trainer(model: FmriCodecModel, folder, **changes) -> CodecTrainer:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 12,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    args = CodecTrainingArguments(**values)
    return CodecTrainer(model=model, args=args, train_dataset=items(24), data_collator=collate_signals)


def test_training_lowers_the_error(make_codec: MakeCodec, tmp_path) -> None:
    trainer = codec_trainer(make_codec(started=False), tmp_path, max_steps=80, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0] and trainer.model.quantizer.started


def test_muon_takes_the_layers_matrices_and_one_scheduler_reaches_all(tiny_codec: FmriCodecModel) -> None:
    optimizer = MuonWithAdamW.for_layers(tiny_codec, 1e-2)
    names = {id(parameter): name for name, parameter in tiny_codec.named_parameters()}
    muon, adamw = ([names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups)
    assert sorted(muon + adamw) == sorted(names.values())
    assert "patch_encoder.layers.0.attention.q_proj.weight" in muon
    assert all(".layers." in name and name.endswith("weight") and "norm" not in name for name in muon)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(tiny_codec.state_dict())
    tiny_codec(**scan()).loss.backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.equal(value, before[name]) for name, value in tiny_codec.state_dict().items())
