"""The codec: fMRI to discrete tokens and back (stage 1, the paper's neural tokenizer)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_fmrilm import SCAN_CODE_VALUES, FmriCodecConfig


# MNI coordinates are divided by this many mm before the Fourier features: it spans the brain once
COORDINATE_SCALE = 100.0
# wavelengths from 400 mm down to 70 mm: what regions that lie together share, not what sets each one apart
NUM_FREQUENCIES = 6
BASIS_WIDTH = 256
KMEANS_ITERATIONS = 10
# distances that are held at once while vectors look for their codes
DISTANCES = 2**24
# ROIs of two atlases whose centres are at most so many mm apart are the same
SAME_ROI = 4.0
# weight of the identity in correlations between ROIs, which there are more of than frames
CORRELATION_SHRINKAGE = 0.3
# SigLIP starts at the odds of a random pair being a match: this is the logarithm of those in a batch of 20
INITIAL_BIAS = -3.0
INITIAL_SCALE = 10.0


# What processes that train together have to agree on. A process that trains alone agrees with itself.


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks (in place)."""
    if _distributed():
        dist.all_reduce(values)
    return values


def same_on_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """What the first rank has in `values`, on every rank (in place)."""
    if _distributed():
        dist.broadcast(values, 0)
    return values


def counts_and_rank(count: int, device: torch.device) -> tuple[list[int], int]:
    """`count` of each rank, and which of them is this one."""
    if not _distributed():
        return [count], 0
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return torch.cat(counts).tolist(), dist.get_rank()


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows [n, ...] of all ranks in rank order, n may differ, without gradient; and where this rank's begin."""
    counts, rank = counts_and_rank(len(rows), rows.device)
    if len(counts) == 1:
        return rows, 0
    padded = F.pad(rows.detach(), (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, sum(counts[:rank])


def random_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The same `count` rows on every rank, sampled without replacement from the rows [n, dim] of all ranks."""
    counts, rank = counts_and_rank(len(rows), rows.device)
    chosen = same_on_all_ranks(torch.randperm(sum(counts)).to(rows.device))[:count]
    chosen = chosen - sum(counts[:rank])
    here = (chosen >= 0) & (chosen < len(rows))
    sampled = rows.new_zeros(len(chosen), *rows.shape[1:])
    sampled[here] = rows[chosen[here]]
    return sum_over_ranks(sampled)


class FmriSpatialBasis(nn.Module):
    """
    Factor analysis whose loadings are functions of MNI coordinates. At each frame the signal of the ROI at x is
    sum_k f_k(x) a_k, plus independent noise as large as the prior of the coefficients a. Their posterior mean exists
    for any ROIs, in any number, some of them missing; the functions then give the signal anywhere else.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6 * NUM_FREQUENCIES, BASIS_WIDTH), nn.GELU(), nn.Linear(BASIS_WIDTH, config.num_basis_functions)
        )

    def init_weights(self) -> None:
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Functions float32 [..., basis functions] at coordinates [..., 3] in mm."""
        # half an octave apart, from a wavelength of 400 mm downwards
        octaves = torch.arange(NUM_FREQUENCIES, device=coordinates.device, dtype=torch.float32) / 2
        angles = coordinates.float()[..., None] / COORDINATE_SCALE * (0.5 * math.pi * 2**octaves)
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2))

    @staticmethod
    def coefficients(functions: torch.Tensor, patches: torch.Tensor, roi_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Posterior means float32 [batch, patches, basis functions, patch_length] of patches
        [batch, patches, rois, patch_length], zero where there are no data, under functions
        [batch, rois, basis functions]; roi_mask bool [batch, patches, rois]: ROIs that hold data, None if all do.
        """
        functions = functions[:, None]
        if roi_mask is not None:
            functions = functions * roi_mask[..., None]
        identity = torch.eye(functions.shape[-1], device=functions.device)
        # positive definite by construction, so that no check of the values is needed
        factor = torch.linalg.cholesky_ex(functions.mT @ functions + identity).L
        return torch.cholesky_solve(functions.mT @ patches, factor)

    def negative_log_likelihood(self, covariance: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Of one scan, for each ROI: covariance [rois, rois] at coordinates [rois, 3] in mm; its noise is the best."""
        factor, noise = self._precision_and_noise(covariance, coordinates)
        return 2 * factor.diagonal().log().sum() / len(coordinates) + noise.log()

    def posterior_covariance(self, covariance: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """[basis functions, basis functions] of a frame's coefficients, of one scan as above."""
        factor, noise = self._precision_and_noise(covariance, coordinates)
        return noise * torch.cholesky_inverse(factor)

    def _precision_and_noise(
        self, covariance: torch.Tensor, coordinates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cholesky factor of the coefficients' posterior precision in units of the noise, and the noise's variance."""
        functions = self(coordinates)
        identity = torch.eye(functions.shape[-1], device=functions.device)
        factor = torch.linalg.cholesky(functions.mT @ functions + identity)
        half = torch.linalg.solve_triangular(factor, functions.mT, upper=False)
        return factor, (covariance.trace() - ((half @ covariance) * half).sum()) / len(functions)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class FmriCodecAttention(nn.Module):
    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """states: [batch, tokens, hidden]; mask: what may be attended to, bool [batch or 1, 1, tokens, tokens]."""
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        output, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(output.flatten(-2))


class FmriCodecLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = FmriCodecAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = states + self.attention(self.attention_norm(states), mask)
        return states + self.mlp(self.mlp_norm(states))


class FmriCodecTransformer(nn.Module):
    """
    A transformer over latent tokens, causal over patches, whose output is added to what a linear map gives. It starts
    at zero. `pooled`: one output a patch, of the mean of its tokens.
    """

    def __init__(self, config: FmriCodecConfig, num_layers: int, output_size: int, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.input_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.token_embeddings = nn.Parameter(torch.zeros(config.tokens_per_patch, config.hidden_size))
        self.patch_embeddings = nn.Parameter(torch.zeros(config.max_patches, config.hidden_size))
        self.layers = nn.ModuleList(FmriCodecLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_proj = nn.Linear(config.hidden_size, output_size)

    def init_weights(self, std: float) -> None:
        init.normal_(self.token_embeddings, std=std)
        init.normal_(self.patch_embeddings, std=std)
        init.zeros_(self.output_proj.weight)

    def forward(self, vectors: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """
        [batch, patches, tokens, output_size], without tokens if pooled, of vectors
        [batch, patches, tokens, codebook_dim]; patch_mask bool [batch, patches]: patches that hold data.
        """
        patches, tokens = vectors.shape[1:3]
        states = self.input_proj(vectors) + self.token_embeddings + self.patch_embeddings[:patches, None]
        index = torch.arange(patches, device=vectors.device)
        # padding attends to itself, as softmax needs something, but nothing else attends to it
        visible = (index < index[:, None]) & patch_mask[:, None] | (index == index[:, None])
        mask = visible.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)[:, None]
        states = states.flatten(1, 2)
        for layer in self.layers:
            states = layer(states, mask)
        states = self.norm(states).unflatten(1, (patches, tokens))
        return self.output_proj(states.mean(2) if self.pooled else states)


class KeptInFloat32(nn.Module):
    """Follows the model it is a part of to other devices, and never to another floating type."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            other = fn(tensor)
            if other.dtype == torch.float32 or not other.is_floating_point():
                return other
            # not what was rounded on the way
            return tensor.to(other.device).float()

        return super()._apply(moved, recurse)


def sum_of_codes(codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Vectors [..., dim] of codes [..., levels], all levels or the first ones, in codebooks [levels, codes, dim]."""
    levels, size = codes.shape[-1], codebooks.shape[1]
    rows = codes + size * torch.arange(levels, device=codes.device)
    return F.embedding(rows, codebooks[:levels].flatten(0, 1)).sum(-2)


class ResidualVectorQuantizer(nn.Module):
    """
    A vector as the sum of `num_quantizers` codebook vectors, each the nearest one to what the levels before left over
    (Euclidean; SoundStream, EnCodec). Levels take turns over `codebook_groups` equal parts of the vector and are zero
    outside of theirs: 512 codes are too few for many numbers at once (group-residual quantisation; HiFi-Codec, Yang et
    al. 2023). Codebooks follow their vectors by moving averages, start by k-means on the first batch, and move dead
    codes onto vectors of the batch. Processes that train together hold one codebook: the one that a single process
    would have on all their vectors.

    Codebooks change only through `start` and `update`, which `forward` calls in training mode.
    """

    codebooks: torch.Tensor
    usage: torch.Tensor
    started: torch.Tensor

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.num_quantizers, self.codebook_size = config.num_quantizers, config.codebook_size
        self.decay, self.revival_threshold = config.ema_decay, config.revival_threshold
        self.dropout = config.quantizer_dropout
        self.groups, self.width = config.codebook_groups, config.codebook_dim // config.codebook_groups
        size = (config.num_quantizers, config.codebook_size)
        self.register_buffer("codebooks", torch.zeros(*size, config.codebook_dim))
        # moving number of a code's vectors, in equal shares: 1 is a code that takes as many as the average code
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("started", torch.tensor(False))
        self.init_weights()

    def init_weights(self) -> None:
        """The same random vectors in every process, smaller from level to level."""
        generator = torch.Generator().manual_seed(0)
        levels = torch.arange(self.num_quantizers)[:, None, None]
        inside = torch.arange(self.groups * self.width) // self.width == levels % self.groups
        vectors = torch.randn(self.codebooks.shape, generator=generator)
        init.copy_(self.codebooks, 0.5 ** (levels // self.groups) * vectors * inside)
        init.zeros_(self.usage)
        init.zeros_(self.started)

    def part(self, level: int) -> slice:
        """The numbers of a vector that a level is about."""
        start = level % self.groups * self.width
        return slice(start, start + self.width)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [..., levels] of the vectors z [..., codebook_dim]."""
        residual, codes = z.flatten(0, -2), []
        for level, codebook in enumerate(self.codebooks):
            part = self.part(level)
            codes.append(self._nearest(residual[:, part], codebook[:, part]))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, -1).unflatten(0, z.shape[:-1])

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            z: [batch, tokens, codebook_dim]; mask: bool [batch, tokens], False where the vector is padding.

        Returns:
            quantised vectors (gradient passed straight through), codes [batch, tokens, levels], and the commitment
            loss: mean squared distance of valid vectors to their codes, summed over levels. While training, a share
            `dropout` of the rows gets the sum of a random prefix of the levels.
        """
        valid = z.detach()[mask]
        moving = self.training and bool(self.started)
        if self.training and not moving:
            self.start(gather_rows(valid)[0])
        codes = self.encode(z)
        kept = torch.full((len(z),), self.num_quantizers, device=z.device)
        if self.training and self.dropout:
            prefix = torch.randint(1, self.num_quantizers + 1, (len(z),), device=z.device)
            kept = torch.where(torch.rand(len(z), device=z.device) < self.dropout, prefix, kept)
        residual, quantized, loss = z, torch.zeros_like(z), z.new_zeros(())
        for level, codebook in enumerate(self.codebooks):
            vectors, part = codebook[codes[..., level]], self.part(level)
            loss = loss + F.mse_loss(residual[mask][:, part], vectors[mask][:, part])
            if moving:
                self.update(level, residual.detach()[mask], codes[mask][:, level])
            residual = residual - vectors
            quantized = quantized + vectors * (level < kept)[:, None, None]
        return z + (quantized - z).detach(), codes, loss

    @torch.no_grad()
    def start(self, vectors: torch.Tensor, together: bool = True) -> None:
        """
        k-means of vectors [n, codebook_dim], the same on all ranks if `together`, and of what each level leaves over
        of them. With fewer distinct vectors than codes, the codes left over wait for revival.
        """
        residual = vectors
        if not len(residual):
            raise ValueError("expected vectors to start the codebooks from, got none")
        self.codebooks.zero_()
        for level, usage in enumerate(self.usage):
            left = residual[:, self.part(level)]
            order = torch.randperm(len(left), device="cpu").to(left.device)
            codebook = left[order[torch.arange(self.codebook_size, device=order.device) % len(order)]]
            if together:
                same_on_all_ranks(codebook)
            for _ in range(KMEANS_ITERATIONS):
                sums, counts = self._totals(left, self._nearest(left, codebook))
                codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)
            if together:
                # each rank got here by the same calls; the last bits may differ from one kind of machine to another
                same_on_all_ranks(codebook)
            codes = self._nearest(left, codebook)
            usage.copy_((torch.bincount(codes, minlength=self.codebook_size) > 0).float())
            self.codebooks[level, :, self.part(level)] = codebook
            residual = residual - self.codebooks[level][codes]
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, level: int, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """Moves a level's codes towards their vectors [n, codebook_dim], then dead codes onto some of the vectors."""
        part = self.part(level)
        codebook, usage, vectors = self.codebooks[level, :, part], self.usage[level], vectors[:, part]
        sums, counts = (sum_over_ranks(total) for total in self._totals(vectors, codes))
        share = (1 - self.decay) * self.codebook_size / counts.sum()
        before, after = self.decay * usage, self.decay * usage + share * counts
        moved = (before[:, None] * codebook + share * sums) / after.clamp(min=1e-12)[:, None]
        codebook.copy_(torch.where(counts[:, None] > 0, moved, codebook))
        usage.copy_(after)
        dead = (usage < self.revival_threshold).nonzero()[:, 0]
        if len(dead):
            revived = random_rows(vectors, len(dead))
            # a batch may hold fewer vectors than there are dead codes
            rows = dead[: len(revived)]
            codebook[rows] = revived
            usage[rows] = 1.0

    @staticmethod
    def _nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """Codes [n] of the nearest vectors of a codebook [codebook_size, width] to vectors [n, width]."""
        offset = codebook.pow(2).sum(-1) / 2
        parts = vectors.split(max(1, DISTANCES // len(codebook)))
        return torch.cat([(part @ codebook.T - offset).argmax(-1) for part in parts])

    def _totals(self, vectors: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the vectors [n, width] of each code: [codebook_size, width], [codebook_size]."""
        counts = torch.bincount(codes, minlength=self.codebook_size).to(vectors.dtype)
        return vectors.new_zeros(self.codebook_size, vectors.shape[-1]).index_add_(0, codes, vectors), counts


class ResidualFiniteScalarQuantizer(nn.Module):
    """
    Each of a vector's few numbers is squashed and rounded to one of `fsq_levels[i]` values in -1..1 (Mentzer et al.
    2024); each further level divides what is left over into as many values again. A code is the mixed-radix number of
    a level's digits, the first one counting least. Nothing is learned and nothing can die out.
    """

    values: torch.Tensor

    def __init__(self, fsq_levels: Sequence[int], num_quantizers: int):
        super().__init__()
        self.fsq_levels, self.num_quantizers = tuple(fsq_levels), num_quantizers
        self.codebook_size = math.prod(fsq_levels)
        # a tensor, so that it is where the model is
        self.register_buffer("values", torch.tensor(fsq_levels))

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [..., levels] of the vectors z [..., len(fsq_levels)]."""
        values, half_width, offset, basis = self._grid()
        place, codes = self._bound(z), []
        for _ in range(self.num_quantizers):
            digits = place.round().clamp(-half_width, values - 1 - half_width)
            codes.append(((digits.long() + half_width) * basis).sum(-1))
            # the next level's values fill the interval around this one's
            place = (place - digits) * values - offset
        return torch.stack(codes, -1)

    @property
    def codebooks(self) -> torch.Tensor:
        """The grid's vectors [levels, codes, len(fsq_levels)]."""
        values, half_width, offset, basis = self._grid()
        digits = torch.arange(self.codebook_size, device=values.device)[:, None] // basis % values - half_width
        level = torch.arange(self.num_quantizers, device=values.device)[:, None, None]
        return (digits + offset * (level > 0)) / values.float() ** level / half_width

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As [`ResidualVectorQuantizer`], with a loss of zero."""
        bounded = self._bound(z) / self._grid()[1]
        codes = self.encode(z)
        return bounded + (sum_of_codes(self.codebooks, codes) - bounded).detach(), codes, z.new_zeros(())

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        # loading keeps the quantiser in float32, its integers included
        values = self.values.long()
        return values, values // 2, (values % 2 == 0) * 0.5, values.cumprod(0) // values

    def _bound(self, z: torch.Tensor) -> torch.Tensor:
        """z so that rounding gives as many values as there are (the authors' `bound`)."""
        values, _, offset, _ = self._grid()
        half = (values - 1) * (1 - 1e-3) / 2
        return (z + (offset / half).tan()).tanh() * half - offset


class MatrixLogarithm(torch.autograd.Function):
    """
    Logarithm of symmetric positive definite matrices [..., n, n]. Equal eigenvalues have a gradient too, which that of
    `torch.linalg.eigh` has not (Daleckii and Krein).
    """

    @staticmethod
    def forward(ctx, matrices: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrices)
        values = values.clamp(min=1e-6)
        ctx.save_for_backward(values, vectors)
        return (vectors * values.log()[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        values, vectors = ctx.saved_tensors
        below = values[..., None, :]
        ratio = values[..., :, None] / below
        # (log a - log b) / (a - b), which is 1 / b at a = b
        close = (ratio - 1).abs() < 1e-3
        slopes = torch.where(close, 1 / ratio.sqrt(), ratio.log() / (ratio - 1).where(~close, 1)) / below
        return vectors @ (slopes * (vectors.mT @ gradient @ vectors)) @ vectors.mT


def triangle(matrices: torch.Tensor) -> torch.Tensor:
    """
    Lower triangles [..., n * (n + 1) / 2] of symmetric matrices [..., n, n], the diagonal divided by sqrt(2): a value
    off the diagonal stands twice in a matrix.
    """
    row, column = torch.tril_indices(*matrices.shape[-2:], device=matrices.device)
    return matrices[..., row, column] * torch.where(row == column, 0.5**0.5, 1.0)


class FmriCodecSummary(nn.Module):
    """
    What the regions of a scan do together, from its decoded basis coefficients: their covariance, with what ROIs leave
    undetermined of it, in the tangent space at the training scans' mean, as nilearn's
    `ConnectivityMeasure(kind="tangent", vectorize=True)` has it (lower triangle, its diagonal divided by sqrt(2)); the
    coefficients' lag-1 autocorrelation; and covariance and lag-1 autocorrelation of networks' mean series, which mean
    connectivity between networks is linear in.
    """

    whitening: torch.Tensor
    network_basis: torch.Tensor
    posterior_covariance: torch.Tensor
    shrinkage: torch.Tensor
    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        size = config.num_basis_functions
        # the inverse square root of the mean covariance
        self.register_buffer("whitening", torch.eye(size))
        # of each network, the mean of its ROIs' basis functions: the mean series is this times the coefficients
        self.register_buffer("network_basis", torch.zeros(config.num_networks, size))
        # Of the coefficients given a frame in training scans' ROIs, added to what is decoded. The logarithm then
        # measures what ROIs say little about by that uncertainty, and not by the small variance that is left of it.
        self.register_buffer("posterior_covariance", torch.zeros(size, size))
        # weight of the mean in a covariance: the logarithm of one from few frames is finite
        self.register_buffer("shrinkage", torch.tensor(0.3))
        # of all scan features, those of the codes of the scan as a whole included
        self.register_buffer("feature_mean", torch.zeros(config.num_scan_features))
        self.register_buffer("feature_std", torch.ones(config.num_scan_features))

    def init_weights(self) -> None:
        init.copy_(self.whitening, torch.eye(len(self.whitening)))
        init.zeros_(self.network_basis)
        init.zeros_(self.posterior_covariance)
        init.constant_(self.shrinkage, 0.3)
        init.zeros_(self.feature_mean)
        init.ones_(self.feature_std)

    @staticmethod
    def centred(series: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Series [batch, n, time] without their mean over frames with data (bool, of that shape), zero elsewhere."""
        mask = mask.to(series.dtype)
        return (series - (series * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) * mask

    def covariance(self, series: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """[batch, n, n] of series [batch, n, time]; frame_mask bool [batch, time]: frames with data."""
        series = self.centred(series, frame_mask[:, None])
        return series @ series.mT / frame_mask.sum(-1).clamp(min=1)[:, None, None]

    def tangent(self, covariance: torch.Tensor) -> torch.Tensor:
        """[batch, n * (n + 1) / 2] of covariances [batch, n, n]."""
        identity = torch.eye(len(self.whitening), device=covariance.device, dtype=covariance.dtype)
        whitened = self.whitening @ (covariance + self.posterior_covariance) @ self.whitening
        matrices: torch.Tensor = MatrixLogarithm.apply((1 - self.shrinkage) * whitened + self.shrinkage * identity)  # pyright: ignore[reportAssignmentType]
        return triangle(matrices)

    def autocorrelation(self, series: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Lag-1 autocorrelation [batch, n] of series [batch, n, time]; 0 of what is decoded to a constant."""
        series = self.centred(series, frame_mask[:, None])
        return (series[..., 1:] * series[..., :-1]).sum(-1) / series.pow(2).sum(-1).clamp(min=1e-6)

    def forward(self, series: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Scan features [batch, sum(scan_feature_blocks)] of coefficients [batch, n, time]."""
        covariance = self.covariance(series, frame_mask)
        between = self.network_basis @ covariance @ self.network_basis.T
        row, column = torch.tril_indices(len(between[0]), len(between[0]), device=series.device)
        parts = (
            self.tangent(covariance),
            self.autocorrelation(series, frame_mask),
            between[:, row, column],
            self.autocorrelation(self.network_basis @ series, frame_mask),
        )
        return torch.cat(parts, dim=-1)

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Scan features [batch, features] in standard deviations of training scans, scaled to squares of sum 1."""
        return (features - self.feature_mean) / (self.feature_std * math.sqrt(features.shape[-1]))


class FmriScanQuantizer(nn.Module):
    """
    Codes of a scan as a whole, beside those of its patches (as Spark-TTS has global tokens beside those of frames,
    Wang et al. 2025): the correlations between the ROIs of one atlas in tangent space, along principal components of
    training scans, by finite scalar quantisation. They hold what smooth functions of coordinates do not tell apart, in
    a few hundred bits a scan. A ROI that a scan lacks is what the others predict; a scan that has less than half of
    the ROIs has no such codes.
    """

    coordinates: torch.Tensor
    mean: torch.Tensor
    whitening: torch.Tensor
    components: torch.Tensor
    offset: torch.Tensor

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        rois, numbers = config.num_scan_rois, config.num_scan_numbers
        self.levels = config.num_scan_levels
        # far from any scan until they are fitted
        self.register_buffer("coordinates", torch.full((rois, 3), math.inf))
        # of training scans' shrunk correlations, and its inverse square root
        self.register_buffer("mean", torch.eye(rois))
        self.register_buffer("whitening", torch.eye(rois))
        # numbers are components @ tangent vector - offset
        self.register_buffer("components", torch.zeros(numbers, rois * (rois + 1) // 2))
        self.register_buffer("offset", torch.zeros(numbers))
        self.quantizer = ResidualFiniteScalarQuantizer(SCAN_CODE_VALUES, 1)

    def init_weights(self) -> None:
        init.constant_(self.coordinates, math.inf)
        init.copy_(self.mean, torch.eye(len(self.mean)))
        init.copy_(self.whitening, torch.eye(len(self.mean)))
        init.zeros_(self.components)
        init.zeros_(self.offset)

    def correlations(
        self, values: torch.Tensor, coordinates: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Shrunk correlations [batch, num_scan_rois, num_scan_rois] of scans (arguments as in `FmriCodecModel.encode`),
        zero of ROIs that they lack; and which ones they have, bool [batch, num_scan_rois].
        """
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        distance = (self.coordinates[:, None] - coordinates.float()[:, None]).norm(dim=-1)
        nearest, index = distance.masked_fill(~mask.any(-1)[:, None], math.inf).min(-1)
        index = index[..., None].expand(-1, -1, values.shape[-1])
        known = mask.gather(1, index) & (nearest <= SAME_ROI)[..., None]
        # masked values may be NaN
        series = values.float().masked_fill(~mask, 0).gather(1, index) * known
        size = series.norm(dim=-1)
        series = FmriCodecSummary.centred(series, known)
        norm = series.norm(dim=-1, keepdim=True)
        series = series / norm.clamp(min=1e-6)
        identity = torch.eye(len(self.mean), device=values.device)
        matrices = (1 - CORRELATION_SHRINKAGE) * series @ series.mT + CORRELATION_SHRINKAGE * identity
        # the rounding of the mean of a series that stays the same is no correlation
        there = norm[..., 0] > 1e-5 * size
        return matrices * (there[:, None] & there[..., None]), there

    def completed(self, correlations: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`correlations` with what the regression on the other ROIs gives for those that a scan lacks."""
        has = there.float()
        lacks = 1 - has
        known = self.mean * has[..., None] * has[:, None] + torch.diag_embed(lacks)
        # [batch, ROIs that are there, ROIs that are not], zero elsewhere
        slopes = torch.linalg.solve(known, self.mean * has[..., None] * lacks[:, None])
        whole = torch.diag_embed(has) + slopes.mT
        left_over = (self.mean - slopes.mT @ self.mean) * lacks[..., None] * lacks[:, None]
        return whole @ correlations @ whole.mT + left_over

    def tangent(self, correlations: torch.Tensor) -> torch.Tensor:
        """[batch, num_scan_rois * (num_scan_rois + 1) / 2] of completed correlations."""
        whitened = self.whitening @ correlations @ self.whitening
        logarithms: torch.Tensor = MatrixLogarithm.apply(whitened)  # pyright: ignore[reportAssignmentType]
        return triangle(logarithms)

    def encode(self, values: torch.Tensor, coordinates: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Codes int64 [batch, tokens_per_patch, num_scan_levels], -1 of scans of other ROIs."""
        correlations, there = self.correlations(values, coordinates, mask)
        numbers = self.tangent(self.completed(correlations, there)) @ self.components.T - self.offset
        codes = self.quantizer.encode(numbers.unflatten(-1, (-1, len(SCAN_CODE_VALUES))))[..., 0]
        codes = codes.masked_fill(there.float().mean(-1, keepdim=True) < 0.5, -1)
        return codes.unflatten(-1, (-1, self.levels))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Numbers [batch, num_scan_numbers] of codes [batch, patches, tokens_per_patch, num_scan_levels], the mean over
        patches that have them; zero, as of the average scan, where none has.
        """
        known = (codes >= 0).float()[..., None]
        numbers = self.quantizer.codebooks[0][codes.clamp(min=0)] * known
        return (numbers.sum(1) / known.sum(1).clamp(min=1)).flatten(1)


def siglip_loss(
    scans: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor | float, bias: torch.Tensor | float, first: int = 0
) -> torch.Tensor:
    """
    Sigmoid loss (Zhai et al. 2023) of unit vectors scans [batch, dim] and texts [all texts, dim], the matching ones
    of which begin at row `first`: summed over texts, mean over scans.
    """
    logits = scale * scans @ texts.T + bias
    matches = torch.arange(len(scans), device=scans.device)[:, None] + first
    matches = matches == torch.arange(len(texts), device=scans.device)
    return -F.logsigmoid(torch.where(matches, logits, -logits)).sum() / len(scans)


class FmriCodecAlignment(nn.Module):
    """
    A loss against a frozen language model, for training alone: scans are paired with the embeddings of their
    descriptions.
    """

    text_mean: torch.Tensor
    text_std: torch.Tensor

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        if config.text_hidden_size is None:
            raise ValueError("expected text_hidden_size, the width of what the codec is aligned to, got None")
        self.scan_proj = nn.Linear(config.num_scan_features, config.alignment_size, bias=False)
        self.text_proj = nn.Linear(config.text_hidden_size, config.alignment_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        # sentences of one language model all point almost the same way: their mean is taken off
        self.register_buffer("text_mean", torch.zeros(config.text_hidden_size))
        self.register_buffer("text_std", torch.ones(config.text_hidden_size))

    def init_weights(self) -> None:
        init.constant_(self.log_scale, math.log(INITIAL_SCALE))
        init.constant_(self.bias, INITIAL_BIAS)
        init.zeros_(self.text_mean)
        init.ones_(self.text_std)

    @torch.no_grad()
    def fit_texts(self, text_embeddings: torch.Tensor) -> None:
        """Standardises texts by the embeddings [texts, text_hidden_size] of the training scans' descriptions."""
        self.text_mean.copy_(text_embeddings.mean(0))
        self.text_std.copy_(text_embeddings.std(0).clamp(min=1e-6))

    def embed_scans(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, alignment_size] of standardised scan features [batch, features]."""
        return F.normalize(self.scan_proj(features), dim=-1)

    def embed_texts(self, text_embeddings: torch.Tensor) -> torch.Tensor:
        """Unit vectors [texts, alignment_size] of frozen embeddings [texts, text_hidden_size]."""
        return F.normalize(self.text_proj((text_embeddings.float() - self.text_mean) / self.text_std), dim=-1)

    def siglip(self, scan_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
        """
        Loss of this rank's scans [batch, alignment_size] against the descriptions of all ranks. Their frozen
        embeddings are what travels: the mean over ranks is the loss of one process on all scans, and so is its
        gradient.
        """
        gathered, first = gather_rows(text_embeddings)
        return siglip_loss(scan_embeddings, self.embed_texts(gathered), self.log_scale.exp(), self.bias, first)


@dataclass
class FmriCodecOutput(ModelOutput):
    """
    loss: weighted sum of the parts below. reconstruction: [batch, rois, time]. codes: int64 [batch, tokens, levels],
    as `encode` gives them. descriptors: [batch, descriptors], in the units the head was fitted to. scan_embeddings:
    [batch, alignment_size], unit vectors to compare with the alignment head's embeddings of texts. codebook_usage:
    share of each patch level's codebook that occurs in this batch [num_quantizers]; perplexity: exp of the entropy of
    its codes. hidden_states: on request, input and outputs of the encoder's layers, [batch, tokens, hidden] each.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    descriptor_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    descriptors: torch.Tensor | None = None
    scan_embeddings: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class FmriCodecPreTrainedModel(KeptInFloat32, PreTrainedModel):
    config: FmriCodecConfig
    base_model_prefix = "codec"
    main_input_name = "fmri_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FmriCodecLayer"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": OutputRecorder(FmriCodecLayer, layer_name="patch_encoder.layers")}
    # in half precision codes would differ and moving averages would stop moving
    _keep_in_fp32_modules_strict = [
        "spatial_basis",
        "analysis",
        "patch_encoder",
        "quantizer",
        "synthesis",
        "patch_decoder",
        "tangent_summary",
        "scan_quantizer",
        "descriptor_head",
        "alignment_head",
    ]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """What a language model has beside these two, its codec has no need of: it is small, and stays in float32."""
        if requested_attention not in (None, "eager", "sdpa"):
            requested_attention = "sdpa"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(
            module,
            FmriSpatialBasis | ResidualVectorQuantizer | FmriCodecSummary | FmriScanQuantizer | FmriCodecAlignment,
        ):
            module.init_weights()
        elif isinstance(module, FmriCodecTransformer):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, ResidualFiniteScalarQuantizer):
            init.copy_(module.values, torch.tensor(module.fsq_levels))


class FmriCodecModel(FmriCodecPreTrainedModel):
    """
    Cuts a scan into patches of `patch_length` frames and writes each as `tokens_per_patch` latent tokens of
    `num_quantizers` codes. A patch's signal becomes coefficients of spatial basis functions, a linear map makes token
    vectors of them, residual quantisation makes codes; decoding is the way back. Transformers may add to both linear
    maps. Tokens are time-major: index = patch * tokens_per_patch + token of the patch. A code depends on its own and
    earlier patches alone, so that predicting the next one is not looking it up; but for `num_scan_levels` further
    levels, whose codes are of the scan as a whole and the same in every patch. Everything is computed in float32.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__(config)
        coefficients = config.num_basis_functions * config.patch_length
        vectors = config.tokens_per_patch * config.codebook_dim
        self.spatial_basis = FmriSpatialBasis(config)
        self.analysis = nn.Linear(coefficients, vectors)
        self.patch_encoder = self.patch_decoder = None
        if config.num_hidden_layers:
            self.patch_encoder = FmriCodecTransformer(config, config.num_hidden_layers, config.codebook_dim, False)
        self.quantizer = (
            ResidualFiniteScalarQuantizer(config.fsq_levels, config.num_quantizers)
            if config.fsq_levels
            else ResidualVectorQuantizer(config)
        )
        self.synthesis = nn.Linear(vectors, coefficients)
        if config.num_decoder_layers:
            self.patch_decoder = FmriCodecTransformer(config, config.num_decoder_layers, coefficients, True)
        self.tangent_summary = FmriCodecSummary(config)
        self.scan_quantizer = FmriScanQuantizer(config) if config.num_scan_levels else None
        self.descriptor_head = (
            nn.Linear(config.num_scan_features, len(config.descriptor_names)) if config.descriptor_names else None
        )
        self.alignment_head = FmriCodecAlignment(config) if config.text_hidden_size else None
        self.post_init()
        if self.dtype != torch.float32:
            self.float()

    def encode(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor | None,
        fmri_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Codes int64 [batch, tokens, num_quantizers + num_scan_levels] of fmri_values [batch, rois, time] (robust
        z-scores) at roi_coordinates [batch, rois, 3] (MNI mm); -1 on patches without any data by fmri_mask bool
        [batch, rois, time] (False is padding, or a ROI that is missing).
        """
        with maybe_autocast(fmri_values.device.type, enabled=False):
            vectors, token_mask = self._vectors(fmri_values, roi_coordinates, fmri_mask)
            codes = self.quantizer.encode(vectors)
            return self._with_scan_codes(codes, token_mask, fmri_values, roi_coordinates, fmri_mask)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Vectors float32 [..., codebook_dim] of codes [..., levels], of all levels or the first ones; zero on padding.
        """
        own = self.config.num_quantizers
        if codes.shape[-1] not in (*range(1, own + 1), own + self.config.num_scan_levels):
            further = f" or {own + self.config.num_scan_levels}" if self.config.num_scan_levels else ""
            raise ValueError(f"expected codes of 1 to {own}{further} levels, got {codes.shape[-1]}")
        return sum_of_codes(self.quantizer.codebooks, codes[..., :own].clamp(min=0)) * (codes[..., :1] >= 0)

    def codebooks(self) -> torch.Tensor:
        """Vectors float32 [levels, codes, codebook_dim] of all codes."""
        return self.quantizer.codebooks

    def decode(self, codes: torch.Tensor, roi_coordinates: torch.Tensor) -> torch.Tensor:
        """Signal [batch, rois, time] of codes [batch, tokens, levels] at any coordinates [batch, rois, 3] (MNI mm)."""
        with maybe_autocast(codes.device.type, enabled=False):
            return self.spatial_basis(roi_coordinates) @ self.decode_coefficients(codes)

    def decode_coefficients(self, codes: torch.Tensor) -> torch.Tensor:
        """Coefficients [batch, basis functions, time] of codes [batch, tokens, levels]; zero on padding."""
        return self._coefficients(self.embed_codes(codes), codes[..., 0] >= 0)

    def summarize(self, codes: torch.Tensor) -> torch.Tensor:
        """
        What the regions of scans do together, float32 [batch, K * (K + 1) / 2] of codes [batch, tokens, levels]:
        covariance of the K basis coefficients in tangent space (see [`FmriCodecSummary`]).
        """
        return self.scan_features(codes)[:, : self.config.num_summary_features]

    def scan_features(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Float32 [batch, num_scan_features] of codes, `summarize` and what else [`FmriCodecSummary`] says, then the
        numbers of the scan's own codes (see [`FmriScanQuantizer`]).
        """
        return self._features(self.decode_coefficients(codes), codes)

    def describe(self, codes: torch.Tensor) -> torch.Tensor:
        """Standardised descriptors float32 [batch, descriptors] of codes [batch, tokens, levels]."""
        if self.descriptor_head is None:
            raise ValueError("expected a codec with descriptor_names, got one without")
        with maybe_autocast(codes.device.type, enabled=False):
            return self.descriptor_head(self.tangent_summary.standardise(self.scan_features(codes)))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
        descriptors: torch.Tensor | None = None,
        text_embeddings: torch.Tensor | None = None,
        **kwargs,
    ) -> FmriCodecOutput:
        """
        Args:
            descriptors: standardised targets [batch, descriptors] of the descriptor head, NaN where unknown.
            text_embeddings: frozen embeddings [batch, text_hidden_size] of the scans' descriptions.
        """
        with maybe_autocast(fmri_values.device.type, enabled=False):
            vectors, token_mask = self._vectors(fmri_values, roi_coordinates, fmri_mask)
            vectors, codes, commitment_loss = self.quantizer(vectors, token_mask)
            all_codes = self._with_scan_codes(codes, token_mask, fmri_values, roi_coordinates, fmri_mask)
            coefficients = self._coefficients(vectors, token_mask)
            reconstruction = (self.spatial_basis(roi_coordinates) @ coefficients)[..., : fmri_values.shape[-1]]
            error = reconstruction - fmri_values
            reconstruction_loss = (error if fmri_mask is None else error[fmri_mask]).pow(2).mean()
            loss = reconstruction_loss + self.config.commitment_weight * commitment_loss
            described = descriptor_loss = alignment_loss = scan_embeddings = None
            if self.descriptor_head is not None or self.alignment_head is not None:
                features = self.tangent_summary.standardise(self._features(coefficients, all_codes))
            if self.descriptor_head is not None:
                described = self.descriptor_head(features)
                if descriptors is not None:
                    known = ~descriptors.isnan()
                    # a batch may know none of them
                    descriptor_loss = (described - descriptors)[known].pow(2).sum() / known.sum().clamp(min=1)
                    loss = loss + self.config.descriptor_weight * descriptor_loss
            if self.alignment_head is not None:
                scan_embeddings = self.alignment_head.embed_scans(features)
                if text_embeddings is not None:
                    alignment_loss = self.alignment_head.siglip(scan_embeddings, text_embeddings)
                    loss = loss + self.config.alignment_weight * alignment_loss
            levels, size = self.config.num_quantizers, self.config.codebook_size
            rows = codes[token_mask] + size * torch.arange(levels, device=codes.device)
            counts = torch.bincount(rows.flatten(), minlength=levels * size).float().unflatten(0, (levels, size))
            entropy = torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1)
        return FmriCodecOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            commitment_loss=commitment_loss,
            descriptor_loss=descriptor_loss,
            alignment_loss=alignment_loss,
            reconstruction=reconstruction,
            codes=all_codes,
            descriptors=described,
            scan_embeddings=scan_embeddings,
            codebook_usage=(counts > 0).float().mean(-1),
            perplexity=entropy.exp(),
        )

    def _vectors(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor | None, fmri_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is quantised, [batch, tokens, codebook_dim], and the tokens that hold data, bool [batch, tokens]."""
        batch, rois, time = fmri_values.shape
        expected = (batch, rois, 3)
        if roi_coordinates is None or roi_coordinates.shape != expected:
            got = None if roi_coordinates is None else tuple(roi_coordinates.shape)
            raise ValueError(f"expected roi_coordinates of shape {expected}, got {got}")
        if fmri_mask is not None:
            if fmri_mask.shape != fmri_values.shape:
                raise ValueError(f"expected fmri_mask of shape {(batch, rois, time)}, got {tuple(fmri_mask.shape)}")
            # a question about values would cut a compiled graph in two
            if not torch.compiler.is_compiling() and not fmri_mask.flatten(1).any(-1).all():
                raise ValueError("expected data in every scan of the batch, got a scan whose fmri_mask is all False")
        patches = math.ceil(time / self.config.patch_length)
        if patches > self.config.max_patches:
            raise ValueError(f"expected at most max_patches={self.config.max_patches} patches, got {patches}")
        padding = (0, patches * self.config.patch_length - time)
        roi_mask = None
        patch_mask = torch.ones(batch, patches, dtype=torch.bool, device=fmri_values.device)
        if fmri_mask is not None:
            fmri_values = fmri_values.masked_fill(~fmri_mask, 0)
            roi_mask = F.pad(fmri_mask, padding).unflatten(-1, (patches, -1)).any(-1).transpose(1, 2)
            patch_mask = roi_mask.any(-1)
        values = F.pad(fmri_values.float(), padding).unflatten(-1, (patches, -1)).transpose(1, 2)
        coefficients = self.spatial_basis.coefficients(self.spatial_basis(roi_coordinates), values, roi_mask)
        tokens = self.config.tokens_per_patch
        vectors = self.analysis(coefficients.flatten(2)).unflatten(-1, (tokens, -1))
        if self.patch_encoder is not None:
            vectors = vectors + self.patch_encoder(vectors, patch_mask)
        return vectors.flatten(1, 2), patch_mask.repeat_interleave(tokens, dim=1)

    def _coefficients(self, vectors: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """As `decode_coefficients`, of vectors [batch, tokens, codebook_dim], which may lie between the codes'."""
        tokens, frames = self.config.tokens_per_patch, self.config.patch_length
        if vectors.shape[1] % tokens:
            raise ValueError(f"expected codes of whole patches of {tokens} tokens, got {vectors.shape[1]} tokens")
        with maybe_autocast(vectors.device.type, enabled=False):
            vectors, patch_mask = vectors.unflatten(1, (-1, tokens)), token_mask[:, ::tokens]
            coefficients = self.synthesis(vectors.flatten(2))
            if self.patch_decoder is not None:
                coefficients = coefficients + self.patch_decoder(vectors, patch_mask)
            coefficients = coefficients * patch_mask[..., None]
            return coefficients.unflatten(-1, (-1, frames)).transpose(1, 2).flatten(-2)

    def _with_scan_codes(
        self,
        codes: torch.Tensor,
        token_mask: torch.Tensor,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor | None,
        fmri_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Codes of patches with those of the scan as a whole behind them, -1 on padding."""
        if self.scan_quantizer is not None and roi_coordinates is not None:
            own = self.scan_quantizer.encode(fmri_values, roi_coordinates, fmri_mask)
            codes = torch.cat([codes, own.repeat(1, codes.shape[1] // own.shape[1], 1)], -1)
        return codes.masked_fill(~token_mask[..., None], -1)

    def _features(self, coefficients: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """As `scan_features`, of coefficients [batch, basis functions, time] that codes decode to."""
        tokens = self.config.tokens_per_patch
        frame_mask = (codes[:, ::tokens, 0] >= 0).repeat_interleave(self.config.patch_length, dim=1)
        with maybe_autocast(coefficients.device.type, enabled=False):
            features = self.tangent_summary(coefficients, frame_mask)
            if self.scan_quantizer is None:
                return features
            own = codes.unflatten(1, (-1, tokens))[..., self.config.num_quantizers :]
            if not own.shape[-1]:
                return F.pad(features, (0, self.config.num_scan_numbers))
            return torch.cat([features, self.scan_quantizer.decode(own)], -1)


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriCodecModel.register_for_auto_class("AutoModel")

__all__ = ["FmriCodecModel", "FmriCodecOutput", "FmriCodecPreTrainedModel"]
