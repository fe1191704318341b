"""Finite scalar quantisation: golden numbers, round trips and the reference library."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ

from fmrilm import FmriCodecConfig
from fmrilm.fsq_fmrilm import FiniteScalarQuantizer


Z = (2 * torch.arange(15.0).sin()).reshape(1, 3, 5)


@pytest.mark.parametrize(
    ("levels", "codes", "size"),
    [([8, 8, 8, 6, 5], [2556, 12240, 14401], 15360), ([7, 5, 5, 5, 5], [696, 3472, 4026], 4375)],
)
def test_golden_numbers_of_the_papers_quantiser(levels: list[int], codes: list[int], size: int) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    quantized, found, loss = quantizer(Z, torch.ones(1, 3, dtype=torch.bool))
    assert found.tolist() == [codes] == quantizer.encode(Z).tolist() and loss == 0
    assert torch.allclose(quantized, quantizer.embed(found), atol=1e-6)
    if size == 15360:
        assert quantized[0, 0].tolist() == pytest.approx([0, 0.75, 0.75, 1 / 3, -1], abs=1e-5)
    config = FmriCodecConfig(quantizer="fsq", fsq_levels=levels)
    assert (config.codebook_size, config.codebook_dim) == (size, 5)
    assert FmriCodecConfig.from_dict(config.to_dict()).codebook_size == size


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_every_code_is_reached_and_comes_back(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(math.prod(levels))
    vectors = quantizer.embed(codes)
    assert len(vectors.unique(dim=0)) == len(codes) and vectors.abs().max() <= 1
    spread = 20 * torch.rand(20_000, len(levels), generator=torch.Generator().manual_seed(0)) - 10
    reached = quantizer.encode(spread)
    assert reached.min() >= 0 and reached.max() < len(codes)
    # each level of each dimension occurs
    for place, count in enumerate(levels):
        assert len(quantizer.embed(reached)[:, place].unique()) == count


@pytest.mark.parametrize("levels", [[7, 5, 5, 5, 5], [3, 9]])
def test_agrees_with_vector_quantize_pytorch(levels: list[int]) -> None:
    # with odd levels its rule is the same but for the bound, which is 0.2 % wider
    reference = FSQ(levels)
    z = torch.randn(1, 2000, len(levels), generator=torch.Generator().manual_seed(0))
    vectors, codes = reference(z)
    ours = FiniteScalarQuantizer(levels)
    unrounded = ours.continuous(z) * (torch.tensor(levels) // 2)
    clear = ((unrounded.abs() % 1 - 0.5).abs() > 0.002 * max(levels)).all(-1)
    assert clear.float().mean() > 0.8
    assert torch.equal(ours.encode(z)[clear], codes[clear].long())
    assert torch.allclose(ours.embed(codes.long()), vectors, atol=1e-6)


def test_gradient_passes_through_the_rounding() -> None:
    quantizer = FiniteScalarQuantizer([5, 4])
    z = torch.tensor([[0.3, -0.7]], requires_grad=True)
    through = torch.autograd.grad(quantizer(z, torch.ones(1, dtype=torch.bool))[0].sum(), z)[0]
    assert torch.allclose(through, torch.autograd.grad(quantizer.continuous(z).sum(), z)[0])
    assert through.abs().min() > 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantizer": "fsq"}, "expected fsq_levels for 'fsq' alone, got None"),
        ({"fsq_levels": [5, 5]}, "got \\[5, 5\\] for 'vq'"),
        ({"quantizer": "fsq", "fsq_levels": [5, 1]}, "at least 2 levels"),
        ({"quantizer": "pq"}, "'vq' or 'fsq', got 'pq'"),
        ({"token_layout": "rois"}, "'latent' or 'roi', got 'rois'"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FmriCodecConfig(**values)
