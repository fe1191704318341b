"""What a codec keeps of scans, how it uses its codebook, and whether scans find their descriptions."""

from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA

from ..data.dataset import PreparedScan, Window


def r_squared(signals: Sequence[np.ndarray], guesses: Sequence[np.ndarray]) -> float:
    """1 - squared error / squared deviation from each window's grand mean, pooled over windows [time, rois]."""
    error = sum(((signal - guess) ** 2).sum() for signal, guess in zip(signals, guesses, strict=True))
    return float(1 - error / sum(((signal - signal.mean()) ** 2).sum() for signal in signals))


def fc_correlation(signals: Sequence[np.ndarray], guesses: Sequence[np.ndarray]) -> float | None:
    """Mean correlation of the two FC matrices' upper triangles; None where a guess is constant."""
    values = []
    for signal, guess in zip(signals, guesses, strict=True):
        if (guess.std(0) < 1e-6).any():
            return None
        upper = np.triu_indices(signal.shape[1], 1)
        values.append(np.corrcoef(np.corrcoef(signal.T)[upper], np.corrcoef(guess.T)[upper])[0, 1])
    return float(np.mean(values))


class PatchPCA:
    """The baseline: principal components of training patches [patch_length x rois], as many as a step has tokens."""

    def __init__(self, scans: Sequence[PreparedScan], patch_length: int, components: int):
        self.patch_length = patch_length
        self.models = {}
        for name in {scan.atlas.name for scan in scans}:
            patches = [
                scan.signal[start : start + patch_length].ravel()
                for scan in scans
                if scan.atlas.name == name
                for start in range(0, len(scan.signal) - patch_length + 1, patch_length // 4)
            ]
            self.models[name] = PCA(components, svd_solver="randomized", random_state=0).fit(np.stack(patches))

    def reconstruct(self, window: Window) -> np.ndarray:
        model = self.models[window.scan.atlas.name]
        patches = window.signal.reshape(-1, self.patch_length * window.signal.shape[1])
        return model.inverse_transform(model.transform(patches)).reshape(window.signal.shape)


def codebook_results(codes: np.ndarray, codebook_size: int) -> dict:
    """Usage over codes int [windows, tokens]."""
    counts = np.bincount(codes[codes >= 0], minlength=codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return {
        "numbers_per_window": codes.shape[1],
        "bits_per_window": float(codes.shape[1] * np.log2(codebook_size)),
        "codebook_size": codebook_size,
        "codebook_used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def retrieval_results(scans: np.ndarray, texts: np.ndarray) -> dict:
    """
    How unit vectors scans [windows, dim] find their own texts [windows, dim] by cosine: recall at 1 and 5 and median
    rank, beside what chance gives. Texts that are the same count once.
    """
    _, first, same = np.unique(texts.round(6), axis=0, return_index=True, return_inverse=True)
    similarity = scans @ texts[first].T
    own = similarity[np.arange(len(scans)), same.ravel()]
    ranks = 1 + (similarity > own[:, None]).sum(1)
    count = len(first)
    return {
        "retrieval_texts": count,
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_5": float((ranks <= 5).mean()),
        "median_rank": float(np.median(ranks)),
        "chance_recall_at_1": 1 / count,
        "chance_recall_at_5": min(5 / count, 1.0),
        "chance_median_rank": (count + 1) / 2,
    }
