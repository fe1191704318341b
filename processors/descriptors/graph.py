"""Metrics of the graph that connects ROIs whose signals correlate."""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path
from sknetwork.clustering import Louvain, get_modularity

from .networks import correlation, network_series


# share of all possible edges that the thresholded graph keeps: the strongest
DENSITY = 0.1


def strength(standardized: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean over a network's ROIs of their mean correlation with all other ROIs, [..., networks] of standardized
    [..., time, rois] (node strength of the signed, unthresholded graph, divided by the number of other nodes).
    """
    rois, time = members.shape[0], standardized.shape[-2]
    total = standardized.sum(-1, keepdims=True)
    per_roi = ((standardized * total).sum(-2) / time - 1) / (rois - 1)
    return network_series(per_roi, members)


def graph_metrics(standardized: np.ndarray) -> np.ndarray:
    """Global efficiency, modularity and clustering [3] of one scan, standardized [time, rois]; NaN where 10 % of the
    ROI pairs are not one edge.
    """
    weights = strongest_edges(correlation(standardized))
    if not weights.any():
        return np.full(3, np.nan)
    return np.array([global_efficiency(weights), modularity(weights), average_clustering(weights)])


def strongest_edges(matrix: np.ndarray) -> np.ndarray:
    """Absolute correlations [rois, rois] of the `DENSITY` strongest pairs of ROIs, zero elsewhere and on the diagonal.
    Pairs as strong as the weakest that is kept are kept too, so the order of ROIs does not matter.
    """
    weights = np.abs(matrix)
    np.fill_diagonal(weights, 0)
    pairs = weights[np.triu_indices(len(weights), 1)]
    kept = int(DENSITY * len(pairs))
    if kept == 0:
        return np.zeros_like(weights)
    return np.where(weights >= np.partition(pairs, -kept)[-kept], weights, 0)


def global_efficiency(weights: np.ndarray) -> float:
    """Mean inverse number of edges on the shortest path between two ROIs, 0 where there is none; the weights do not
    count (Latora & Marchiori 2001).
    """
    distances = shortest_path(csr_matrix(weights), unweighted=True)
    np.fill_diagonal(distances, np.inf)
    return float((1 / distances).sum() / (len(weights) * (len(weights) - 1)))


def modularity(weights: np.ndarray) -> float:
    """Newman's modularity, weighted, resolution 1, of the communities that the Louvain method finds (Blondel et al.
    2008), visiting nodes in the order of the atlas and not at random: the same graph gives the same value.
    """
    graph = csr_matrix(weights)
    # the library's loose tolerances stop before the optimum of each level
    louvain = Louvain(tol_optimization=1e-9, tol_aggregation=1e-9)
    modularity: Any = get_modularity(graph, louvain.fit_predict(graph))
    return float(modularity)


def average_clustering(weights: np.ndarray) -> float:
    """Mean over ROIs of the geometric mean weight of the triangles around them, weights relative to the largest
    (Onnela et al. 2005); 0 for ROIs with fewer than two edges.
    """
    roots = np.cbrt(weights / weights.max())
    degrees = np.count_nonzero(weights, axis=1)
    triangles = (roots @ roots * roots).sum(1)
    return float((triangles / np.where(degrees > 1, degrees * (degrees - 1), 1)).mean())
