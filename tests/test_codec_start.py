"""What a codec of the latent layout is before training: functions of place, a transform coder, a fitted head."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm import FmriCodecConfig, FmriCodecModel
from fmrilm.functions_fmricodec import FmriCodecFunctions
from fmrilm.pooling_fmricodec import FmriCodecPooling, pooling_places
from fmrilm.training.codec.fit import fit_descriptor_head, fit_start
from fmrilm.training.codec.metrics import r_squared
from fmrilm.training.codec.trainer import encode_items
from fmrilm.training.data.dataset import PreparedScan
from helpers import atlas, prepared


ROIS, FRAMES = 24, 160


def waves(seed: int) -> PreparedScan:
    """Waves through the brain, of an atlas: what is at one place tells of its neighbours."""
    of = atlas("waves", ROIS)
    rng = np.random.default_rng(seed)
    time, places = np.arange(FRAMES)[:, None], of.coordinates
    signal = sum(np.sin(0.3 * time + places @ rng.normal(0, 0.012, 3) + rng.uniform(0, 6)) for _ in range(3))
    signal = signal + 0.1 * rng.standard_normal(signal.shape)
    return PreparedScan((signal / signal.std(0)).astype(np.float32), of, "waves", str(seed), "")


def items(scans: list[PreparedScan]) -> list[dict[str, np.ndarray]]:
    return [
        {"signal": scan.signal, "coordinates": scan.atlas.coordinates, "descriptors": np.zeros(2, np.float32)}
        for scan in scans
    ]


def make(**changes) -> FmriCodecModel:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_roi_layers": 1}
    layers = {"num_hidden_layers": 1, "num_decoder_layers": 1, "descriptor_names": ["a", "b"]}
    size = {"tokens_per_step": 4, "codebook_size": 32, "codebook_dim": 12, "max_steps": 16, "num_functions": 16}
    torch.manual_seed(0)
    return FmriCodecModel(FmriCodecConfig(**{**small, **layers, **size, **changes})).eval()


@pytest.fixture(scope="module")
def scans() -> list[PreparedScan]:
    return [waves(seed) for seed in range(20)]


def decoded(model: FmriCodecModel, scans: list[PreparedScan]) -> list[np.ndarray]:
    codes = torch.from_numpy(encode_items(model, items(scans)))
    places = torch.tensor(scans[0].atlas.coordinates, dtype=torch.float32).expand(len(codes), -1, -1)
    with torch.no_grad():
        return list(model.decode(codes, places).transpose(1, 2).numpy())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_coefficients_are_the_posterior_mean_whatever_is_missing(seed: int, present: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    functions, patches = torch.randn(2, 12, 5, generator=generator), torch.randn(2, 3, 12, 4, generator=generator)
    mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    mask[:, :, torch.randperm(12, generator=generator)[:present]] = True
    found = FmriCodecFunctions.coefficients(functions, patches * mask[..., None], mask)
    kept = mask[0, 0]
    covariance = functions[:, kept] @ functions[:, kept].mT + torch.eye(present)
    expected = functions[:, None, kept].mT @ torch.linalg.solve(covariance[:, None], patches[:, :, kept])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_likelihood_is_the_gaussian_one() -> None:
    functions = make().functions
    generator = torch.Generator().manual_seed(0)
    coordinates, signal = torch.rand(9, 3, generator=generator) * 100, torch.randn(400, 9, generator=generator)
    covariance = signal.T @ signal / 400
    values = functions(coordinates)
    shape = values @ values.T + torch.eye(9)
    noise = (torch.linalg.inv(shape) @ covariance).trace() / 9
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(9), noise * shape)
    expected = -gaussian.log_prob(signal).mean().detach() / 9
    found = functions.negative_log_likelihood(covariance, coordinates).detach()
    # up to what no parameter changes
    constant = 0.5 * (1 + np.log(2 * np.pi))
    assert float(found / 2 + constant) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_start_decodes_people_it_never_saw(quantizer: str, scans: list[PreparedScan]) -> None:
    model = make(quantizer=quantizer, fsq_levels=[8, 8, 8] if quantizer == "fsq" else None)
    torch.manual_seed(1)
    kept = fit_start(model, scans[:18], steps=100, seed=0)
    signals = [scan.signal for scan in scans[18:]]
    found = r_squared(signals, decoded(model, scans[18:]))
    assert 0.5 < found < 1 and abs(found - kept) < 0.3
    assert r_squared(signals, decoded(make(**model_kind(quantizer)), scans[18:])) < 0.1


def model_kind(quantizer: str) -> dict:
    return {"quantizer": quantizer, "fsq_levels": [8, 8, 8] if quantizer == "fsq" else None}


def test_regions_that_were_not_measured_are_decoded_from_the_others(scans: list[PreparedScan]) -> None:
    model = make(codebook_size=128)
    fit_start(model, scans[:18], steps=100, seed=0)
    coordinates = torch.tensor(scans[18].atlas.coordinates, dtype=torch.float32)[None]
    signal = torch.tensor(scans[18].signal.T)[None]
    with torch.no_grad():
        guess = model.decode(model.encode(signal[:, :18], coordinates[:, :18]), coordinates[:, 18:])
    assert r_squared([signal[0, 18:].T.numpy()], [guess[0].T.numpy()]) > 0.3


def test_start_with_fewer_vectors_than_codes_leaves_the_codebook_to_training(scans: list[PreparedScan]) -> None:
    model = make(codebook_size=8192)
    fit_start(model, scans[:1], steps=2, seed=0)
    assert not model.quantizer.started


def test_descriptor_head_tells_what_regions_do_together(scans: list[PreparedScan]) -> None:
    model = make(codebook_size=128)
    fit_start(model, scans, steps=100, seed=0)

    def described(seeds: range) -> list[dict[str, np.ndarray]]:
        made = [waves(seed) for seed in seeds]
        # the second descriptor is one that half of the scans do not have
        told = [[np.corrcoef(scan.signal.T)[:4, 12:].mean(), np.nan if i % 2 else 1.0] for i, scan in enumerate(made)]
        return [
            {**item, "descriptors": np.array(row, np.float32)} for item, row in zip(items(made), told, strict=True)
        ]

    fit_descriptor_head(model, described(range(100, 220)))
    held_out = described(range(300, 340))
    codes = torch.from_numpy(encode_items(model, held_out))
    with torch.no_grad():
        found = model.describe(model.embed_codes(codes), codes >= 0).numpy()
    truth = np.array([item["descriptors"][0] for item in held_out])
    assert np.corrcoef(found[:, 0], truth)[0, 1] > 0.7
    np.testing.assert_allclose(found[:, 1], 1, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.descriptor_head.parameters())


def test_pooling_is_correlation_and_ignores_padding() -> None:
    signal = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    found = FmriCodecPooling.correlations(signal, mask)
    for row, time in enumerate((40, 30)):
        expected = np.corrcoef(signal[row, :, :time].numpy())[np.triu_indices(64, 1)]
        np.testing.assert_allclose(found[row, : len(expected)].numpy(), expected, atol=1e-5)
    assert found.shape[1] == FmriCodecPooling().size


def test_pooling_places_are_points_in_a_brain_far_from_each_other() -> None:
    places = pooling_places()
    assert torch.equal(places, pooling_places())
    distances = torch.cdist(places, places) + 1e3 * torch.eye(len(places))
    assert distances.min() > 10 and (places.abs() < torch.tensor([71.0, 105.0, 75.0])).all()


def test_scans_shorter_than_the_windows_of_the_fit_are_used_whole() -> None:
    model = make(patch_length=4)
    assert 0 < fit_start(model, [prepared("a", frames=20)], steps=2, seed=0) <= 1


def test_a_token_for_each_region_has_no_such_start(scans: list[PreparedScan]) -> None:
    with pytest.raises(ValueError, match="expected a codec with token_layout 'latent', got 'roi'"):
        fit_start(make(token_layout="roi"), scans, steps=2, seed=0)
    with pytest.raises(ValueError, match="'latent' and descriptor_names"):
        fit_descriptor_head(make(token_layout="roi"), items(scans))
