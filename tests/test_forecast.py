"""Forecasts and surprise: causal, independent of padding and batch mates, in line with the model's own losses."""

import pytest
import torch

from fmrilm.modeling_fmrilm import fading, whole_patches
from scan_rows import LONG, SHORT, Model, code_logits, codes


@pytest.fixture
def scan() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 5, 12, generator=generator), 60 * torch.randn(1, 5, 3, generator=generator)


def next_logits(model: Model, scan: list[list[int]]) -> torch.Tensor:
    """Logits [levels, codebook_size] of the token after a scan, by one uncached pass over the scan alone."""
    config = model.config
    row = torch.tensor([[config.fmri_start_token_id] + [config.fmri_token_id] * len(scan)])
    summary, model.model.summary = model.model.summary, None
    state = model.model(row, fmri_codes=codes(scan)).last_hidden_state[0, -1]
    model.model.summary = summary
    return code_logits(model, state, len(scan))


@torch.no_grad()
def test_the_expected_forecast_decodes_expected_vectors_token_by_token(model: Model, scan: tuple) -> None:
    values, coordinates = scan
    codec = model.model.codec
    context = model.model.get_fmri_codes(values, coordinates)
    chances = next_logits(model, context[0].tolist()).softmax(-1)
    first = sum(chances[level] @ codec.codebooks()[level] for level in range(3))
    vectors = model._continued(context, 1, None, 1.0, None)
    assert vectors.shape == (1, 2, 8) and torch.allclose(vectors[0, 0], first, atol=1e-5)
    whole = torch.cat([codec.embed_codes(context), vectors], 1)
    signal = codec.decode_vectors(whole, coordinates, torch.ones(1, 8, dtype=torch.bool))
    expected = signal[..., 12:] + fading(values - signal[..., :12], torch.tensor([[12]]), 4)
    # 4 frames of 2 s
    forecast = model.forecast(values, coordinates, seconds=8.0)
    assert forecast.shape == (1, 5, 4) and torch.allclose(forecast, expected, atol=1e-5)
    assert torch.equal(model.forecast(values, coordinates, seconds=8.0), forecast)
    assert torch.allclose(model.forecast(values, coordinates, seconds=5.0), forecast[..., :3], atol=1e-6)


@torch.no_grad()
def test_a_sure_models_samples_are_its_likeliest_codes(model: Model, scan: tuple) -> None:
    values, coordinates = scan
    found = model.model.get_fmri_codes(values, coordinates)[0].tolist()
    for _ in range(4):
        found.append(next_logits(model, found).argmax(-1).tolist())
    expected = model.model.codec.decode(codes(found), coordinates)[..., 12:]
    samples = model.forecast(values, coordinates, seconds=16.0, num_samples=2, temperature=1e-4)
    assert samples.shape == (2, 1, 5, 8)
    assert torch.allclose(samples, expected.expand(2, -1, -1, -1), atol=1e-4)


def test_samples_repeat_with_their_generator(llama: Model, scan: tuple) -> None:
    def sample(seed: int) -> torch.Tensor:
        return llama.forecast(*scan, seconds=16.0, num_samples=3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert not torch.equal(sample(0)[0], sample(0)[1])


def test_batch_mates_and_padding_do_not_change_a_forecast(model: Model, scan: tuple) -> None:
    values, coordinates = scan
    padded = torch.cat([torch.nn.functional.pad(values[..., 2:], (0, 2)), values])
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[0, :, 10:] = False
    both = model.forecast(padded, coordinates.expand(2, -1, -1), mask, seconds=16.0)
    assert torch.allclose(both[0], model.forecast(values[..., 2:], coordinates, seconds=16.0)[0], atol=1e-4)
    assert torch.allclose(both[1], model.forecast(values, coordinates, seconds=16.0)[0], atol=1e-4)


def test_forecast_starts_after_the_last_frame(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    whole = llama.forecast(values[..., 3:11], coordinates)
    assert whole.shape[-1] == 16 and torch.equal(llama.forecast(values[..., :11], coordinates), whole)


def test_what_codes_leave_out_fades_by_its_own_autocorrelation() -> None:
    missed = torch.zeros(2, 1, 60)
    missed[0, 0, :40] = 0.8 ** torch.arange(40)
    missed[1, 0] = (-1.0) ** torch.arange(60)
    future = fading(missed, torch.tensor([[40], [60]]), 3)
    expected = missed[0, 0, 39] * 0.8 ** torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(future[0, 0], expected, rtol=1e-3)
    # what turns around does not last
    assert (future[1] == 0).all()


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


def test_whole_patches_end_with_the_last_frame() -> None:
    values = torch.arange(11.0).expand(2, 1, -1)
    mask = torch.ones(2, 1, 11, dtype=torch.bool)
    mask[1, :, 6:] = False
    kept, inside = whole_patches(values, mask, patch_length=4)
    assert kept[0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10] and inside[0].all()
    assert kept[1, 0, :4].tolist() == [2, 3, 4, 5] and inside[1, 0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.0}, "at least one frame, 2.0 s, got 0.0 s"),
        ({"seconds": 56.0}, "max_patches=8 patches together, got 3 and 7"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature > 0"),
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"fmri_values": torch.zeros(1, 5, 3)}, "at least one patch of 4 frames, got 3"),
    ],
)
def test_impossible_forecasts_are_refused(llama: Model, scan: tuple, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.forecast(**{"fmri_values": scan[0], "roi_coordinates": scan[1], **changes})
