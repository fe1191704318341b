"""The autoregression of codes: what it learns from codes alone, and that the language model starts from there."""

import numpy as np
import pytest
import torch

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.training.alignment.start import fit_autoregression
from scan_rows import codes, ids


Model = FmriLMForConditionalGeneration
SIZE = 16


def chains(count: int, seed: int) -> np.ndarray:
    """Codes [scans, 16] of eight steps of two slots; the first slot counts up, the second is 3 or seldom 5."""
    rng = np.random.default_rng(seed)
    first = (rng.integers(SIZE, size=(count, 1)) + np.arange(8)) % SIZE
    return np.stack([first, np.where(rng.uniform(size=(count, 8)) < 0.9, 3, 5)], -1).reshape(count, 16)


@pytest.fixture
def fitted(llama: Model) -> Model:
    torch.manual_seed(0)
    fit_autoregression(llama, chains(400, 0), steps=400, seed=0)
    return llama


def test_each_slot_learns_its_own_codes(fitted: Model) -> None:
    surprise = fitted.surprise(torch.from_numpy(chains(64, 1)))[:, 1:].mean()
    # chance is log 16 = 2.77 nats a code; how common codes are in each slot, (2.77 + 0.33) / 2
    assert surprise < 1.3
    assert (fitted.forecast_codes(torch.from_numpy(chains(64, 1)[:, :8]), 1)[:, 9] == 3).all()


def test_without_steps_codes_are_as_common_as_they_were(llama: Model) -> None:
    seen = chains(400, 0)
    for weight in llama.fmri_autoregression.parameters():
        torch.nn.init.zeros_(weight)
    fit_autoregression(llama, seen, steps=1, seed=0)
    logits = llama.fmri_autoregression.frequencies
    assert torch.allclose(logits.exp().sum(-1), torch.ones(2))
    share = (seen[:, 1::2] == 3).mean()
    expected = (share * 3200 + 10) / (3200 + 10 * SIZE)
    assert logits[1, 3].exp().item() == pytest.approx(expected, abs=1e-5)


def test_the_language_model_starts_at_nothing_and_the_rest_stays(fitted: Model) -> None:
    assert (fitted.fmri_head.weight == 0).all()
    assert not any(weight.requires_grad for weight in fitted.fmri_autoregression.parameters())
    scan = chains(1, 2)[0].tolist()
    row = ids(fitted, scan)
    before = [weight.clone() for weight in fitted.fmri_autoregression.parameters()]
    optimizer = torch.optim.SGD([weight for weight in fitted.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = fitted(row, fmri_codes=codes(scan), labels=row).fmri_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, before, fitted.fmri_autoregression.parameters()))


def test_fitting_repeats_with_its_seed(tiny_model) -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fit_autoregression(model, chains(32, 0), steps=3, seed=seed)
    first, same, other = (model.fmri_autoregression.output_proj.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
