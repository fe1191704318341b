"""Where the training of a codec starts: its linear parts, fitted to training scans in seconds."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import dct
from sklearn.linear_model import Ridge
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from fmrilm.functions_fmricodec import FmriCodecFunctions
from fmrilm.latent_fmricodec import LatentDecoder, LatentEncoder
from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.quantization_fmrilm import VectorQuantizer

from ..data.dataset import PreparedScan, collate_signals


# of the functions of place: scans of an update, ROIs and frames of a scan, how far ROIs are moved (mm), learning rate
SCANS, ROIS, FRAMES, JITTER, RATE = 6, 64, 160, 2.0, 1e-2
# what all else is fitted to: patches every so many frames, and no more of them than that
STRIDE, PATCHES = 4, 20000
# coefficients that a slot's vector starts with; its other dimensions are left to training
SLOT_COEFFICIENTS = 8
# the constant beside them, in lengths of a vector: unit vectors then keep what length it had
LIFT = 2.0
# deviation of a number at which "fsq" makes even use of its levels
FSQ_DEVIATION = 0.75
# mixtures that the descriptor head is fitted to
HEAD_ITEMS = 1000
# penalty of the descriptor head's weights, whose inputs' squares add up to about 1
RIDGE = 0.3


@torch.no_grad()
def fit_start(model: FmriCodecModel, scans: Sequence[PreparedScan], steps: int, seed: int) -> float:
    """
    Makes a transform coder of an untrained codec of the latent layout: functions of place by maximum likelihood in
    `steps` updates; their coefficients as principal components, by cosine transform over a patch's frames, shared out
    so that every slot holds as much; a k-means codebook; and the best linear way back. The transformers start from
    adding nothing to it.

    Returns:
        Share of the variance in the scans' coefficients that the codes keep.
    """
    config, encoder, decoder, quantizer = model.config, model.encoder, model.decoder, model.quantizer
    if model.functions is None or not isinstance(encoder, LatentEncoder) or not isinstance(decoder, LatentDecoder):
        raise ValueError(f"expected a codec with token_layout 'latent', got {config.token_layout!r}")
    rng = np.random.default_rng(seed)
    fit_functions(model.functions, scans, steps, rng)
    coefficients, gram = _coefficients(model.functions, scans, config.patch_length, rng)
    # maps on which a coefficient's square is the signal's variance, as principal components
    root = torch.linalg.cholesky(gram)
    maps = root @ torch.linalg.eigh((coefficients @ root).flatten(0, 1).T.cov()).eigenvectors.flip(1)
    cosines = torch.from_numpy(dct(np.eye(config.patch_length), norm="ortho", axis=0)).float()
    parts = torch.einsum("ft,ntk,km->nfm", cosines, coefficients, maps)
    learned = isinstance(quantizer, VectorQuantizer)
    width = min(SLOT_COEFFICIENTS, config.codebook_dim - 1) if learned else config.codebook_dim
    chosen = _shared_out(parts.var(0).flatten().numpy(), config.tokens_per_step, width)
    values = parts.flatten(1)[:, chosen]
    frequency, component = np.divmod(chosen, maps.shape[1])

    vectors = torch.zeros(*values.shape[:2], config.codebook_dim)
    scale = 1 / values.pow(2).sum(-1).mean().sqrt() if learned else FSQ_DEVIATION / values.std(0)
    vectors[..., :width] = values * scale
    analysis = torch.einsum("swt,ksw->swkt", cosines[frequency], maps[:, component]).flatten(2)
    encoder.analysis.weight.zero_().unflatten(0, (-1, config.codebook_dim))[:, :width] = (
        analysis * (scale if learned else scale[..., None])
    )
    encoder.analysis.bias.zero_()
    if learned:
        vectors[..., width] = LIFT
        encoder.analysis.bias.unflatten(0, (-1, config.codebook_dim))[:, width] = LIFT
        _start_codebook(quantizer, vectors.flatten(0, 1))
    codes = quantizer.embed(quantizer.encode(vectors))[..., : width + learned]
    back = _least_squares(codes.transpose(0, 1), values.transpose(0, 1))
    inverse = torch.linalg.inv(maps)[component]
    synthesis = torch.einsum("swt,swk->swkt", cosines[frequency], inverse).flatten(2)
    decoder.synthesis.weight.zero_().unflatten(1, (-1, config.codebook_dim))[..., : width + learned] = torch.einsum(
        "sow,swc->cso", back, synthesis
    )
    for layer in (encoder.to_codebook, decoder.to_coefficients):
        layer.weight.zero_()
        layer.bias.zero_()
    lost = (torch.einsum("nso,sow->nsw", codes, back) - values).pow(2).sum()
    return float((values.pow(2).sum() - lost) / parts.pow(2).sum())


@torch.no_grad()
def fit_descriptor_head(model: FmriCodecModel, items: Sequence[dict[str, np.ndarray]], batch_size: int = 16) -> None:
    """
    Ridge regression of the descriptors of items, as `collate_signals` takes them, on what their codes tell. The head
    is not trained any more: its gradient trains the rest, and it is fitted again afterwards.
    """
    pooling, head, training = model.pooling, model.descriptor_head, model.training
    if pooling is None or head is None:
        raise ValueError("expected a codec with token_layout 'latent' and descriptor_names")
    model.eval()
    found = []
    for start in range(0, len(items), batch_size):
        batch = collate_signals(items[start : start + batch_size])
        inputs = (batch[name].to(model.device) for name in ("fmri_values", "roi_coordinates", "fmri_mask"))
        codes = model.encode(*inputs)
        decoded = model.decode_at_pooling_places(model.embed_codes(codes.clamp(min=0)), codes >= 0)
        found.append(pooling.correlations(*decoded))
    correlations = torch.cat(found)
    pooling.fit(correlations)
    pooled = pooling.standardised(correlations).cpu().numpy()
    targets = np.stack([item["descriptors"] for item in items])
    known = ~np.isnan(targets)
    # descriptors that the same items have are solved for together
    for pattern in np.unique(known, axis=1).T:
        if pattern.any():
            columns = (known == pattern[:, None]).all(0)
            ridge = Ridge(RIDGE).fit(pooled[pattern], targets[pattern][:, columns])
            head.weight[columns] = torch.from_numpy(ridge.coef_).to(head.weight)
            head.bias[columns] = torch.from_numpy(np.asarray(ridge.intercept_)).to(head.bias)
    head.requires_grad_(False)
    model.train(training)


@torch.enable_grad()
def fit_functions(
    functions: FmriCodecFunctions, scans: Sequence[PreparedScan], steps: int, rng: np.random.Generator
) -> None:
    """Maximum likelihood of windows of the scans, at ROIs drawn at random and a little moved."""
    optimizer = torch.optim.AdamW(functions.parameters(), lr=RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 4, steps)
    for _ in tqdm(range(steps), desc="functions of place", unit="step", disable=None):
        losses = []
        for index in rng.integers(len(scans), size=SCANS):
            signal, atlas = scans[index].signal, scans[index].atlas
            start = rng.integers(max(1, len(signal) - FRAMES + 1))
            rois = rng.permutation(signal.shape[1])[:ROIS]
            window = torch.from_numpy(signal[start : start + FRAMES, rois])
            moved = atlas.coordinates[rois] + rng.normal(0, JITTER, (len(rois), 3))
            losses.append(functions.negative_log_likelihood(window.T.cov(), torch.from_numpy(moved)))
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _coefficients(
    functions: FmriCodecFunctions, scans: Sequence[PreparedScan], patch_length: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of patches of scans in random order [patches, patch_length, functions], and the atlases' mean Gram matrix."""
    found, grams, count = [], {}, 0
    for index in rng.permutation(len(scans)):
        signal, atlas = torch.from_numpy(scans[index].signal), scans[index].atlas
        values = functions(torch.tensor(atlas.coordinates))
        grams[atlas.name] = values.T @ values / len(values)
        patches = signal.unfold(0, patch_length, STRIDE)
        found.append(functions.coefficients(values[None], patches[None], None)[0].mT)
        count += len(patches)
        if count >= PATCHES:
            break
    gram = torch.stack(list(grams.values())).mean(0)
    # there may be fewer ROIs than functions
    return torch.cat(found), gram + 1e-4 * gram.trace() / len(gram) * torch.eye(len(gram))


def _shared_out(variances: np.ndarray, slots: int, width: int) -> np.ndarray:
    """
    Which of the numbers, int [slots, width], each slot holds: from the largest variance on, the next goes to the slot
    whose product of variances is the least, so that all have about as many bits' worth.
    """
    chosen: list[list[int]] = [[] for _ in range(slots)]
    held = np.zeros(slots)
    order = np.argsort(-variances)[: slots * width]
    logs = np.log(variances.clip(min=1e-6 * variances.max())) - np.log(1e-6 * variances.max())
    for index in order:
        slot = min((slot for slot in range(slots) if len(chosen[slot]) < width), key=lambda slot: held[slot])
        chosen[slot].append(int(index))
        held[slot] += logs[index]
    return np.array(chosen)


def _least_squares(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Weights [slots, in, out] from inputs [slots, n, in] to outputs [slots, n, out]."""
    # `lstsq` gives other last bits from run to run
    inputs = inputs.double()
    gram = inputs.mT @ inputs
    gram = gram + 1e-6 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(gram.shape[1])
    return torch.linalg.solve(gram, inputs.mT @ outputs.double()).to(outputs.dtype)


def _start_codebook(quantizer: VectorQuantizer, vectors: torch.Tensor) -> None:
    """With fewer vectors than codes it is left to the first batches."""
    vectors = quantizer.continuous(vectors)
    distinct = vectors.unique(dim=0)
    if len(distinct) >= quantizer.codebook_size:
        quantizer.start(vectors, distinct)
