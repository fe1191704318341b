"""Vector quantisation: codes, gradients and a codebook that moves only when it should."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import VectorQuantize

from fmrilm.quantization_fmrilm import VectorQuantizer


def quantizer(size: int = 16, dim: int = 8, decay: float = 0.99, threshold: float = 0.0) -> VectorQuantizer:
    """A quantiser in training mode that has had its k-means start."""
    module = VectorQuantizer(size, dim, decay, threshold)
    module.started.fill_(True)
    return module


def buffers(module: VectorQuantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def everything(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def random_vectors(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_codes_are_the_nearest_by_cosine(seed: int, count: int, scale: float) -> None:
    module = quantizer()
    z = scale * random_vectors(count, 8, seed=seed)
    cosine = torch.stack([F.cosine_similarity(row, module.codebook, dim=-1) for row in z])
    chosen = cosine.gather(1, module.encode(z)[:, None])[:, 0]
    assert torch.allclose(chosen, cosine.max(-1).values, atol=1e-6)


def test_codebook_vectors_encode_to_themselves() -> None:
    module = quantizer()
    codes = torch.arange(16).reshape(2, 8)
    assert torch.equal(module.encode(3 * module.embed(codes)), codes)


def test_forward_gives_vectors_codes_and_commitment_loss() -> None:
    module = quantizer().eval()
    z = random_vectors(2, 3, 8)
    quantized, codes, loss = module(z, everything((2, 3)))
    assert torch.equal(codes, module.encode(z))
    assert torch.allclose(quantized, module.embed(codes), atol=1e-6)
    assert torch.allclose(loss, (F.normalize(z, dim=-1) - module.embed(codes)).pow(2).mean())


def test_gradient_passes_straight_through_to_the_normalisation() -> None:
    z = random_vectors(5, 8).requires_grad_()
    weights = random_vectors(5, 8, seed=8)
    quantized, _, _ = quantizer().eval()(z, everything((5,)))
    through = torch.autograd.grad((weights * quantized).sum(), z)[0]
    normalised = torch.autograd.grad((weights * F.normalize(z, dim=-1)).sum(), z)[0]
    assert through.abs().max() > 0.01 and torch.equal(through, normalised)


def test_training_forward_moves_the_codebook() -> None:
    module = quantizer()
    before = buffers(module)
    module(random_vectors(40, 8), everything((40,)))
    assert not torch.equal(module.codebook, before["codebook"]) and not torch.equal(module.usage, before["usage"])
    assert torch.allclose(module.codebook.norm(dim=-1), torch.ones(16))


@pytest.mark.parametrize("started", [True, False])
def test_encoding_and_evaluation_change_no_statistic(started: bool) -> None:
    module = quantizer()
    module.started.fill_(started)
    before = buffers(module)
    module.encode(random_vectors(40, 8))
    module.eval()(random_vectors(40, 8), everything((40,)))
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def test_golden_numbers_of_the_papers_quantiser() -> None:
    module = quantizer(8, 4)
    module.codebook.copy_(F.normalize(torch.arange(32.0).sin().reshape(8, 4), dim=-1))
    untouched = module.codebook[[2, 3, 6]].clone()
    z = torch.cos(0.7 * torch.arange(24.0)).reshape(2, 3, 4).requires_grad_()
    quantized, codes, loss = module(z, everything((2, 3)))
    gradient = torch.autograd.grad(quantized.sum() + loss, z)[0]
    assert codes.flatten().tolist() == [5, 1, 0, 4, 0, 7]
    assert loss.item() == pytest.approx(0.0461885, abs=1e-5)
    assert quantized[0, 0].tolist() == pytest.approx([0.608680, 0.557816, -0.005901, -0.564193], abs=1e-5)
    assert gradient[0, 0].tolist() == pytest.approx([0.177686, 0.302299, 0.644051, 1.026779], abs=1e-5)
    moved = {
        0: [0.003461, 0.674982, 0.728761, 0.115303],
        1: [-0.536518, -0.678003, -0.199083, 0.461331],
        4: [-0.229488, -0.761093, -0.595787, 0.114500],
        5: [0.610120, 0.558027, -0.004601, -0.562440],
        7: [0.209696, -0.515073, -0.767955, -0.317763],
    }
    for row, values in moved.items():
        assert module.codebook[row].tolist() == pytest.approx(values, abs=1e-5)
    assert torch.equal(module.codebook[[2, 3, 6]], untouched)
    # usage is in units of an equal share: 6 vectors over 8 codes
    counts = torch.tensor([2.0, 1, 0, 0, 1, 1, 0, 1])
    assert torch.allclose(module.usage, 0.01 * counts * 8 / 6)


def test_agrees_with_vector_quantize_pytorch() -> None:
    # its moving average is over sums, ours over directions: they are the same while each code takes one vector
    ours = quantizer()
    reference = VectorQuantize(
        8, 16, use_cosine_sim=True, decay=0.99, commitment_weight=1.0, threshold_ema_dead_code=0, rotation_trick=False
    )
    codebook = reference._codebook
    codebook.embed.copy_(ours.codebook[None])
    codebook.embed_avg.copy_(ours.codebook[None])
    z = F.normalize(ours.codebook[::2] + 0.2 * random_vectors(8, 8), dim=-1)
    quantized, codes, loss = ours(z, everything((8,)))
    expected, expected_codes, expected_loss = reference(z[None])
    assert torch.equal(codes, expected_codes[0]) and len(codes.unique()) == 8
    assert torch.allclose(quantized, expected[0], atol=1e-6)
    assert torch.allclose(loss, expected_loss.sum(), atol=1e-6)
    assert torch.allclose(ours.codebook, codebook.embed[0], atol=1e-5)


def test_unused_code_moves_onto_a_vector_of_the_batch() -> None:
    module = quantizer(decay=0.9, threshold=0.1)
    module.usage.fill_(1.0)
    # all vectors lie at code 3: the others' usage decays to 0.1 in ln(0.1) / ln(0.9) updates
    vectors = F.normalize(module.codebook[3] + 0.01 * random_vectors(20, 8), dim=-1)
    before = module.codebook.clone()
    steps = math.ceil(math.log(0.1) / math.log(0.9))
    for _ in range(steps - 1):
        module.update(vectors, torch.full((20,), 3))
    others = torch.arange(16) != 3
    assert torch.equal(module.codebook[others], before[others])
    module.update(vectors, torch.full((20,), 3))
    distance = torch.cdist(module.codebook[others], vectors).min(-1).values
    assert distance.max() < 1e-3
    assert torch.equal(module.usage[others], torch.ones(15))


def test_fewer_vectors_than_dead_codes_revive_as_many() -> None:
    module = quantizer(threshold=0.1)
    before = module.codebook.clone()
    module.update(F.normalize(random_vectors(5, 8), dim=-1), torch.full((5,), 3))
    assert (module.usage == 1).sum() == 5
    # and code 3, which moved towards its vectors
    assert (module.codebook != before).any(-1).sum() == 6


def test_first_training_batch_starts_the_codebook_at_the_means_of_its_clusters() -> None:
    module = VectorQuantizer(4, 8, 0.99, 0.0)
    vectors = F.normalize(torch.eye(8)[:4].repeat_interleave(20, 0) + 0.05 * random_vectors(80, 8), dim=-1)
    module.start(vectors, vectors)
    codes = module.encode(vectors)
    assert module.started and torch.equal(module.usage, torch.ones(4))
    for code in codes.unique():
        center = F.normalize(vectors[codes == code].mean(0), dim=0)
        assert torch.allclose(module.codebook[code], center, atol=1e-5)


def test_start_waits_for_as_many_vectors_as_codes() -> None:
    module = VectorQuantizer(16, 8, 0.99, 0.0)
    before = buffers(module)
    z = F.normalize(random_vectors(18, 8), dim=-1)
    quantized, _, loss = module(z[:10], torch.arange(10) < 9)
    assert torch.allclose(quantized, z[:10], atol=1e-6) and loss == 0
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    module(z[10:], everything((8,)))
    assert module.started
    # 17 vectors on 16 codes: each of them is, or is next to, a code
    assert (z[:9] @ module.codebook.T).max(-1).values.min() > 0.5


def test_start_chooses_without_replacement() -> None:
    module = VectorQuantizer(16, 8, 0.99, 0.0)
    vectors = F.normalize(random_vectors(16, 8), dim=-1)
    module(vectors, everything((16,)))
    assert torch.equal(module.encode(vectors).sort().values, torch.arange(16))
    repeated = VectorQuantizer(16, 8, 0.99, 0.0)
    repeated(vectors.repeat(5, 1), everything((80,)))
    assert torch.equal(repeated.encode(vectors).sort().values, torch.arange(16))


def test_start_needs_as_many_distinct_vectors_as_codes() -> None:
    module = VectorQuantizer(16, 8, 0.99, 0.0)
    vectors = random_vectors(3, 8).repeat(20, 1)
    module(vectors, everything((60,)))
    module(vectors, everything((60,)))
    with pytest.raises(ValueError, match="expected 16, got 3 among the first 180"):
        module(vectors, everything((60,)))
    assert not module.started


@pytest.mark.parametrize("started", [True, False])
def test_masked_vectors_influence_nothing(started: bool) -> None:
    mask = torch.arange(60) % 3 != 0
    results = []
    for padding in (0.0, 100.0):
        module = quantizer(threshold=0.1)
        module.started.fill_(started)
        z = random_vectors(60, 8)
        z[~mask] = padding
        torch.manual_seed(0)
        _, codes, loss = module(z, mask)
        results.append((codes[mask], loss, module.codebook, module.usage))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
