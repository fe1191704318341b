"""The report's sections on the codec: signal and reconstruction, tokens, each person's figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .page import as_number, as_percent, as_text, drawing, mean_of, table
from .scan_figures import RECONSTRUCTION, SIGNAL, ScanView, carpet, connectivity, token_map, traces


EVEN_USE = "#e0690c"


@dataclass(frozen=True, kw_only=True)
class ReportExample(ScanView):
    """
    One held-out window and what the codec makes of it.

    code_counts: [codebook_size], occurrences of each code over all held-out windows.
    """

    title: str
    code_counts: np.ndarray


def codec_section(codec: dict[str, Any], example: ReportExample) -> str:
    time, rois = example.signal.shape
    return (
        f"<p>The codec writes a window of {time * rois:,} values ({time} frames × {rois} ROIs) as "
        f"{as_number(codec['numbers_per_window'], ',')} codes, {as_number(codec['bits_per_window'], ',')} bits. "
        f"This is what it keeps of one held-out window: {as_text(example.title)}.</p>"
        + carpet(example)
        + traces(example)
        + connectivity(example)
    )


def tokens_section(codec: dict[str, Any], example: ReportExample) -> str:
    counts = np.asarray(example.code_counts)
    steps, slots = example.codes.shape
    ranked = np.sort(counts)[::-1]
    used, size, perplexity = codec["codebook_used"], codec["codebook_size"], codec["perplexity"]
    # 0: the commonest code of all, 1: the rarest
    rarity = (np.argsort(np.argsort(-counts, kind="stable")) / max((counts > 0).sum() - 1, 1)).clip(0, 1)

    def usage(figure: Figure) -> None:
        axes = figure.subplots()
        ranks = np.arange(1, len(ranked) + 1)
        axes.fill_between(ranks, ranked, step="mid", color=RECONSTRUCTION, alpha=0.85, linewidth=0)
        axes.axhline(ranked.mean(), color=EVEN_USE, linewidth=1.2, label="even use")
        if perplexity is not None:
            axes.axvline(perplexity, color=SIGNAL, linewidth=1.2, linestyle="--", label="perplexity")
        axes.set(xlabel="code, from the commonest to the rarest", ylabel="occurrences", xlim=(0.5, len(ranked) + 0.5))
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    share = as_percent(None if used is None or not size else used / size)
    return (
        f"<p>What the language model reads of the window above: {steps} steps of {example.seconds / steps:.0f} s, "
        f"{slots} codes each.</p>"
        + token_map(
            example,
            rarity[example.codes],
            "how usual the code is",
            ("commonest", "rarest"),
            "Each cell is one code with its number in the codebook; dark cells are codes rare in held-out windows.",
        )
        + drawing(
            "Use of the codebook",
            usage,
            3.2,
            f"{as_number(used, ',')} of {as_number(size, ',')} codes ({share}) occur in the held-out windows. The "
            f"perplexity is {as_number(perplexity, '.0f')}: use is as varied as if that many codes occurred equally.",
        )
    )


def subjects_section(subjects: Sequence[dict[str, Any]]) -> str:
    columns = [f"{model}{score}" for score in ("r_squared", "fc_correlation") for model in ("", "pca_", "mean_")]
    rows = [
        [
            f"{as_text(s['subject'])}<small>{as_text(s['dataset'])}</small>",
            as_number(s["windows"], ","),
            *(as_number(s[column]) for column in columns),
        ]
        for s in subjects
    ]
    windows = as_number(sum(s["windows"] or 0 for s in subjects), ",")
    rows.append(["All, mean over people", windows, *(as_number(mean_of([s[c] for s in subjects])) for c in columns)])
    head = ["Person", "Windows", "R²", "R² of PCA", "R² of the mean", "FC", "FC of PCA", "FC of the mean"]
    return (
        "<p>R² is the share of the signal's variance that is kept; FC is the correlation of the functional "
        "connectivity before and after. Beside the codec stand two baselines: "
        "as many principal components of training patches as a step has codes (real numbers in place of "
        "codes), and each ROI's own mean.</p>"
        + table(head, rows, "numbers", "Reconstruction of each held-out person")
    )
