"""The four descriptor families written with common libraries as their documentation shows, to compare with."""

import bct
import networkx as nx
import numpy as np
import scipy.signal
import scipy.stats
from brainspace.gradient import GradientMaps
from sklearn.preprocessing import StandardScaler

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.networks import NETWORKS


# of each function: signal [time, rois], repetition time in s, reference gradients [rois, 3]
Values = dict[str, float]


def connectivity(signal: np.ndarray, atlas: Atlas, repetition_time: float, reference: np.ndarray) -> Values:
    matrix, of = np.corrcoef(signal.T), np.array(atlas.networks)
    np.fill_diagonal(matrix, np.nan)
    return {
        f"connectivity/{a}-{b}": np.nanmean(matrix[np.ix_(of == a, of == b)])
        for i, a in enumerate(NETWORKS)
        for b in list(NETWORKS)[i:]
    }


def gradients(signal: np.ndarray, atlas: Atlas, repetition_time: float, reference: np.ndarray) -> Values:
    maps = GradientMaps(n_components=3, approach="dm", kernel="cosine", alignment="procrustes", random_state=0)
    aligned = maps.fit(np.corrcoef(signal.T), reference=reference).aligned_
    of = np.array(atlas.networks)
    values = {}
    for axis, gradient in enumerate(aligned.T, start=1):
        values[f"gradient_range/{axis}"] = gradient.max() - gradient.min()
        values[f"gradient_dispersion/{axis}"] = gradient.var()
        values |= {f"gradient_mean/{axis}-{network}": gradient[of == network].mean() for network in NETWORKS}
    return values


def _strongest(signal: np.ndarray) -> np.ndarray:
    weights = np.abs(np.corrcoef(signal.T))
    np.fill_diagonal(weights, 0)
    return bct.threshold_proportional(weights, 0.1)


def _strength(signal: np.ndarray, atlas: Atlas) -> dict[str, float]:
    matrix, of = np.corrcoef(signal.T), np.array(atlas.networks)
    np.fill_diagonal(matrix, 0)
    rows = matrix.sum(1) / (len(matrix) - 1)
    return {f"strength/{network}": rows[of == network].mean() for network in NETWORKS}


def graph_networkx(signal: np.ndarray, atlas: Atlas, repetition_time: float, reference: np.ndarray) -> Values:
    graph = nx.from_numpy_array(_strongest(signal))
    communities = nx.community.louvain_communities(graph, seed=0)
    return {
        "efficiency/global": nx.global_efficiency(graph),
        "modularity/global": nx.community.modularity(graph, communities),
        "clustering/global": nx.average_clustering(graph, weight="weight"),
        **_strength(signal, atlas),
    }


def graph_bctpy(signal: np.ndarray, atlas: Atlas, repetition_time: float, reference: np.ndarray) -> Values:
    weights = _strongest(signal)
    return {
        "efficiency/global": bct.efficiency_bin(bct.binarize(weights)),
        "modularity/global": bct.modularity_louvain_und(weights, seed=0)[1],
        "clustering/global": bct.clustering_coef_wu(bct.normalize(weights)).mean(),
        **_strength(signal, atlas),
    }


def temporal(signal: np.ndarray, atlas: Atlas, repetition_time: float, reference: np.ndarray) -> Values:
    of = np.array(atlas.networks)
    scores = StandardScaler().fit_transform(signal)
    hertz = np.fft.rfftfreq(len(signal), repetition_time)
    spectrum = np.abs(np.fft.rfft(scipy.signal.detrend(scores, axis=0), axis=0))
    per_roi = spectrum[(hertz >= 0.01) & (hertz <= 0.08)].sum(0) / spectrum[1:].sum(0)
    values, means = {}, {}
    for network in NETWORKS:
        means[network] = scores[:, of == network].mean(1)
        raw = scipy.signal.detrend(signal[:, of == network].mean(1))
        series = scipy.signal.detrend(means[network])
        length = min(len(series), round(512 / repetition_time))
        frequencies, power = scipy.signal.welch(series, 1 / repetition_time, nperseg=length)
        low, high = (frequencies >= 0.01) & (frequencies < 0.1), (frequencies >= 0.1) & (frequencies <= 0.25)
        values[f"amplitude/{network}"] = np.abs(raw).mean()
        values[f"variability/{network}"] = raw.std()
        values[f"spectral_ratio/{network}"] = power[low].sum() / power[high].sum()
        values[f"outliers/{network}"] = np.mean(np.abs(scipy.stats.zscore(series)) > 3)
        values[f"falff/{network}"] = per_roi[of == network].mean()
        centred = means[network] - means[network].mean()
        values[f"autocorrelation/{network}"] = centred[1:] @ centred[:-1] / (centred @ centred)
    for measure in ("amplitude", "variability", "spectral_ratio", "outliers", "falff"):
        values[f"{measure}/global"] = np.mean([values[f"{measure}/{network}"] for network in NETWORKS])
    matrix = np.corrcoef([means[network] for network in NETWORKS])
    for i, a in enumerate(NETWORKS):
        values |= {f"fnc/{a}-{b}": matrix[i, j] for j, b in enumerate(NETWORKS) if j > i}
    return values


# by family and libraries
IMPLEMENTATIONS = {
    ("connectivity", "numpy"): connectivity,
    ("gradients", "brainspace"): gradients,
    ("graph", "networkx"): graph_networkx,
    ("graph", "bctpy"): graph_bctpy,
    ("temporal", "scipy, scikit-learn"): temporal,
}
