"""Residual quantisation: codes, gradients, codebooks that move only when they should, and the fixed grid."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ, ResidualVQ

from fmrilm import FmriCodecConfig
from fmrilm.modeling_fmricodec import ResidualFiniteScalarQuantizer, ResidualVectorQuantizer, sum_of_codes


def quantizer(started: bool = True, **changes) -> ResidualVectorQuantizer:
    """In training mode; `started`: it has had its k-means start."""
    values = {"num_quantizers": 3, "codebook_size": 16, "codebook_dim": 8, "codebook_groups": 1, **changes}
    values.setdefault("revival_threshold", 0.0)
    module = ResidualVectorQuantizer(FmriCodecConfig(**values))
    if started:
        module.started.fill_(True)
        module.usage.fill_(1.0)
    return module


def grid(values: list[int], levels: int = 1) -> ResidualFiniteScalarQuantizer:
    return ResidualFiniteScalarQuantizer(values, levels)


def random_vectors(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(z: torch.Tensor) -> torch.Tensor:
    return torch.ones(z.shape[:2], dtype=torch.bool)


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(1e-2, 1e2))
@settings(max_examples=25, deadline=None)
def test_each_level_takes_the_nearest_code_to_what_is_left(seed: int, count: int, scale: float) -> None:
    module, residual = quantizer(), scale * random_vectors(count, 8, seed=seed)
    for level, codes in enumerate(module.encode(residual).T):
        distance = torch.cdist(residual.double(), module.codebooks[level].double())
        chosen = distance.gather(1, codes[:, None])[:, 0]
        assert torch.allclose(chosen, distance.min(-1).values, rtol=1e-4)
        residual = residual - module.codebooks[level][codes]


def test_forward_gives_sums_codes_and_commitment_loss_and_passes_gradients() -> None:
    module, z = quantizer().eval(), random_vectors(2, 3, 8).requires_grad_()
    quantized, codes, loss = module(z, everything(z))
    assert torch.equal(codes, module.encode(z)) and codes.shape == (2, 3, 3)
    assert torch.allclose(quantized, sum_of_codes(module.codebooks, codes), atol=1e-6)
    prefixes = [sum_of_codes(module.codebooks, codes[..., :level]) for level in (1, 2, 3)]
    assert torch.allclose(loss, sum((z - prefix).pow(2).mean() for prefix in prefixes))
    weights = random_vectors(2, 3, 8, seed=8)
    assert torch.equal(torch.autograd.grad((weights * quantized).sum(), z)[0], weights)


def test_agrees_with_vector_quantize_pytorch() -> None:
    # as many vectors as codes: its usage counts vectors, ours equal shares
    ours, z = quantizer(), random_vectors(1, 16, 8)
    reference = ResidualVQ(
        dim=8, num_quantizers=3, codebook_size=16, decay=0.99, eps=1e-9, threshold_ema_dead_code=0,
        commitment_weight=1.0, rotation_trick=False,
    )  # fmt: skip
    for layer, codebook in zip(reference.layers, ours.codebooks, strict=True):
        layer._codebook.embed.copy_(codebook[None])
        layer._codebook.embed_avg.copy_(codebook[None])
        layer._codebook.cluster_size.fill_(1.0)
    for seed in range(3):
        z = random_vectors(1, 16, 8, seed=seed)
        quantized, codes, loss = ours(z, everything(z))
        expected, expected_codes, expected_loss = reference(z)
        assert torch.equal(codes, expected_codes) and torch.allclose(loss, expected_loss.sum(), atol=1e-5)
        assert torch.allclose(quantized, expected, atol=1e-5)
    used = ours.usage > 0.99**3 + 1e-6
    for level, layer in enumerate(reference.layers):
        assert torch.allclose(ours.codebooks[level][used[level]], layer._codebook.embed[0][used[level]], atol=1e-4)
        assert torch.allclose(ours.usage[level], layer._codebook.cluster_size[0], atol=1e-5)


def test_levels_take_turns_over_groups_and_each_group_is_quantised_on_its_own() -> None:
    module, z = quantizer(False, num_quantizers=5, codebook_groups=2, revival_threshold=0.1), random_vectors(4, 100, 8)
    torch.manual_seed(0)
    for _ in range(3):
        # k-means, then moving averages and revival
        module(z, everything(z))
    for level, codebook in enumerate(module.codebooks):
        halves = codebook[:, :4], codebook[:, 4:]
        assert halves[level % 2].any() and not halves[(level + 1) % 2].any()
    codes = module.encode(z)
    for group, numbers in enumerate((slice(0, 4), slice(4, 8))):
        alone = quantizer(num_quantizers=3 - group, codebook_dim=4)
        alone.codebooks.copy_(module.codebooks[group::2, :, numbers])
        assert torch.equal(codes[..., group::2], alone.encode(z[..., numbers]))
    errors = [(z - sum_of_codes(module.codebooks, codes[..., :level])).pow(2).mean() for level in range(1, 6)]
    assert errors == sorted(errors, reverse=True)


def test_golden_numbers_of_a_moving_average() -> None:
    module = quantizer(num_quantizers=1, codebook_size=2, codebook_dim=1, ema_decay=0.9)
    module.codebooks.copy_(torch.tensor([[[0.0], [10.0]]]))
    module(torch.tensor([[[1.0], [3.0], [12.0], [13.0], [14.0]]]), torch.tensor([[True, True, True, True, False]]))
    # 0.9 of the old sum and count, 0.1 of those of two vectors, in equal shares of four
    assert module.usage.flatten().tolist() == pytest.approx([0.9 + 0.1, 0.9 + 0.1])
    assert module.codebooks.flatten().tolist() == pytest.approx([0.1 * 2, 0.9 * 10 + 0.1 * 12.5])


@pytest.mark.parametrize("started", [True, False])
def test_encoding_and_evaluation_change_no_statistic_and_padding_none_in_training(started: bool) -> None:
    module, z = quantizer(started), random_vectors(4, 10, 8)
    before = buffers(module)
    module.encode(z)
    module.eval()(z, everything(z))
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    mask, found = torch.arange(40).view(4, 10) % 3 != 0, []
    for padding in (0.0, 100.0):
        module = quantizer(started, revival_threshold=0.1)
        torch.manual_seed(0)
        _, codes, loss = module(torch.where(mask[..., None], z, torch.tensor(padding)), mask)
        found.append((codes[mask], loss, module.codebooks, module.usage))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert not torch.equal(found[0][2], before["codebooks"])


def test_start_puts_codes_at_the_means_of_clusters_level_by_level() -> None:
    module = quantizer(False, num_quantizers=2, codebook_size=4)
    coarse, fine = 10 * torch.eye(8)[:4], torch.eye(8)[4:]
    module.start((coarse[:, None] + fine).flatten(0, 1).repeat(10, 1))
    codes = module.encode((coarse[:, None] + fine).flatten(0, 1))
    assert module.started and torch.equal(module.usage > 0, module.usage == 1)
    error = (sum_of_codes(module.codebooks, codes) - (coarse[:, None] + fine).flatten(0, 1)).norm(dim=-1)
    # random starts may share a cluster
    assert error.median() < 1e-4


def test_start_with_fewer_distinct_vectors_than_codes_is_finite_and_revives_the_rest() -> None:
    module, few = quantizer(False, revival_threshold=0.1), random_vectors(3, 8)
    module(few.repeat(1, 5, 1), torch.ones(1, 15, dtype=torch.bool))
    assert module.codebooks.isfinite().all()
    assert torch.allclose(sum_of_codes(module.codebooks, module.encode(few)), few, atol=1e-4)
    module(random_vectors(10, 20, 8), torch.ones(10, 20, dtype=torch.bool))
    assert len(module.codebooks[0].unique(dim=0)) == 16
    with pytest.raises(ValueError, match="expected vectors to start the codebooks from, got none"):
        quantizer(False).start(few[:0])


def test_unused_code_moves_onto_a_vector_of_the_batch() -> None:
    module = quantizer(ema_decay=0.9, revival_threshold=0.1)
    vectors = module.codebooks[0, 3] + 0.01 * random_vectors(20, 8)
    before, others = module.codebooks[0].clone(), torch.arange(16) != 3
    # all vectors lie at code 3: the others' usage decays to 0.1 in ln(0.1) / ln(0.9) updates
    for _ in range(math.ceil(math.log(0.1) / math.log(0.9)) - 1):
        module.update(0, vectors, torch.full((20,), 3))
    assert torch.equal(module.codebooks[0][others], before[others])
    module.update(0, vectors, torch.full((20,), 3))
    assert torch.cdist(module.codebooks[0][others], vectors).min(-1).values.max() < 1e-3
    # a batch with fewer vectors than dead codes revives as many
    module.usage.zero_()
    module.update(0, vectors[:5], torch.full((5,), 3))
    assert (module.usage[0] == 1).sum() == 5


def test_dropout_decodes_prefixes_of_the_levels() -> None:
    module, z = quantizer(quantizer_dropout=1.0), random_vectors(200, 1, 8)
    codebooks = module.codebooks.clone()
    quantized, codes, _ = module(z, everything(z))
    prefixes = torch.stack([sum_of_codes(codebooks, codes[..., :level]) for level in (1, 2, 3)])
    nearest = (prefixes - quantized.detach()).flatten(2).norm(dim=-1).min(0)
    assert nearest.values.max() < 1e-5 and torch.bincount(nearest.indices).min() > 40
    whole = sum_of_codes(module.codebooks, module.encode(z))
    assert torch.allclose(module.eval()(z, everything(z))[0], whole, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "codes", "size"),
    [([8, 8, 8, 6, 5], [2556, 12240, 14401], 15360), ([7, 5, 5, 5, 5], [696, 3472, 4026], 4375)],
)
def test_golden_numbers_of_the_papers_grid(values: list[int], codes: list[int], size: int) -> None:
    z = (2 * torch.arange(15.0).sin()).reshape(1, 3, 5)
    quantized, found, loss = grid(values)(z, everything(z))
    assert found[..., 0].tolist() == [codes] and loss == 0
    assert torch.allclose(quantized, sum_of_codes(grid(values).codebooks, found), atol=1e-6)
    config = FmriCodecConfig(quantizer="fsq", fsq_levels=values)
    assert (config.codebook_size, config.codebook_dim) == (size, 5)
    assert FmriCodecConfig.from_dict(config.to_dict()).codebook_size == size


@given(st.lists(st.integers(2, 9), min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_every_code_of_the_grid_is_reached_and_levels_refine(values: list[int], levels: int) -> None:
    module = grid(values, levels)
    z = torch.cartesian_prod(*[torch.linspace(-3, 3, 61)] * len(values)).view(-1, len(values))
    codes, bounded = module.encode(z), module._bound(z) / (module.values // 2)
    assert codes.min() >= 0 and len(codes[:, 0].unique()) == math.prod(values)
    for level in range(1, levels + 1):
        error = (sum_of_codes(module.codebooks, codes[:, :level]) - bounded).abs().max(0).values
        assert (error <= 0.51 / (module.values // 2) / module.values ** (level - 1)).all()


@pytest.mark.parametrize("values", [[7, 5, 5, 5, 5], [3, 9]])
def test_grid_agrees_with_vector_quantize_pytorch(values: list[int]) -> None:
    # with odd numbers of values its rule is the same but for the bound, which is 0.2 % wider
    vectors, codes = FSQ(values)(z := random_vectors(1, 2000, len(values), seed=0))
    ours = grid(values)
    clear = ((ours._bound(z).abs() % 1 - 0.5).abs() > 0.002 * max(values)).all(-1)
    assert clear.float().mean() > 0.8
    assert torch.equal(ours.encode(z)[..., 0][clear], codes[clear].long())
    assert torch.allclose(F.embedding(codes.long(), ours.codebooks[0]), vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantizer": "fsq"}, "expected fsq_levels for 'fsq' alone, got None"),
        ({"fsq_levels": [5, 5]}, "got \\[5, 5\\] for 'vq'"),
        ({"quantizer": "fsq", "fsq_levels": [5, 1]}, "at least 2 levels"),
        ({"quantizer": "pq"}, "'vq' or 'fsq', got 'pq'"),
        ({"num_quantizers": 0}, "at least 1 level, got num_quantizers=0"),
        ({"codebook_dim": 6}, "codebook_groups=4, codebook_dim=6"),
        ({"num_quantizers": 3}, "no more than the levels, got codebook_groups=4, .* num_quantizers=3"),
        ({"codebook_groups": 0}, "got codebook_groups=0"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "got 16 and 3"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FmriCodecConfig(**values)
