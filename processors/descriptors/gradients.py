"""Functional gradients: the main axes along which the connectivity profiles of ROIs change (Margulies et al. 2016)."""

from collections.abc import Iterable

import numpy as np
from scipy.sparse.linalg import eigsh

from ..atlases_fmrilm import Atlas
from .networks import correlation, membership, network_series, standardize


COMPONENTS = 3
# share of each row of the connectivity matrix that is set to zero: the lowest
SPARSITY = 0.9
# exponent of the degree that the affinity is divided by on both sides (Coifman & Lafon 2006)
ALPHA = 0.5


def affinity(connectivity: np.ndarray) -> np.ndarray | None:
    """Cosine similarity [rois, rois] of the rows of a connectivity matrix, of each row the highest tenth alone.

    The ROI itself is among the tenth, which is rounded down as in brainspace; negative similarities are 0. None for
    an atlas so small that a tenth holds no other ROI.
    """
    rois = len(connectivity)
    kept = int(rois * (1 - SPARSITY))
    if kept < 2:
        return None
    threshold = np.partition(connectivity, rois - kept, axis=1)[:, rois - kept, None]
    sparse = np.where(connectivity >= threshold, connectivity, 0)
    sparse /= np.linalg.norm(sparse, axis=1, keepdims=True)
    return np.maximum(sparse @ sparse.T, 0)


def diffusion_gradients(connectivity: np.ndarray) -> np.ndarray:
    """Gradients [rois, 3] of a connectivity matrix [rois, rois]: multiscale diffusion map of `affinity`, scaled as
    brainspace does. NaN where the affinity falls apart into unconnected sets of ROIs or is too small for one.
    """
    rois = len(connectivity)
    similarity = affinity(connectivity)
    if similarity is None:
        return np.full((rois, COMPONENTS), np.nan)
    scale = similarity.sum(1) ** -ALPHA
    similarity *= scale * scale[:, None]
    # the random walk's operator is not symmetric, but similar to one that is and whose first eigenvector is known:
    # without it, an eigenvalue 1 is left only where the ROIs fall apart into unconnected sets
    roots = np.sqrt(similarity.sum(1))
    first = roots / np.linalg.norm(roots)
    operator = similarity / (roots * roots[:, None]) - first * first[:, None]
    start = np.random.default_rng(0).standard_normal(rois)
    values, vectors = eigsh(operator, COMPONENTS, which="LA", v0=start)
    values, vectors = values[::-1], vectors[:, ::-1] / roots[:, None]
    if values[0] > 1 - 1e-10:
        return np.full((rois, COMPONENTS), np.nan)
    return vectors / np.linalg.norm(vectors, axis=0) * np.sqrt(rois) * values / (1 - values)


def procrustes(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation (or reflection) [components, components] that brings source @ it closest to target, both [n, ...]."""
    left, _, right = np.linalg.svd(source.T @ target)
    return left @ right


def aligned_gradients(standardized: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Gradients [rois, 3] of one scan, standardized [time, rois], rotated to reference [rois, 3]."""
    gradients = diffusion_gradients(correlation(standardized))
    if np.isnan(gradients).any() or np.isnan(reference).any():
        return np.full_like(gradients, np.nan)
    return gradients @ procrustes(gradients, reference)


def fit_references(scans: Iterable[tuple[np.ndarray, Atlas]]) -> dict[str, np.ndarray]:
    """Reference gradients [rois, 3] by atlas name: those of the mean connectivity matrix of all scans of the atlas.

    scans: signals [time, rois], missing ROIs NaN. The atlas with the most ROIs sets the orientation of all, so that a
    network's position on a gradient compares across atlases. A ROI that is missing in all scans is NaN.
    """
    sums, counts, atlases = {}, {}, {}
    for signal, atlas in scans:
        known = atlases.setdefault(atlas.name, atlas)
        if known != atlas:
            raise ValueError(f"expected one atlas called {atlas.name!r}, got {known} and {atlas}")
        present = np.flatnonzero(~np.isnan(signal).all(axis=0))
        matrix, pairs = np.zeros((len(atlas), len(atlas))), np.ix_(present, present)
        matrix[pairs] = correlation(standardize(signal[:, present]))
        sums[atlas.name] = sums.get(atlas.name, 0) + matrix
        counts.setdefault(atlas.name, np.zeros(matrix.shape))[pairs] += 1
    references, profile = {}, None
    for name in sorted(sums, key=lambda name: (-len(sums[name]), name)):
        seen = counts[name].diagonal() > 0
        pairs = np.ix_(seen, seen)
        # two ROIs that no scan has together count as unrelated
        gradients = diffusion_gradients(sums[name][pairs] / np.maximum(counts[name][pairs], 1))
        if np.isfinite(gradients).all():
            networks = network_means(gradients, membership(atlases[name])[seen])
            if profile is None:
                # an eigenvector's sign is arbitrary: the ROI furthest from 0 is made positive
                furthest = gradients[np.abs(gradients).argmax(0), range(COMPONENTS)]
                rotation = np.diag(np.sign(furthest))
                profile = networks @ rotation
            else:
                shared = np.isfinite(networks[:, 0]) & np.isfinite(profile[:, 0])
                rotation = procrustes(networks[shared], profile[shared])
            gradients = gradients @ rotation
        references[name] = np.full((len(seen), COMPONENTS), np.nan)
        references[name][seen] = gradients
    return references


def network_means(gradients: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean [..., networks, 3] of gradients [..., rois, 3] over each network's ROIs, NaN for absent networks."""
    return np.swapaxes(network_series(np.swapaxes(gradients, -1, -2), members), -1, -2)
