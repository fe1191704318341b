"""What the model knows of how signals go on, fitted in closed form to the signals of training subjects."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMDynamics

from ..codec.fit import present
from ..data.splits import subject_folds


if TYPE_CHECKING:
    from ..data.dataset import Scans


# scans that are fitted to, frames from one forecast of a scan to the next, patches before the first one
SCANS, STEP, FIRST = 1000, 8, 5
# frames that the mean lag covariances may count as beside those of a scan
PRIOR_FRAMES = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
# ROIs with less variance in the context are left out
LEAST_VARIANCE = 0.01
RIDGE = 1e-6
# windows that are decoded together, and the penalty of a slope, in variances of what it predicts
BATCH, SLOPE_PENALTY = 32, 4.0


@torch.no_grad()
def fit_dynamics(
    dynamics: FmriLMDynamics, codec: FmriCodecModel, scans: "Scans", context: int, seed: int
) -> np.ndarray:
    """
    Fits the dynamics on the codec's spatial basis, from contexts of at most `context` frames: lag covariances as means
    over scans, the weights by least squares, and `prior_frames` and the errors from forecasts of subjects that were
    left out of both. Scans measured slower than the codec's repetition time do not count where there are others:
    interpolated frames hold a part of what follows.

    Returns:
        R2 [leads] of these forecasts; NaN where no scan is long enough, and then nothing is fitted.
    """
    leads = codec.config.patch_length
    rows = usable(scans, codec.config.repetition_time)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:SCANS])
    fold_of = subject_folds(scans.table["subject"].to_numpy(str)[rows], seed)
    folds = int(fold_of.max()) + 1
    sums, counts = torch.zeros(folds, *dynamics.covariances.shape, dtype=torch.float64), torch.zeros(folds)
    for row, fold in zip(rows, fold_of, strict=True):
        signal, coordinates = present(scans, row)
        functions = codec.spatial_basis(coordinates[None].to(codec.device))
        values = (signal - signal.mean(0)).T[None, None].to(codec.device)
        coefficients = codec.spatial_basis.coefficients(functions, values, None)[:, 0]
        sums[fold] += dynamics.lag_covariances(coefficients)[0].double().cpu()
        counts[fold] += 1
    if folds < 2:
        return np.full(leads, np.nan)
    # second moments of last frames, autoregression and future, in standard deviations of each ROI
    moments = torch.zeros(folds, len(PRIOR_FRAMES), 3 * leads, 3 * leads, dtype=torch.float64)
    seen = torch.zeros(folds, dtype=torch.float64)
    for row, fold in zip(rows, fold_of, strict=True):
        signal, coordinates = present(scans, row)
        found = contexts(signal, context, leads)
        if found is None:
            continue
        values, lengths, future = (each.to(codec.device) for each in found)
        functions = codec.spatial_basis(coordinates[None].to(codec.device))
        prior = ((sums.sum(0) - sums[fold]) / (counts.sum() - counts[fold])).float().to(codec.device)
        coefficients = codec.spatial_basis.coefficients(functions, values[:, None], None)[:, 0]
        own = dynamics.lag_covariances(coefficients)
        scale = (values.pow(2).sum(-1, keepdim=True) / lengths[:, None, None]).sqrt()
        kept = scale[..., 0] ** 2 > LEAST_VARIANCE
        for number, frames in enumerate(PRIOR_FRAMES):
            covariances = dynamics.shrunk(own, lengths, prior, frames)
            spread = functions @ dynamics.autoregression(covariances, coefficients[:, None])[:, 0]
            columns = torch.cat([values[..., -leads:].flip(-1), spread, future], -1)
            columns = (columns / scale)[kept].double()
            moments[fold, number] += (columns.T @ columns).cpu()
        seen[fold] += int(kept.sum())
    if (seen > 0).sum() < 2:
        return np.full(leads, np.nan)
    errors = torch.zeros(len(PRIOR_FRAMES), leads, leads, dtype=torch.float64)
    for number in range(len(PRIOR_FRAMES)):
        total = moments[:, number].sum(0)
        for fold in range(folds):
            errors[number] += errors_of(least_squares(total - moments[fold, number], leads), moments[fold, number])
    best = int(errors.diagonal(dim1=1, dim2=2).sum(-1).argmin())
    total = moments[:, best].sum(0)
    dynamics.covariances.copy_(sums.sum(0) / counts.sum())
    dynamics.prior_frames.fill_(PRIOR_FRAMES[best])
    dynamics.weights.copy_(least_squares(total, leads))
    dynamics.errors.copy_(errors[best] / seen.sum())
    return (1 - errors[best].diagonal() / total.diagonal()[-leads:]).numpy()


@torch.no_grad()
def fit_token_gains(
    dynamics: FmriLMDynamics, codec: FmriCodecModel, codes: Sequence[np.ndarray], subjects: np.ndarray, seed: int
) -> None:
    """
    From codes int [tokens, levels] of windows of training subjects [windows]: of each number of a token vector, the
    slope of its ridge regression on what the dynamics expect of it, from 0 to 1, divided by its variance. A normal
    token vector of this mean, beside one of mean zero, is likelier by its product with the expectation. What is
    expected of a subject has the mean lag covariances of other subjects' codes. One subject alone fits nothing.
    """
    per_patch, fold_of = codec.config.tokens_per_patch, subject_folds(subjects, seed)
    batches: dict[tuple[int, int], list[torch.Tensor]] = {}
    for window, fold in zip(codes, fold_of, strict=True):
        batches.setdefault((int(fold), len(window)), []).append(torch.from_numpy(np.asarray(window)).long())
    parts = [(fold, part) for (fold, _), rows in batches.items() for part in torch.stack(rows).split(BATCH)]
    sums, fitted = torch.zeros(int(fold_of.max()) + 1, *dynamics.covariances.shape), dynamics.covariances.clone()
    if len(sums) < 2:
        return
    for fold, part in parts:
        coefficients = codec.decode_coefficients(part.to(codec.device))
        own = dynamics.lag_covariances(coefficients - coefficients.mean(-1, keepdim=True))
        sums[fold] += own.sum(0).cpu()
    counts = np.bincount(fold_of)
    totals, count = torch.zeros(3, *dynamics.token_gains.shape, dtype=torch.float64), 0
    for fold, part in parts:
        dynamics.covariances.copy_((sums.sum(0) - sums[fold]) / float(counts.sum() - counts[fold]))
        rows = part.to(codec.device)
        pair = codec.embed_codes(rows), dynamics.expected_vectors(codec, rows)
        pair = [each.unflatten(1, (-1, per_patch))[:, 1:].flatten(0, 1).double().cpu() for each in pair]
        vectors, expected = pair
        totals += torch.stack([(vectors * expected).sum(0), expected.pow(2).sum(0), vectors.pow(2).sum(0)])
        count += len(vectors)
    dynamics.covariances.copy_(fitted)
    product, of_expected, of_vectors = totals
    variance = of_vectors / max(count, 1)
    slope = (product / (of_expected + SLOPE_PENALTY * variance).clamp(min=1e-12)).clamp(0, 1)
    dynamics.token_gains.copy_(torch.where(variance > 0, slope / variance.clamp(min=1e-12), 0))


def usable(scans: "Scans", repetition_time: float) -> np.ndarray:
    """
    Rows of the scans that were not interpolated to the codec's repetition time, or of all where these are of fewer
    than two subjects, of whom none can be left out.
    """
    rows = np.arange(len(scans))
    fast = rows[scans.table["tr"].to_numpy(float) <= repetition_time + 1e-6] if "tr" in scans.table else rows
    return fast if scans.table["subject"].iloc[fast].nunique() > 1 else rows


def contexts(signal: torch.Tensor, context: int, leads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """
    Of a scan [time, rois], its frames before each forecast [n, rois, context], ending together, without their mean and
    zero where there are none; their number [n]; and the frames that follow, of the same zero [n, rois, leads]. None if
    the scan is too short.
    """
    stops = torch.arange(min(FIRST * leads, len(signal) - leads), len(signal) - leads + 1, STEP)
    if len(signal) < 2 * leads:
        return None
    values = torch.zeros(len(stops), signal.shape[1], context)
    future = torch.zeros(len(stops), signal.shape[1], leads)
    lengths = stops.clamp(max=context)
    for row, (stop, length) in enumerate(zip(stops.tolist(), lengths.tolist(), strict=True)):
        before = signal[stop - length : stop]
        values[row, :, context - length :] = (before - before.mean(0)).T
        future[row] = (signal[stop : stop + leads] - before.mean(0)).T
    return values, lengths, future


def least_squares(moments: torch.Tensor, leads: int) -> torch.Tensor:
    """Weights [leads, leads + 1] of last frames and autoregression, from second moments [3 leads, 3 leads]."""
    weights = []
    for lead in range(leads):
        inputs = torch.tensor([*range(leads), leads + lead])
        gram = moments[inputs][:, inputs]
        gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(inputs))
        weights.append(torch.linalg.solve(gram, moments[inputs, 2 * leads + lead]))
    return torch.stack(weights)


def errors_of(weights: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Second moments [leads, leads] of the errors that the weights make, from those of all [3 leads, 3 leads]."""
    leads = len(weights)
    identity = torch.eye(leads, dtype=weights.dtype)
    missed = torch.cat([-weights[:, :leads], -identity * weights[:, leads], identity], 1)
    return missed @ moments @ missed.T
