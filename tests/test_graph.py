"""Graph metrics against networkx."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

from fmrilm.processors.descriptors.graph import (
    average_clustering,
    global_efficiency,
    graph_metrics,
    modularity,
    strongest_edges,
)
from fmrilm.processors.descriptors.networks import correlation, standardize
from helpers import slow_series


def random_graph(seed: int, nodes: int = 60) -> np.ndarray:
    return strongest_edges(correlation(standardize(slow_series(seed, 50, nodes))))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), nodes=st.integers(5, 60))
def test_efficiency_and_clustering_equal_networkx(seed: int, nodes: int) -> None:
    weights = random_graph(seed, nodes)
    graph = nx.from_numpy_array(weights)
    assert global_efficiency(weights) == pytest.approx(nx.global_efficiency(graph), abs=1e-12)
    assert average_clustering(weights) == pytest.approx(nx.average_clustering(graph, weight="weight"), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_modularity_is_as_high_as_the_best_of_networkx(seed: int) -> None:
    weights = random_graph(seed)
    graph = nx.from_numpy_array(weights)
    found = modularity(weights)
    best = max(nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=run)) for run in range(20))
    assert best - 0.01 < found < best + 0.01
    assert modularity(weights) == found


def test_modularity_of_separate_groups_is_newmans_formula() -> None:
    sizes = [4, 6, 5]
    weights = block_diag(*(np.full((size, size), 0.7) for size in sizes))
    np.fill_diagonal(weights, 0)
    edges = np.array([size * (size - 1) / 2 for size in sizes])
    assert modularity(weights) == pytest.approx(1 - ((edges / edges.sum()) ** 2).sum(), abs=1e-12)


def test_a_tenth_of_the_pairs_is_kept_by_absolute_value() -> None:
    matrix = correlation(standardize(slow_series(0, 50, 40)))
    weights = strongest_edges(matrix)
    rows, columns = np.triu_indices(40, 1)
    order = np.argsort(-np.abs(matrix[rows, columns]))[:78]
    expected = np.zeros((40, 40))
    expected[rows[order], columns[order]] = np.abs(matrix[rows[order], columns[order]])
    np.testing.assert_array_equal(weights, expected + expected.T)


def test_equally_strong_pairs_are_all_kept() -> None:
    matrix = np.eye(10)
    for place, value in enumerate([0.9, -0.8, 0.7, 0.7, 0.7, -0.7, 0.5]):
        matrix[place, place + 1] = matrix[place + 1, place] = value
    # 4 of 45 pairs: the fourth is as strong as the fifth and the sixth
    assert np.count_nonzero(strongest_edges(matrix)) == 2 * 6


@pytest.mark.parametrize("rois, known", [(2, False), (4, False), (5, True), (6, True)])
def test_metrics_need_one_edge(rois: int, known: bool) -> None:
    found = graph_metrics(standardize(slow_series(0, 50, rois)))
    assert found.shape == (3,) and np.isfinite(found).all() == known
