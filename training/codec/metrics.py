"""What a codec keeps of scans, how it uses its codebooks, and whether scans find their descriptions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fmrilm.modeling_fmricodec import FmriCodecModel

from ..data.dataset import encode_items


def r_squared(signals: Sequence[np.ndarray], guesses: Sequence[np.ndarray]) -> float:
    """1 - squared error / squared distance from each window's grand mean, pooled over windows [time, rois]."""
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


@torch.no_grad()
def evaluate_codec(model: FmriCodecModel, items: Sequence[dict[str, Any]], levels: int | None = None) -> dict:
    """
    Of items as `collate_signals` takes them, decoded from the first `levels` levels (all of them): R-squared,
    correlation of FC, and of each level the share of its codebook that occurs and the perplexity of its codes; where
    items have a "text_embedding", retrieval as well.
    """
    training = model.training
    model.eval()
    levels = levels or model.config.num_quantizers
    encoded = encode_items(model, items)
    signals, guesses = [], []
    for item, codes in zip(items, encoded.codes, strict=True):
        signals.append(item["signal"])
        guesses.append(decoded(model, item, codes[:, :levels]))
    correlation = fc_correlation(signals, guesses)
    results: dict[str, Any] = {
        "r_squared": r_squared(signals, guesses),
        # undefined where a ROI is decoded to a constant
        "fc_correlation": float("nan") if correlation is None else correlation,
        **codebook_results(
            [codes[:, : model.config.num_quantizers] for codes in encoded.codes], model.config.codebook_size
        ),
    }
    if model.alignment_head is not None and "text_embedding" in items[0]:
        features = model.tangent_summary.standardise(torch.from_numpy(encoded.features).to(model.device))
        texts = torch.from_numpy(np.stack([item["text_embedding"] for item in items])).to(model.device)
        pairs = model.alignment_head.embed_scans(features), model.alignment_head.embed_texts(texts)
        results |= retrieval_results(*(vectors.cpu().numpy() for vectors in pairs))
    model.train(training)
    return results


def decoded(model: FmriCodecModel, item: dict[str, Any], codes: np.ndarray) -> np.ndarray:
    """What codes [tokens, levels] of an item (see `evaluate_codec`) keep of its signal, [time, rois]."""
    rows = torch.from_numpy(codes).long()[None].to(model.device)
    coordinates = torch.tensor(item["coordinates"], dtype=torch.float32)[None].to(model.device)
    return model.decode(rows, coordinates)[0].T.cpu().numpy()[: len(item["signal"])]


def codebook_results(codes: Sequence[np.ndarray], codebook_size: int) -> dict[str, list[float]]:
    """Of each level of codes [tokens, levels]: the share of the codebook that occurs, and the perplexity."""
    counts = [np.bincount(level, minlength=codebook_size) for level in np.concatenate(list(codes)).T]
    shares = [count[count > 0] / count.sum() for count in counts]
    return {
        "codebook_usage": [float((count > 0).mean()) for count in counts],
        "perplexity": [float(np.exp(-(share * np.log(share)).sum())) for share in shares],
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
