"""Forecasts and surprise: causal, independent of padding and batch-mates, in line with the model's own losses."""

import pytest
import torch

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.forecast_fmrilm import fading
from fmrilm.steps_fmrilm import whole_steps
from scan_rows import LONG, SHORT, expected_code_logits


Model = FmriLMForConditionalGeneration
BATCH = torch.tensor([LONG, SHORT + [-1] * 4])


@pytest.fixture
def scan() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 5, 12, generator=generator), 60 * torch.randn(1, 5, 3, generator=generator)


def next_codes(model: Model, codes: list[int]) -> list[int]:
    """The most likely next step by one uncached pass over the scan alone."""
    config = model.config
    row = torch.tensor([[config.fmri_start_token_id] + [config.fmri_token_id] * len(codes)])
    hidden = model.model(row, fmri_codes=torch.tensor([codes])).last_hidden_state
    tokens = (len(codes) - 2, len(codes) - 1)
    return [int(expected_code_logits(model, hidden[0, 1 + token], codes, token).argmax()) for token in tokens]


@torch.no_grad()
def test_rolled_codes_equal_one_uncached_pass_for_each_step(model: Model) -> None:
    expected = list(LONG)
    for _ in range(3):
        expected += next_codes(model, expected)
    assert model.forecast_codes(torch.tensor([LONG]), steps=3).tolist() == [expected]


def test_batch_mates_of_other_lengths_do_not_change_a_forecast(model: Model) -> None:
    together = model.forecast_codes(BATCH, steps=2)
    for row, codes in enumerate((LONG, SHORT)):
        alone = model.forecast_codes(torch.tensor([codes]), steps=2)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == -1).all()


def test_draws_repeat_with_their_seed_and_follow_the_temperature(llama: Model) -> None:
    scans = torch.tensor([LONG] * 32)

    def draw(temperature: float, seed: int) -> torch.Tensor:
        return llama.forecast_codes(scans, 1, temperature, torch.Generator().manual_seed(seed))[:, len(LONG) :]

    assert torch.equal(draw(1.0, 0), draw(1.0, 0))
    assert not torch.equal(draw(1.0, 0), draw(1.0, 1))
    assert torch.equal(draw(1e-4, 0), llama.forecast_codes(scans, 1)[:, len(LONG) :])


def test_a_drawn_forecast_decodes_the_drawn_codes_after_the_context(model: Model, scan: tuple) -> None:
    values, coordinates = scan
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    forecast = model.forecast(values, coordinates, None, 2, 1.0, generators[0])
    codes = model.forecast_codes(model.model.get_fmri_codes(values, coordinates), 2, 1.0, generators[1])
    assert torch.allclose(forecast, model.model.codec.decode(codes, coordinates)[..., 12:], atol=1e-6)
    assert forecast.shape == (1, 5, 8)


@torch.no_grad()
def test_the_best_guess_decodes_the_expected_vectors(model: Model, scan: tuple) -> None:
    values, coordinates = scan
    codec, config = model.model.codec, model.config
    context = model.model.get_fmri_codes(values, coordinates)[0].tolist()
    row = torch.tensor([[config.fmri_start_token_id] + [config.fmri_token_id] * len(context)])
    hidden = model.model(row, fmri_codes=torch.tensor([context])).last_hidden_state[0, 1:]
    chances = [expected_code_logits(model, hidden[token], context, token).softmax(-1) for token in (4, 5)]
    vectors = torch.cat([codec.embed_codes(torch.tensor(context)), torch.stack(chances) @ codec.quantizer.codebook])
    signal = codec.decode_vectors(vectors[None], coordinates, torch.ones(1, 8, dtype=torch.bool))
    missed = values - signal[..., :12]
    expected = signal[..., 12:] + fading(missed, torch.tensor([[12]]), 4)
    assert torch.allclose(model.forecast(values, coordinates), expected, atol=1e-5)


@torch.no_grad()
def test_the_best_guess_reads_on_from_what_it_expects(model: Model, scan: tuple) -> None:
    codebook, seen = model.codebook(), []

    def follow(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return codebook[torch.tensor([[[2, 6], [7, 7]][len(seen) - 1]])]

    rolled = model._roll(torch.tensor([LONG]), 2, follow)
    assert torch.allclose(rolled[0], codebook[LONG + [2, 6, 7, 7]], atol=1e-6)
    # the second step is asked for after the codes whose vectors were read
    codes = LONG + [2, 6]
    row = torch.tensor([[model.config.fmri_start_token_id] + [model.config.fmri_token_id] * len(codes)])
    hidden = model.model(row, fmri_codes=torch.tensor([codes])).last_hidden_state[0, 1:]
    expected = [expected_code_logits(model, hidden[token], codes, token) for token in (8, 9)]
    assert torch.allclose(seen[1][0], torch.stack(expected), atol=1e-4)


def test_what_codes_leave_out_fades_by_its_own_autocorrelation() -> None:
    missed = torch.zeros(2, 1, 60)
    missed[0, 0, :40] = 0.8 ** torch.arange(40)
    missed[1, 0] = (-1.0) ** torch.arange(60)
    future = fading(missed, torch.tensor([[40], [60]]), 3)
    expected = missed[0, 0, 39] * 0.8 ** torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(future[0, 0], expected, rtol=1e-3)
    # what turns around does not last
    assert (future[1] == 0).all()


def test_the_best_guess_of_a_sure_model_decodes_its_codes(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    with torch.no_grad():
        for weight in (llama.fmri_head.weight, *llama.fmri_autoregression.parameters()):
            weight.mul_(100)
    codes = llama.forecast_codes(llama.model.get_fmri_codes(values, coordinates), steps=2)
    decoded = llama.model.codec.decode(codes, coordinates)
    rest = fading(values - decoded[..., :12], torch.tensor([[12]]), 8)
    assert torch.allclose(llama.forecast(values, coordinates, steps=2), decoded[..., 12:] + rest, atol=1e-4)


def test_forecast_starts_after_the_last_frame(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    whole = llama.forecast(values[..., 3:11], coordinates)
    assert torch.equal(llama.forecast(values[..., :11], coordinates), whole)


def test_padding_does_not_change_a_forecast(llama: Model, scan: tuple) -> None:
    values, coordinates = scan
    padded = torch.cat([torch.nn.functional.pad(values[..., 2:], (0, 2)), values])
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[0, :, 10:] = False
    both = llama.forecast(padded, coordinates.expand(2, -1, -1), mask)
    assert torch.allclose(both[0], llama.forecast(values[..., 2:], coordinates)[0], atol=1e-5)
    assert torch.allclose(both[1], llama.forecast(values, coordinates)[0], atol=1e-5)


@torch.no_grad()
def test_mean_surprise_is_the_next_step_loss(model: Model) -> None:
    config = model.config
    row = torch.tensor([[config.fmri_start_token_id] + [config.fmri_token_id] * len(LONG)])
    loss = model(row, fmri_codes=torch.tensor([LONG]), labels=row).fmri_loss
    surprise = model.surprise(torch.tensor([LONG]))
    assert surprise.shape == (1, 4) and surprise[0, 0].isnan()
    assert torch.allclose(surprise[0, 1:].mean(), loss, atol=1e-5)


def test_surprise_of_a_step_knows_neither_the_future_nor_batch_mates(model: Model) -> None:
    together = model.surprise(BATCH)
    assert torch.allclose(together[1, :2], model.surprise(torch.tensor([SHORT]))[0], atol=1e-5, equal_nan=True)
    assert together[1, 2:].isnan().all()
    changed = torch.tensor([LONG[:6] + [7, 7]])
    assert torch.allclose(together[0, 1:3], model.surprise(changed)[0, 1:3], atol=1e-5)
    assert not torch.allclose(together[0, 3], model.surprise(changed)[0, 3], atol=1e-5)


def test_whole_steps_end_with_the_last_frame() -> None:
    values = torch.arange(11.0).expand(2, 1, -1)
    mask = torch.ones(2, 1, 11, dtype=torch.bool)
    mask[1, :, 6:] = False
    kept, inside = whole_steps(values, mask, patch_length=4)
    assert kept[0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10] and inside[0].all()
    assert kept[1, 0, :4].tolist() == [2, 3, 4, 5] and inside[1, 0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"steps": 7}, "max_steps=8 steps together, got 3 and 7"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"fmri_values": torch.zeros(1, 5, 3)}, "at least one step of 4 frames, got 3"),
    ],
)
def test_impossible_forecasts_are_refused(llama: Model, scan: tuple, changes: dict, message: str) -> None:
    values, coordinates = scan
    with pytest.raises(ValueError, match=message):
        llama.forecast(**{"fmri_values": values, "roi_coordinates": coordinates, **changes})


def test_a_model_that_reads_features_cannot_read_on_from_codes(llama: Model, scan: tuple) -> None:
    llama.config.fmri_input = "features"
    for ask in (
        lambda: llama.forecast(*scan),
        lambda: llama.forecast_codes(torch.tensor([LONG]), 1),
        lambda: llama.surprise(torch.tensor([LONG])),
    ):
        with pytest.raises(ValueError, match='expected a model with fmri_input="codes".*got fmri_input="features"'):
            ask()
