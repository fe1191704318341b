"""The report's sections on the codec: signal and reconstruction, tokens, each person's figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmrilm.processors.descriptors.networks import NETWORKS

from .report_page import as_number, as_percent, as_text, drawing, mean_of, table


SIGNAL, RECONSTRUCTION, EVEN_USE = "#8b93a0", "#0b7fc7", "#e0690c"


@dataclass(frozen=True)
class ReportExample:
    """
    One held-out window and what the codec makes of it.

    signal, reconstruction: [time, rois], z-scores. repetition_time: s. networks: one per ROI. codes: [steps,
    tokens_per_step]. code_counts: [codebook_size], occurrences of each code over all held-out windows.
    """

    title: str
    signal: np.ndarray
    reconstruction: np.ndarray
    repetition_time: float
    networks: tuple[str, ...]
    codes: np.ndarray
    code_counts: np.ndarray


def codec_section(codec: dict[str, Any], example: ReportExample) -> str:
    # networks in Yeo's order, then the others by name
    known = list(NETWORKS)
    rank = {n: (known.index(n) if n in known else len(known), n) for n in example.networks}
    order = np.array(sorted(range(len(example.networks)), key=lambda roi: rank[example.networks[roi]]))
    networks = np.array(example.networks)[order]
    pair = [np.asarray(values, float)[:, order] for values in (example.signal, example.reconstruction)]
    time, rois = pair[0].shape
    seconds = time * example.repetition_time
    edges = np.flatnonzero(networks[1:] != networks[:-1]) + 1
    bounds = np.array([0, *edges, rois])
    middles, names = (bounds[:-1] + bounds[1:]) / 2, [NETWORKS.get(n, n) for n in networks[bounds[:-1]]]
    # a flat reconstruction has no correlation: NaN, drawn blank
    with np.errstate(invalid="ignore", divide="ignore"):
        matrices = [np.corrcoef(values.T) for values in pair]
        cross = [float(np.corrcoef(pair[0][:, roi], pair[1][:, roi])[0, 1]) for roi in range(rois)]
    upper = np.triu_indices(rois, 1)
    similarity = float(np.corrcoef(*(matrix[upper] for matrix in matrices))[0, 1])
    # chosen by rule, not by hand: from nearly the best to nearly the worst
    chosen = [int(np.argsort(-np.array(cross))[int(share * (rois - 1))]) for share in (0.05, 0.35, 0.65, 0.95)]

    def mark(axes: Axes, *lines: Callable[..., Any]) -> None:
        for edge in edges:
            for line in lines:
                line(edge, color="#1a2330", linewidth=0.4, alpha=0.6)
        axes.set_yticks(middles, names)
        axes.tick_params(length=0)

    def carpets(figure: Figure) -> None:
        limit = np.percentile(np.abs(pair[0]), 98)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values, title in zip(panels, pair, ("signal", "reconstruction from codes"), strict=True):
            image = axes.imshow(
                values.T,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="none",
                extent=(0, seconds, rois, 0),
            )
            mark(axes, axes.axhline)
            axes.set(title=title, xlabel="time (s)")
        panels[0].set_ylabel("ROIs, by network")
        figure.colorbar(image, ax=panels, label="z-score", extend="both", shrink=0.7, pad=0.01)

    def traces(figure: Figure) -> None:
        clock = np.arange(time) * example.repetition_time
        panels = figure.subplots(len(chosen), 1, sharex=True, sharey=True)
        for axes, roi in zip(panels, chosen, strict=True):
            axes.plot(clock, pair[0][:, roi], color=SIGNAL, linewidth=1.1, label="signal")
            axes.plot(clock, pair[1][:, roi], color=RECONSTRUCTION, linewidth=1.5, label="reconstruction")
            name = NETWORKS.get(networks[roi], networks[roi])
            axes.set_title(f"{name}, ROI {order[roi] + 1}: r = {as_number(cross[roi])}", loc="left")
            axes.set(ylabel="z-score", xlim=(0, seconds))
        panels[-1].set_xlabel("time (s)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)

    def connectivity(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharey=True)
        titles = ("signal", "reconstruction", "reconstruction − signal")
        for axes, matrix, title in zip(panels, [*matrices, matrices[1] - matrices[0]], titles, strict=True):
            image = axes.imshow(matrix, "RdBu_r", vmin=-1, vmax=1, interpolation="none", extent=(0, rois, rois, 0))
            mark(axes, axes.axhline, axes.axvline)
            axes.set(title=title, xticks=[], xlabel="ROIs, same order")
        figure.colorbar(image, ax=panels, label="correlation (difference: same scale)", shrink=0.75, pad=0.01)

    return (
        f"<p>The codec writes a window of {time * rois:,} values ({time} frames × {rois} ROIs) as "
        f"{as_number(codec['numbers_per_window'], ',')} codes, {as_number(codec['bits_per_window'], ',')} bits. "
        f"This is what it keeps of one held-out window: {as_text(example.title)}.</p>"
        + drawing(
            "Every ROI over time: signal and reconstruction",
            carpets,
            3.9,
            "One row per ROI, the same colours in both panels. Slow waves shared by many ROIs should stand in both; a "
            "paler reconstruction has lost amplitude.",
        )
        + drawing(
            "Four ROIs over time",
            traces,
            5.6,
            "From nearly the best to nearly the worst ROI of this window: 5, 35, 65 and 95 % down the list, ranked by "
            "the correlation r of signal and reconstruction.",
        )
        + drawing(
            "Functional connectivity of signal and reconstruction",
            connectivity,
            3.7,
            "Correlation of every ROI with every other. Over all pairs the two matrices correlate with r = "
            f"{as_number(similarity)}; red in the difference is correlation that the codec adds.",
        )
    )


def tokens_section(codec: dict[str, Any], example: ReportExample) -> str:
    codes, counts = np.asarray(example.codes), np.asarray(example.code_counts)
    steps, slots = codes.shape
    seconds = len(example.signal) * example.repetition_time
    ranked = np.sort(counts)[::-1]
    used, size, perplexity = codec["codebook_used"], codec["codebook_size"], codec["perplexity"]
    # 0: the commonest code of all, 1: the rarest
    rarity = (np.argsort(np.argsort(-counts, kind="stable")) / max((counts > 0).sum() - 1, 1)).clip(0, 1)

    def token_map(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            rarity[codes].T,
            cmap="viridis_r",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="none",
            extent=(0, seconds, slots - 0.5, -0.5),
        )
        if codes.size <= 320:
            for (step, slot), code in np.ndenumerate(codes):
                axes.text(
                    (step + 0.5) * seconds / steps,
                    slot,
                    str(code),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if rarity[code] > 0.45 else "#1a2330",
                )
        axes.set(xlabel="time (s)", ylabel="token of the step", xticks=np.linspace(0, seconds, steps + 1))
        axes.set_yticks(range(slots))
        bar = figure.colorbar(image, ax=axes, label="how usual the code is", ticks=[0, 1], pad=0.01)
        bar.ax.set_yticklabels(["commonest", "rarest"])

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
        f"<p>What the language model reads of the window above: {steps} steps of {seconds / steps:.0f} s, "
        f"{slots} codes each.</p>"
        + drawing(
            "Codes over time",
            token_map,
            1.1 + 0.3 * slots,
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
