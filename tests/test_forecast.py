"""Forecasts in closed form and surprise: independent of padding and batch mates, equal to what they are made of."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from fmrilm.modeling_fmrilm import FmriLMDynamics, ending_together
from fmrilm.training.alignment.dynamics import fit_dynamics, fit_token_gains
from fmrilm.training.data.dataset import Scans
from helpers import atlas, scans_of
from scan_rows import LONG, SHORT, Model, codes


@pytest.fixture
def scan() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 5, 14, generator=generator), 60 * torch.randn(1, 5, 3, generator=generator)


def waves(subjects: int, frames: int) -> Scans:
    """In which each frame is 0.8 times the last one, and noise."""
    noise = np.random.default_rng(0).normal(0, 1, (subjects, frames, 6))
    noise[:, 1:] *= 0.6
    return scans_of(lfilter([1], [1, -0.8], noise, axis=1), atlas("waves", 6), tr=[2.0] * subjects)


def fit(model: Model, scans: Scans, context: int, seed: int) -> np.ndarray:
    return fit_dynamics(model.model.dynamics, model.model.codec, scans, context, seed)


def test_slow_scans_count_where_faster_ones_are_of_one_subject(llama: Model) -> None:
    scans = waves(8, 60)
    scans.table["tr"] = [2.5] * 7 + [2.0]
    assert np.isfinite(fit(llama, scans, 40, seed=0)).all() and llama.model.dynamics.weights.abs().sum() > 0


def test_autoregression_is_the_best_linear_prediction(llama: Model) -> None:
    dynamics = llama.model.dynamics
    size = dynamics.covariances.shape[-1]
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q
    step = rotation * torch.linspace(0.2, 0.9, size) @ rotation.mT
    # of a(t) = step a(t - 1) + noise, with covariance identity / size
    lags = torch.stack([torch.linalg.matrix_power(step, lag) for lag in range(len(dynamics.covariances))]) / size
    recent = torch.randn(1, 2, size, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([torch.linalg.matrix_power(step, lead) @ recent[..., -1:] for lead in range(1, 5)], -1)
    found = dynamics.autoregression(lags[None], recent)
    # the ridge makes it a little smaller
    assert torch.allclose(found, expected[..., 0, :], atol=0.08)


def test_forecast_weighs_last_frames_and_autoregression(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    dynamics, functions = llama.model.dynamics, llama.model.codec.spatial_basis(coordinates)
    centred = values - values.mean(-1, keepdim=True)
    coefficients = llama.model.codec.spatial_basis.coefficients(functions, centred[:, None], None)[:, 0]
    own = dynamics.lag_covariances(coefficients)
    assert own.shape[1] == 6 and torch.allclose(own[0, 0].trace(), torch.tensor(1.0))
    mixed = (14 * own + dynamics.prior_frames * dynamics.covariances) / (14 + dynamics.prior_frames)
    spread = functions @ dynamics.autoregression(mixed, coefficients[:, None])[:, 0]
    weights = dynamics.weights
    expected = centred[..., -4:].flip(-1) @ weights[:, :4].T + weights[:, 4] * spread + values.mean(-1, keepdim=True)
    forecast = llama.forecast(values, coordinates, seconds=8.0)
    assert forecast.shape == (1, 5, 4) and torch.allclose(forecast, expected, atol=1e-5)
    assert torch.allclose(llama.forecast(values, coordinates, seconds=5.0), forecast[..., :3], atol=1e-6)
    assert llama.forecast(values[..., :4], coordinates, seconds=8.0).isfinite().all()
    assert torch.allclose(llama.forecast(values, coordinates, seconds=20.0)[..., :4], forecast, atol=1e-6)


def test_forecast_goes_on_from_what_it_expects(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    dynamics = llama.model.dynamics
    # weights on the last frames alone do not depend on the covariances
    dynamics.weights[:, 4] = 0
    mean, long = values.mean(-1, keepdim=True), llama.forecast(values, coordinates, seconds=16.0)
    second = (long[..., :4] - mean).flip(-1) @ dynamics.weights[:, :4].T + mean
    assert torch.allclose(long[..., 4:], second, atol=1e-5)


def test_samples_have_the_expected_mean_and_errors(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    errors = llama.model.dynamics.errors
    lead = torch.arange(4)
    errors.copy_(0.5 ** (lead - lead[:, None]).abs() * torch.outer(lead + 1, lead + 1) / 4)
    generator = torch.Generator().manual_seed(0)
    samples = llama.forecast(values, coordinates, seconds=8.0, num_samples=20000, generator=generator)
    assert samples.shape == (20000, 1, 5, 4)
    missed = (samples - llama.forecast(values, coordinates, seconds=8.0))[:, 0]
    variance = values.var(-1, correction=0)[0]
    found = torch.einsum("srl,srk->rlk", missed, missed) / len(missed) / variance[:, None, None]
    assert torch.allclose(found, errors.expand_as(found), atol=0.15)
    assert missed.mean(0).abs().max() < 0.05
    cold = llama.forecast(values, coordinates, seconds=8.0, num_samples=2, temperature=1e-8)
    assert torch.allclose(cold[1], llama.forecast(values, coordinates, seconds=8.0), atol=1e-2)


def test_samples_repeat_with_their_generator(llama: Model, scan: tuple) -> None:
    def sample(seed: int) -> torch.Tensor:
        return llama.forecast(*scan, seconds=16.0, num_samples=3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert not torch.equal(sample(0)[0], sample(0)[1])


def test_batch_mates_and_padding_do_not_change_a_forecast(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    padded = torch.cat([torch.nn.functional.pad(values[..., 2:], (0, 2)), values])
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[0, :, 12:] = False
    both = llama.forecast(padded, coordinates.expand(2, -1, -1), mask, seconds=16.0)
    assert torch.allclose(both[0], llama.forecast(values[..., 2:], coordinates, seconds=16.0)[0], atol=1e-4)
    assert torch.allclose(both[1], llama.forecast(values, coordinates, seconds=16.0)[0], atol=1e-4)


def test_a_missing_roi_does_not_change_the_others(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[:, 2] = False
    kept = [0, 1, 3, 4]
    found = llama.forecast(values.masked_fill(~mask, 7.0), coordinates, mask, seconds=16.0)
    assert found.isfinite().all()
    alone = llama.forecast(values[:, kept], coordinates[:, kept], seconds=16.0)
    assert torch.allclose(found[:, kept], alone, atol=1e-4)


def test_before_the_fit_the_forecast_is_the_mean(llama: Model, scan: tuple) -> None:
    llama.model.dynamics = FmriLMDynamics(llama.model.codec.config)
    values, coordinates = scan
    found = llama.forecast(values, coordinates, seconds=12.0)
    assert torch.allclose(found, values.mean(-1, keepdim=True).expand(-1, -1, 6), atol=1e-5)
    samples = llama.forecast(values, coordinates, seconds=8.0, num_samples=4000) - found[..., :4]
    assert torch.allclose(samples.var((0, 3))[0], values.var(-1, correction=0)[0], rtol=0.1)


@torch.no_grad()
def test_fit_finds_what_can_be_known_of_new_subjects(llama: Model) -> None:
    r_squared = fit(llama, waves(40, 200), context=64, seed=0)
    # of an autoregression of 0.8; the mean of a short context takes some of it
    assert np.allclose(r_squared, 0.8 ** (2 * np.arange(1, 5)), atol=0.08)
    new, covered = waves(60, 200), []
    coordinates = torch.tensor(new.atlas(0).coordinates)[None]
    for row in range(40, 60):
        signal = torch.from_numpy(new.signal(row)).T[None]
        for stop in (64, 128, 192):
            context, truth = signal[..., stop - 64 : stop], signal[..., stop : stop + 4]
            samples = llama.forecast(context, coordinates, seconds=8.0, num_samples=200)
            low, high = torch.quantile(samples, torch.tensor([0.1, 0.9]), dim=0)
            covered.append((low <= truth) & (truth <= high))
    assert 0.74 < torch.cat(covered).float().mean() < 0.86


@torch.no_grad()
def test_fit_leaves_out_interpolated_scans_where_there_are_others(llama: Model) -> None:
    some, both = waves(10, 100), waves(20, 100)
    found = []
    for scans, slow in ((some, 10), (both, 10), (both, 0)):
        scans.table.loc[slow:, "tr"] = 3.0
        fit(llama, scans, context=32, seed=0)
        found.append(llama.model.dynamics.weights.clone())
    assert torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])


@pytest.mark.parametrize(("subjects", "frames"), [(1, 100), (10, 7)])
def test_too_few_scans_leave_the_forecast_as_it_is(llama: Model, subjects: int, frames: int) -> None:
    before = llama.model.dynamics.weights.clone()
    assert np.isnan(fit(llama, waves(subjects, frames), context=32, seed=0)).all()
    assert torch.equal(llama.model.dynamics.weights, before)


@torch.no_grad()
def test_expected_vectors_see_the_patches_before_alone(llama: Model) -> None:
    found = llama.model.expected_vectors(codes(LONG, SHORT))
    assert found.shape == (2, 8, 8) and (found[:, :2] == 0).all() and (found[0, 2:] != 0).all()
    assert torch.allclose(found[1, :4], llama.model.expected_vectors(codes(SHORT))[0], atol=1e-5)
    changed = llama.model.expected_vectors(codes([*LONG[:4], [7, 7, 7], [7, 7, 7], *LONG[6:]]))[0]
    assert torch.allclose(changed[:6], found[0, :6], atol=1e-5)
    assert not torch.allclose(changed[6:], found[0, 6:], atol=1e-3)


def test_half_precision_changes_no_forecast(llama: Model, scan: tuple) -> None:
    def all_three() -> list[torch.Tensor]:
        return [llama.forecast(*scan), llama.frame_surprise(*scan)[:, 1:], llama.model.expected_vectors(codes(LONG))]

    expected = all_three()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(expected, all_three(), strict=True))


@torch.no_grad()
def test_token_gains_are_slopes_by_variances(llama: Model) -> None:
    dynamics, codec = llama.model.dynamics, llama.model.codec
    # the mean lag covariances count for nothing, so that it does not matter whose they are
    dynamics.prior_frames.fill_(0)
    before = dynamics.covariances.clone()
    windows = [np.random.default_rng(row).integers(0, 16, (8, 3)) for row in range(40)]
    rows = torch.from_numpy(np.stack(windows))
    vectors, expected = codec.embed_codes(rows), dynamics.expected_vectors(codec, rows)
    vectors, expected = (each[:, 2:].reshape(-1, 2, 8) for each in (vectors, expected))
    variance = vectors.pow(2).mean(0)
    slopes = ((vectors * expected).sum(0) / (expected.pow(2).sum(0) + 4 * variance)).clamp(0, 1)
    fit_token_gains(dynamics, codec, windows, np.arange(40).astype(str), seed=0)
    assert torch.allclose(dynamics.token_gains, slopes / variance, rtol=1e-3, atol=1e-6)
    assert 0 < (slopes > 0).float().mean() < 1 and torch.equal(dynamics.covariances, before)


@torch.no_grad()
def test_one_subject_fits_no_token_gains(llama: Model) -> None:
    before = llama.model.dynamics.token_gains.clone()
    fit_token_gains(llama.model.dynamics, llama.model.codec, [np.array(LONG)], np.array(["a"]), seed=0)
    assert torch.equal(llama.model.dynamics.token_gains, before)


@torch.no_grad()
def test_frame_surprise_is_a_likelihood_ratio(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    dynamics, size = llama.model.dynamics, llama.model.dynamics.covariances.shape[-1]
    found = llama.frame_surprise(values, coordinates)
    assert found.shape == (1, 14) and found[0, 0].isnan() and found[0, 1:].isfinite().all()
    functions, every = llama.model.codec.spatial_basis(coordinates), torch.ones_like(values, dtype=torch.bool)
    coefficients = dynamics.centred(values, every, functions)[2]
    own = dynamics.shrunk(
        dynamics.lag_covariances(coefficients), torch.tensor([14]), dynamics.covariances, dynamics.prior_frames
    )
    own = own * coefficients.pow(2).sum() / 14
    normal = torch.distributions.MultivariateNormal
    alone = normal(torch.zeros(size), dynamics.between_frames(own, 1)[0])
    both = normal(torch.zeros(2 * size), dynamics.between_frames(own, 2)[0])
    now, before = coefficients[0, :, 5], coefficients[0, :, 4]
    expected = alone.log_prob(now) + alone.log_prob(before) - both.log_prob(torch.cat([now, before]))
    assert torch.allclose(found[0, 5], expected / size, atol=1e-4)
    padded = torch.nn.functional.pad(values, (0, 3))
    mask = torch.nn.functional.pad(every, (0, 3))
    again = llama.frame_surprise(padded, coordinates, mask)
    assert torch.allclose(again[:, 1:14], found[:, 1:], atol=1e-4) and again[:, 14:].isnan().all()


@torch.no_grad()
def test_frames_out_of_order_are_surprising(llama: Model) -> None:
    fit(llama, waves(20, 200), context=64, seed=0)
    new = waves(21, 200)
    coordinates = torch.tensor(new.atlas(0).coordinates)[None]
    signal = torch.from_numpy(new.signal(20)).T[None]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    real, shuffled = (llama.frame_surprise(one, coordinates).nanmean() for one in (signal, signal[..., order]))
    assert real < -0.1 and shuffled > real + 0.2


@torch.no_grad()
def test_mean_surprise_is_the_next_code_loss(model: Model) -> None:
    config = model.config
    row = [config.fmri_start_token_id] + [config.fmri_token_id] * len(LONG)
    row = torch.tensor([row + [config.fmri_summary_token_id] * config.num_summary_tokens])
    losses = model(row, fmri_codes=codes(LONG), labels=row).fmri_level_losses
    surprise = model.surprise(codes(LONG))
    assert surprise.shape == (1, 4, 3) and surprise.isfinite().all()
    # of the first patch, one token of two is predicted
    weights = torch.tensor([1.0, 2, 2, 2])
    assert torch.allclose((surprise[0] * weights[:, None]).sum(0) / 7, losses, atol=1e-5)


def test_surprise_knows_neither_the_future_nor_batch_mates(model: Model) -> None:
    together = model.surprise(codes(LONG, SHORT))
    assert torch.allclose(together[1, :2], model.surprise(codes(SHORT))[0], atol=1e-4)
    assert together[1, 2:].isnan().all()
    changed = model.surprise(codes([*LONG[:6], [7, 7, 7], [7, 7, 7]]))
    assert torch.allclose(together[0, :3], changed[0, :3], atol=1e-4)
    assert not torch.allclose(together[0, 3], changed[0, 3], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.0}, "at least one frame, 2.0 s, got 0.0 s"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature > 0"),
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"fmri_values": torch.zeros(1, 5, 3)}, "at least one patch of 4 frames, got 3"),
    ],
)
def test_impossible_forecasts_are_refused(llama: Model, scan: tuple, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.forecast(**{"fmri_values": scan[0], "roi_coordinates": scan[1], **changes})


def test_gap_before_the_end_does_not_shorten_the_past() -> None:
    values = torch.arange(14.0).repeat(2, 3, 1)
    mask = torch.ones(2, 3, 14, dtype=torch.bool)
    mask[0, :, 9:11] = False
    mask[1, :, 12:] = False
    moved, known = ending_together(values, mask)
    assert moved[:, 0, -1].tolist() == [13, 11] and known[:, :, -1].all()
    assert known.any(1).sum(-1).tolist() == [12, 12]
