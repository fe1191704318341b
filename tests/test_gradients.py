"""Gradients against brainspace, whose settings they follow, and against a general eigenvalue solver."""

import numpy as np
import pytest
import scipy.linalg
from brainspace.gradient import compute_affinity

from fmrilm.processors.descriptors.gradients import (
    COMPONENTS,
    affinity,
    aligned_gradients,
    diffusion_gradients,
    fit_references,
    network_means,
    procrustes,
)
from fmrilm.processors.descriptors.measures import describe, descriptor_names
from fmrilm.processors.descriptors.networks import NETWORKS, correlation, membership, standardize
from fmrilm.training.data.open_data import package_folder
from helpers import labelled_atlas, slow_series


@pytest.fixture(scope="module", params=[100, 400])
def group_connectivity(request) -> np.ndarray:
    """Mean connectivity of a group of HCP subjects, Schaefer parcels."""
    folder = package_folder("brainspace") / "datasets" / "matrices" / "main_group"
    matrix = np.loadtxt(folder / f"schaefer_{request.param}_mean_connectivity_matrix.csv", delimiter=",")
    return (matrix + matrix.T) / 2


def scan(seed: int, rois: int = 60, time: int = 120) -> np.ndarray:
    return standardize(slow_series(seed, time, rois))


def test_affinity_equals_brainspace(group_connectivity: np.ndarray) -> None:
    for matrix in (group_connectivity, correlation(scan(0))):
        expected = compute_affinity(matrix, kernel="cosine", sparsity=0.9)
        np.testing.assert_allclose(affinity(matrix), expected, atol=1e-12)


def test_gradients_are_the_diffusion_map_of_brainspaces_affinity(group_connectivity: np.ndarray) -> None:
    similarity = compute_affinity(group_connectivity, kernel="cosine", sparsity=0.9)
    similarity /= np.sqrt(np.outer(similarity.sum(1), similarity.sum(1)))
    walk = similarity / similarity.sum(1, keepdims=True)
    values, vectors = scipy.linalg.eig(walk)  # for matrices that are not symmetric, as this one is not
    order = np.argsort(-values.real)[: COMPONENTS + 1]
    values, vectors = values[order].real, vectors[:, order].real
    expected = (vectors / vectors[:, :1])[:, 1:] * values[1:] / (1 - values[1:])
    found = diffusion_gradients(group_connectivity)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-8)


def test_alignment_is_scipys_orthogonal_procrustes_and_undoes_a_rotation() -> None:
    standardized = scan(0)
    gradients = diffusion_gradients(correlation(standardized))
    target = np.random.default_rng(1).normal(size=gradients.shape)
    np.testing.assert_allclose(
        procrustes(gradients, target), scipy.linalg.orthogonal_procrustes(gradients, target)[0], atol=1e-10
    )
    rotation = scipy.linalg.qr(np.random.default_rng(2).normal(size=(COMPONENTS, COMPONENTS)))[0]
    np.testing.assert_allclose(aligned_gradients(standardized, gradients @ rotation), gradients @ rotation, atol=1e-8)


def test_first_gradient_orders_rois_along_a_line() -> None:
    place = np.linspace(0, 1, 80)
    connectivity = np.exp(-((place[:, None] - place) ** 2) / 0.02)
    first = diffusion_gradients(connectivity)[:, 0]
    assert abs(np.corrcoef(np.argsort(np.argsort(first)), place)[0, 1]) > 0.999


def test_unconnected_sets_of_rois_have_no_gradients() -> None:
    block = np.exp(-(np.subtract.outer(np.linspace(0, 1, 30), np.linspace(0, 1, 30)) ** 2) / 0.02)
    apart = scipy.linalg.block_diag(block, block)
    assert np.isnan(diffusion_gradients(apart)).all()
    apart[29, 30] = apart[30, 29] = 0.99
    assert np.isfinite(diffusion_gradients(apart)).all()


@pytest.mark.parametrize("rois, known", [(1, False), (2, False), (20, False), (40, True)])
def test_a_tenth_of_few_rois_is_too_few(rois: int, known: bool) -> None:
    place = np.linspace(0, 1, rois)
    gradients = diffusion_gradients(np.exp(-(np.subtract.outer(place, place) ** 2) / 0.1))
    assert gradients.shape == (rois, COMPONENTS) and np.isfinite(gradients).all() == known


def test_descriptors_are_range_variance_and_network_means() -> None:
    atlas = labelled_atlas()
    signals = slow_series(0, 80, len(atlas), batch=(2,))
    references = fit_references((signal, atlas) for signal in signals)
    measures = ["gradient_range", "gradient_dispersion", "gradient_mean"]
    found = describe(signals[0], atlas, measures, references=references)
    gradients = aligned_gradients(standardize(signals[0]), references[atlas.name])
    expected = {}
    for axis, values in enumerate(gradients.T, start=1):
        expected[f"gradient_range/{axis}"] = max(values) - min(values)
        expected[f"gradient_dispersion/{axis}"] = np.mean((values - values.mean()) ** 2)
        for network in NETWORKS:
            inside = [value for value, of in zip(values, atlas.networks, strict=True) if of == network]
            expected[f"gradient_mean/{axis}-{network}"] = np.mean(inside) if inside else np.nan
    names = descriptor_names(measures)
    np.testing.assert_allclose(found, [expected[name] for name in names], atol=1e-9)


def test_references_are_gradients_of_the_mean_connectivity_and_point_the_same_way() -> None:
    large = labelled_atlas({network: 15 for network in NETWORKS})
    small = labelled_atlas({"Vis": 20, "SomMot": 20, "DorsAttn": 25, "SalVentAttn": 25}, "small")
    rng = np.random.default_rng(0)
    # every network has a stretch of its own on a line, in both atlases
    place = dict(zip(NETWORKS, np.linspace(0, 1, len(NETWORKS)), strict=True))

    def scans(atlas, seed):
        rng = np.random.default_rng(seed)
        on_line = np.array([place[network] for network in atlas.networks]) + rng.uniform(-0.15, 0.15, len(atlas))
        near = np.exp(-(np.subtract.outer(on_line, on_line) ** 2) / 0.1)
        mix = np.linalg.cholesky(near + 0.1 * np.eye(len(atlas)))
        return [(rng.normal(size=(400, len(atlas))) @ mix.T, atlas) for _ in range(3)]

    pairs = [*scans(small, 0), *scans(large, 1)]
    references = fit_references(pairs[i] for i in rng.permutation(len(pairs)))
    assert {name: array.shape for name, array in references.items()} == {"made-up": (120, 3), "small": (90, 3)}
    mean = np.mean([correlation(standardize(signal)) for signal, atlas in pairs if atlas is large], axis=0)
    np.testing.assert_allclose(np.abs(references["made-up"]), np.abs(diffusion_gradients(mean)), atol=1e-8)
    furthest = references["made-up"][np.abs(references["made-up"]).argmax(0), range(COMPONENTS)]
    assert (furthest > 0).all()
    profiles = [network_means(references[atlas.name], membership(atlas)) for atlas in (large, small)]
    shared = np.isfinite(profiles[1][:, 0])
    assert shared.sum() == 4
    assert np.corrcoef(profiles[0][shared, 0], profiles[1][shared, 0])[0, 1] > 0.9


def test_two_atlases_of_one_name_are_refused() -> None:
    one, other = labelled_atlas(), labelled_atlas({"Vis": 30, "Cont": 10})
    with pytest.raises(ValueError, match="expected one atlas called 'made-up', got Atlas.* and Atlas"):
        fit_references([(slow_series(0, 80, 40), one), (slow_series(0, 80, 40), other)])
