"""
The codec's fit: every part of it in closed form or by k-means, in two passes over the training scans. Memory holds
one scan, a fixed number of patches and a covariance for each of a fixed number of windows.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from fmrilm.modeling_fmricodec import (
    FmriCodecModel,
    FmriScanQuantizer,
    FmriSpatialBasis,
    ResidualVectorQuantizer,
    sum_of_codes,
)
from fmrilm.processors.descriptors.networks import membership

from ..ridge import cross_fitted_ridge


if TYPE_CHECKING:
    from ..data.dataset import Scans


# of the spatial basis: scans of an update, frames of a scan, how far ROIs are moved (mm), learning rate
SCANS, FRAMES, JITTER, RATE = 6, 160, 2.0, 1e-2
# patches that the codebooks and the way back are fitted to, and token vectors of them for k-means
PATCHES, VECTORS = 8000, 60000
# numbers of a token that are shared out together
PART = 8
# standard deviation of a number at which "fsq" makes even use of its values
FSQ_STD = 0.75
# windows that the summary and codes of whole scans are fitted to; iterations for the summary's mean, and variance
# added in shares of the mean
WINDOWS, ITERATIONS, FLOOR = 1000, 30, 1e-3
# of the windows, one in so many tells how wide a component is where it was not fitted
PARTS = 5


def fit_codec(model: FmriCodecModel, scans: "Scans", steps: int = 400, seed: int = 0) -> float:
    """
    Makes a transform coder of an untrained codec: the spatial basis by maximum likelihood in `steps` updates;
    principal components of its coefficients at each frequency of a cosine transform over a patch's frames, shared out
    so that every token holds as much; residual k-means; the best linear way back; and the summary's mean. The
    transformers, if there are any, start from adding nothing to it.

    Returns:
        Share of the variance on the spatial basis that the codes keep.
    """
    if not len(scans):
        raise ValueError("expected training scans to fit the codec to, got none")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    training = model.training
    model.eval()
    fit_spatial_basis(model.spatial_basis, scans, steps, rng)
    kept = fit_transform(model, scans, rng)
    if model.scan_quantizer is not None:
        fit_scan_quantizer(model.scan_quantizer, scans, model.config.patch_length, rng)
    fit_summary(model, scans, rng)
    model.train(training)
    return kept


@torch.enable_grad()
def fit_spatial_basis(basis: FmriSpatialBasis, scans: "Scans", steps: int, rng: np.random.Generator) -> None:
    """Maximum likelihood of random windows, at coordinates that are moved a little, from random weights."""
    for parameter in basis.parameters():
        # whatever parts of the codec took random numbers before
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(basis.parameters(), lr=RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 4, steps)
    for _ in tqdm(range(steps), desc="spatial basis", unit="step", disable=None):
        losses = []
        for index in rng.integers(len(scans), size=SCANS):
            signal, coordinates = present(scans, index)
            start = rng.integers(max(1, len(signal) - FRAMES + 1))
            moved = coordinates + torch.from_numpy(rng.normal(0, JITTER, coordinates.shape)).float()
            losses.append(basis.negative_log_likelihood(signal[start : start + FRAMES].T.cov(), moved))
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def fit_transform(model: FmriCodecModel, scans: "Scans", rng: np.random.Generator) -> float:
    """The linear maps and the quantiser, as [`fit_codec`] says."""
    config, quantizer, basis = model.config, model.quantizer, model.spatial_basis
    frames, size, dim = config.patch_length, config.num_basis_functions, config.codebook_dim
    cosines = torch.from_numpy(dct(np.eye(frames), norm="ortho", axis=0)).float()
    each = -(-PATCHES // len(scans))
    gram, covariance, sample = torch.zeros(size, size), torch.zeros(frames, size, size), []
    count = 0
    for index in tqdm(rng.permutation(len(scans)), desc="patches", unit="scan", disable=None):
        signal, coordinates = present(scans, index)
        functions = basis(coordinates)
        coefficients = basis.coefficients(functions[None], signal.T[None, None], None)[0, 0]
        if coefficients.shape[1] < frames:
            raise ValueError(f"expected scans of at least {frames} frames, got {coefficients.shape[1]}")
        patches = coefficients.unfold(1, frames, max(1, frames // 4)).transpose(0, 1)
        spectrum = torch.einsum("ft,nkt->fnk", cosines, patches)
        gram += functions.T @ functions
        covariance += spectrum.mT @ spectrum
        count += len(patches)
        sample.append(patches[torch.from_numpy(rng.permutation(len(patches))[:each])])
    patches = torch.cat(sample)
    gram, covariance = gram / len(scans), covariance / count
    # there may be fewer ROIs than functions
    gram = gram + 1e-3 * gram.trace() / size * torch.eye(size)
    # A posterior mean is smaller than what least squares give. Here that is undone, and functions are made orthonormal
    # over ROIs: a squared difference of coefficients is then one of signals.
    root = torch.linalg.cholesky(gram)
    forward = root.T @ torch.linalg.solve(gram, gram + torch.eye(size))
    variances, components = torch.linalg.eigh(forward @ covariance @ forward.T)
    # of numbers by frequency and component: [frames * size, size] maps from and to coefficients
    there = (components.mT @ forward).flatten(0, 1)
    back = torch.linalg.solve(root.T, components).mT.flatten(0, 1)
    tokens = config.tokens_per_patch
    if len(variances.flatten()) < tokens * dim:
        raise ValueError(
            f"expected at most {len(variances.flatten())} dimensions of all tokens, as many as a patch has "
            f"coefficients, got tokens_per_patch={tokens} of codebook_dim={dim}"
        )
    # In small parts, of which tokens take turns: at one place, where a level has one codebook for all of them, tokens
    # hold numbers of like variances, and the largest variances are in the first group, which is coded first.
    width = math.gcd(dim // config.codebook_groups, PART)
    chosen = shared_out(variances.flatten().clamp(min=0).numpy(), tokens * dim // width, width)
    chosen = chosen.reshape(-1, tokens, width).transpose(1, 0, 2).reshape(tokens, dim)
    frequency = torch.from_numpy(chosen // size)
    analysis = torch.einsum("nwt,nwk->nwkt", cosines[frequency], there[chosen])
    values = torch.einsum("nwkt,pkt->pnw", analysis, patches)

    scale = torch.ones(tokens, dim)
    if not isinstance(quantizer, ResidualVectorQuantizer):
        scale = FSQ_STD / values.std(0).clamp(min=1e-6)
    model.analysis.weight.copy_((analysis * scale[..., None, None]).flatten(2).flatten(0, 1))
    model.analysis.bias.zero_()
    vectors = values * scale
    if isinstance(quantizer, ResidualVectorQuantizer):
        flat = vectors.flatten(0, 1)
        # each process fits to the same vectors, before any of them has a device
        quantizer.start(flat[torch.randperm(len(flat))[:VECTORS]], together=False)
    decoded = sum_of_codes(quantizer.codebooks, quantizer.encode(vectors))
    weights = least_squares(decoded.transpose(0, 1), values.transpose(0, 1))
    synthesis = torch.einsum("nwt,nwk->nwkt", cosines[frequency], back[chosen])
    model.synthesis.weight.copy_(torch.einsum("nvw,nwkt->ktnv", weights, synthesis).flatten(0, 1).flatten(1))
    model.synthesis.bias.zero_()
    lost = (torch.einsum("pnv,nvw->pnw", decoded, weights) - values).pow(2).sum(0)
    return float((values.pow(2).sum(0) - lost).sum() / len(patches) / variances.sum())


@torch.no_grad()
def fit_scan_quantizer(
    quantizer: FmriScanQuantizer, scans: "Scans", patch_length: int, rng: np.random.Generator
) -> None:
    """
    Codes of scans as a whole, from windows of the atlas that most scans have: mean correlations, and the principal
    components in the tangent space there, each as wide as it is in windows that components were not fitted to.
    """
    name = scans.main_atlas
    own = scans.select(np.flatnonzero(scans.table["atlas"] == name))
    quantizer.coordinates.copy_(torch.tensor(scans.atlases[name].coordinates, dtype=torch.float32))
    found = [quantizer.correlations(*window, None) for window in windows_of(own, patch_length, rng)]
    correlations, there = (torch.cat(part) for part in zip(*found, strict=True))
    together = (there[:, None] & there[..., None]).sum(0)
    # a ROI that no scan has is taken for one that correlates with none
    mean = correlations.sum(0) / together.clamp(min=1) + (together.diagonal() == 0).float().diag()
    # pairs that different scans have make no whole
    mean = of_eigenvalues(mean.double(), lambda values: values.clamp(min=FLOOR))
    quantizer.mean.copy_(mean)
    quantizer.whitening.copy_(of_eigenvalues(mean, lambda values: values**-0.5))
    if len(correlations) < PARTS:
        raise ValueError(f"expected at least {PARTS} windows for codes of whole scans, got {len(correlations)}")
    parts = zip(correlations.split(SCANS), there.split(SCANS), strict=True)
    tangent = torch.cat([quantizer.tangent(quantizer.completed(*part)) for part in parts])
    fifth = torch.from_numpy(rng.permutation(len(tangent))) % PARTS == 0
    components = principal_components(tangent[~fifth], len(quantizer.components))
    width = ((tangent[fifth] - tangent[~fifth].mean(0)) @ components.T).std(0)
    components = principal_components(tangent, len(quantizer.components))
    width = width.nan_to_num(1)
    # components that there are with all windows alone have no known width, and no code
    components = components * torch.where(width > 1e-6, FSQ_STD / width, 0)[:, None]
    quantizer.components.copy_(components)
    quantizer.offset.copy_(components @ tangent.mean(0))


def principal_components(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Unit vectors [count, features] of rows [n, features], the largest variance first; zero where there are none."""
    rows = rows - rows.mean(0)
    variances, vectors = torch.linalg.eigh((rows @ rows.T).double())
    kept = variances.flip(0)[:count] > 1e-9 * variances.max()
    components = F.normalize(vectors.flip(1)[:, :count].T[kept].float() @ rows, dim=-1)
    return F.pad(components, (0, 0, 0, count - len(components)))


@torch.no_grad()
def fit_summary(model: FmriCodecModel, scans: "Scans", rng: np.random.Generator) -> None:
    """
    The summary's posterior covariance, the mean over windows; its training mean: the geometric mean of the windows'
    covariances, each shrunk towards it, so that the mean summary is zero; the networks of the scans' atlases; and the
    standardisation of the scan features.
    """
    summary, codes = model.tangent_summary, []
    summary.network_basis.copy_(network_basis(model.spatial_basis, scans))
    covariances, posterior = [], torch.zeros(summary.posterior_covariance.shape, dtype=torch.float64)
    for values, coordinates in windows_of(scans, model.config.patch_length, rng):
        codes.append(model.encode(values, coordinates))
        posterior += model.spatial_basis.posterior_covariance(values[0].cov(), coordinates[0])
        series = model.decode_coefficients(codes[-1])
        covariances.append(summary.covariance(series, torch.ones(1, series.shape[-1], dtype=torch.bool))[0])
    covariance = torch.stack(covariances).double()
    identity = torch.eye(covariance.shape[1], dtype=torch.float64)
    # some coefficients may always be decoded to zero, of scans without noise
    floor = FLOOR * covariance.diagonal(dim1=1, dim2=2).mean()
    posterior = posterior / len(covariance) + floor * identity
    covariance = covariance + posterior
    shrinkage = float(summary.shrinkage)
    mean = covariance.mean(0)
    for _ in range(ITERATIONS):
        whitening = of_eigenvalues(mean, lambda values: values**-0.5)
        shrunk = (1 - shrinkage) * (whitening @ covariance @ whitening) + shrinkage * identity
        tangent = of_eigenvalues(shrunk, torch.log).mean(0)
        if tangent.norm() < 1e-6 * len(identity):
            break
        root = of_eigenvalues(mean, torch.sqrt)
        mean = root @ of_eigenvalues(tangent / (1 - shrinkage), torch.exp) @ root
    summary.posterior_covariance.copy_(posterior)
    summary.whitening.copy_(of_eigenvalues(mean, lambda values: values**-0.5))
    features = torch.cat([model.scan_features(row) for row in codes])
    summary.feature_mean.copy_(features.mean(0))
    summary.feature_std.copy_(features.std(0, correction=0).clamp(min=1e-3))


@torch.no_grad()
def network_basis(basis: FmriSpatialBasis, scans: "Scans") -> torch.Tensor:
    """[networks, basis functions]: mean over each network's ROIs, then over the atlases that have it; else zero."""
    of_atlas = []
    for atlas in scans.atlases.values():
        members = torch.from_numpy(membership(atlas)).float()
        functions = basis(torch.tensor(atlas.coordinates, dtype=torch.float32))
        of_atlas.append(members.T @ functions / members.sum(0)[:, None])
    return torch.stack(of_atlas).nanmean(0).nan_to_num()


@torch.no_grad()
def fit_descriptor_head(
    model: FmriCodecModel, features: np.ndarray, targets: np.ndarray, subjects: np.ndarray, seed: int = 0
) -> np.ndarray:
    """
    Ridge regression of standardised descriptors [rows, descriptors], NaN where unknown, on scan features
    [rows, features]; penalties by cross-validation over subjects [rows]. The head is not trained any more.

    Returns:
        R-squared [descriptors] of the predictions for subjects left out.
    """
    head, summary = model.descriptor_head, model.tangent_summary
    if head is None:
        raise ValueError("expected a codec with descriptor_names, got one without")
    config = model.config
    ridge = cross_fitted_ridge(features, targets, subjects, seed, config.scan_feature_blocks, config.num_scan_numbers)
    weight = torch.from_numpy(ridge.weight)
    scale = summary.feature_std.double() * np.sqrt(features.shape[1])
    head.weight.copy_((weight * scale.cpu()[:, None]).T)
    head.bias.copy_(torch.from_numpy(ridge.bias) + summary.feature_mean.double().cpu() @ weight)
    head.requires_grad_(False)
    return ridge.r_squared


def present(scans: "Scans", index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal [time, rois] and coordinates [rois, 3] in mm of the ROIs that the scan has."""
    signal = scans.signal(int(index))
    there = ~np.isnan(signal).any(0)
    coordinates = scans.atlas(int(index)).coordinates[there]
    return torch.from_numpy(signal[:, there]), torch.from_numpy(np.asarray(coordinates, np.float32))


def windows_of(
    scans: "Scans", patch_length: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Values [1, rois, time] and coordinates of windows of FRAMES frames, or of shorter scans' whole patches."""
    each = -(-WINDOWS // len(scans))
    for index in tqdm(rng.permutation(len(scans))[:WINDOWS], desc="summary", unit="scan", disable=None):
        signal, coordinates = present(scans, index)
        length = min(FRAMES, len(signal)) // patch_length * patch_length
        starts = np.arange(0, len(signal) - length + 1, length)
        for start in rng.permutation(starts)[:each]:
            yield signal[start : start + length].T[None], coordinates[None]


def shared_out(variances: np.ndarray, parts: int, width: int) -> np.ndarray:
    """
    Which of the numbers, int [parts, width], each part of the tokens holds: from the largest variance on, the next
    goes to the part whose product of variances is the least, so that all need about as many bits.
    """
    chosen: list[list[int]] = [[] for _ in range(parts)]
    held = np.zeros(parts)
    order = np.argsort(-variances, kind="stable")[: parts * width]
    logs = np.log((variances / variances.max()).clip(min=1e-6)) - np.log(1e-6)
    for index in order:
        part = min((part for part in range(parts) if len(chosen[part]) < width), key=lambda part: held[part])
        chosen[part].append(int(index))
        held[part] += logs[index]
    return np.array(chosen)


def least_squares(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Weights [tokens, in, out] from inputs [tokens, n, in] to outputs [tokens, n, out]."""
    # `lstsq` gives other last bits from run to run
    inputs = inputs.double()
    gram = inputs.mT @ inputs
    gram = gram + 1e-6 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(gram.shape[1])
    return torch.linalg.solve(gram, inputs.mT @ outputs.double()).to(outputs.dtype)


def of_eigenvalues(matrices: torch.Tensor, function: Any) -> torch.Tensor:
    """Symmetric matrices [..., n, n] with their eigenvalues replaced by a function of them."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * function(values)[..., None, :]) @ vectors.mT
