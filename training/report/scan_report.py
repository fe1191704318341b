"""One self-contained page about one scan: what the model reads in it, what it keeps of it, and what it answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .page import as_count, as_number, as_percent, as_text, bar, drawing, table, write_page
from .scan_figures import ScanView, carpet, connectivity, glass_brain, network_name, token_map, traces
from .scan_measures import code_places, network_surprise, read_scan, token_contributions, view_scan


SURPRISE = "#0b7fc7"


def write_scan_report(
    path: Path,
    reader: Any,
    scan: Any,
    questions: Mapping[str, Sequence[str] | None],
    title: str = "One scan",
    tr: float | None = None,
    atlas: Any = None,
    label_image: Any = None,
    window: str | None = None,
) -> None:
    """
    Writes the page to `path` in one move.

    Args:
        reader: of `fmrilm.load`.
        scan: one scan, in any form the reader takes.
        questions: what to ask, each with its allowed answers; None for an answer in free text.
        title: what the page calls the scan.
        tr, atlas, label_image, window: of the scan, as the reader takes them.
    """
    # read once: a volume takes a while, and all that follows needs its ROIs alone
    scan = read_scan(reader, scan, tr, atlas, label_image)
    view = view_scan(reader, scan, window)
    answers, contributions = {}, {}
    for text, choices in questions.items():
        answers[text] = reader.ask(scan, text, choices, window=window)
        contributions[text] = token_contributions(reader, scan, text, answers[text]["answer"], choices, window)
    surprise, networks = network_surprise(reader, scan, window)
    sections = {
        "answers": ("Answers", _answers(view, answers, contributions)),
        "codec": ("From signal to codes and back", carpet(view) + traces(view) + connectivity(view)),
        "codes": ("The codes", _codes(reader, view)),
        "surprise": ("Surprise", _surprise(view, surprise, networks)),
        "brain": ("On the brain", _brain(view, scan["atlas"].coordinates)),
    }
    write_page(path, f"fMRI-LM: {title}", _summary(view, scan, title, surprise), sections)


def _summary(view: ScanView, scan: dict[str, Any], title: str, surprise: np.ndarray) -> str:
    missing = int(np.isnan(view.signal).all(0).sum())
    frames, rois = scan["signal"].shape
    tiles = [
        ("Read of the scan", f"{view.seconds:.0f} s", f"of {frames * scan['tr']:.0f} s measured"),
        ("Codes", as_number(view.codes.size, ","), f"{view.codes.shape[1]} in each of {len(view.codes)} steps"),
        ("FC kept by the codes", as_number(view.connectivity_similarity), "correlation over pairs of ROIs"),
        ("Surprise", as_number(_mean(surprise)), "nats a code, mean over steps"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b>{note}</dd></div>" for name, value, note in tiles)
    return (
        f'<header class="summary"><p class="kicker">fMRI-LM · report of a scan</p><h1>{as_text(title)}</h1>'
        f"<p>{as_count(frames, 'frame', 'frames')} of {rois} ROIs ({as_text(scan['atlas'].name)}"
        f"{f', {missing} missing' if missing else ''}), one each {as_number(scan['tr'], 'g')} s. What follows is "
        f"about the window that the model read, at {as_number(view.repetition_time, 'g')} s a frame and in robust "
        f'z-scores of each ROI.</p><dl class="tiles">{cells}</dl></header>'
    )


def _answers(view: ScanView, answers: dict[str, dict[str, Any]], contributions: dict[str, np.ndarray]) -> str:
    if not answers:
        return "<p>Nothing was asked.</p>"
    rows = []
    for text, found in answers.items():
        bars = "".join(
            f"<div{' class=chosen' if choice == found['answer'] else ''}>{as_text(choice)}"
            f"<span>{as_percent(share)}</span>{bar(share)}</div>"
            for choice, share in found.get("probabilities", {}).items()
        )
        probability = f'<div class="choices">{bars}</div>' if bars else "in free text"
        rests_on = _strongest(view, contributions[text])
        rows.append([as_text(text), as_text(found["answer"]), probability, rests_on])
    steps, slots = view.codes.shape

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(answers), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (text, values) in zip(panels, contributions.items(), strict=True):
            limit = float(np.abs(values).max()) or 1.0
            image = axes.imshow(
                values.T,
                cmap="PuOr",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="none",
                extent=(0, view.seconds, slots - 0.5, -0.5),
            )
            axes.set_title(_shortened(f"{text} {answers[text]['answer']}"), loc="left")
            axes.set_ylabel("token")
            figure.colorbar(image, ax=axes, label="nats", pad=0.01)
        panels[-1].set(xlabel="time (s)", xticks=np.linspace(0, view.seconds, steps + 1))

    return (
        "<p>The bars are the probability the model gives to each allowed answer; its answer is in bold.</p>"
        + table(["Question", "Answer", "Probability", "Rests most on"], rows, "answers", "Answers to questions")
        + drawing(
            "The tokens that the answers rest on",
            draw,
            0.7 + 1.5 * len(answers),
            "Gradient × input (Shrikumar et al. 2016): to first order, by how much each token's embedding raises "
            "(purple) or lowers (orange) the log-probability of the answer that was given; each question has its "
            "own scale. It says what the model used, not whether the answer is true.",
        )
    )


def _codes(reader: Any, view: ScanView) -> str:
    steps, slots = view.codes.shape
    used = len(np.unique(view.codes))
    return (
        f"<p>What the language model reads: {steps} steps of {view.seconds / steps:.0f} s, {slots} codes each; "
        f"{used} different ones of a codebook of "
        f"{as_number(reader.model.config.codec_config.codebook_size, ',')}.</p>"
        + token_map(
            view,
            code_places(reader, view.codes),
            "place in the codebook",
            ("one end", "the other"),
            "Each cell is one code with its number in the codebook. Codes of like colour have like vectors: colour is "
            "the rank along the first principal component of the codebook.",
        )
    )


def _surprise(view: ScanView, surprise: np.ndarray, networks: dict[str, np.ndarray]) -> str:
    known = {name: values for name, values in networks.items() if np.isfinite(values).any()}
    if not known:
        return "<p>A scan of one step leaves nothing to expect.</p>"
    values = np.stack(list(known.values()))
    limit = float(np.nanmax(np.abs(values))) or 1.0
    edges = np.linspace(0, view.seconds, len(surprise) + 1)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.25 * len(known) + 0.6))
        above.stairs(surprise, edges, color=SURPRISE, linewidth=1.8, baseline=None)
        above.set_ylabel("nats a code")
        image = below.imshow(
            values,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="none",
            extent=(0, view.seconds, len(known) - 0.5, -0.5),
        )
        below.set_yticks(range(len(known)), [network_name(name) for name in known])
        below.set(xlabel="time (s)", xticks=edges)
        below.tick_params(axis="y", length=0)
        figure.colorbar(image, ax=below, label="share of the network", pad=0.01)

    means = {network_name(name): _mean(values) for name, values in known.items()}
    most = max(means, key=lambda name: means[name] or 0.0)
    return (
        "<p>How unexpected each step's codes are for the model, given the steps before, in nats a code (mean over the "
        f"step's codes; the first step has none before). Over the window, most of it goes with the {as_text(most)} "
        f"network ({as_number(means[most], '+.3f')}).</p>"
        + drawing(
            "Surprise of each step, and the networks it goes with",
            draw,
            2.6 + 0.28 * len(known),
            "Above: surprise of each step. Below: the surprise less that of the same scan in which the ROIs of one "
            "network keep to their mean (occlusion, Zeiler and Fergus 2014). Red: the step is less expected for what "
            "this network does; blue: the network made it more predictable. A scan with a network at rest is none the "
            "model has learned from, so small differences say little.",
        )
    )


def _brain(view: ScanView, coordinates: np.ndarray) -> str:
    signal, _ = view.connectivity
    np.fill_diagonal(signal, np.nan)
    counts = np.isfinite(signal).sum(0)
    strength = np.where(counts > 0, np.nansum(signal, 0) / np.maximum(counts, 1), np.nan)
    return glass_brain(
        "How connected each ROI is",
        strength,
        coordinates,
        "mean correlation",
        "Mean correlation of a ROI's signal with those of all others, at the ROI's centre (MNI).",
    ) + glass_brain(
        "What the codes keep of each ROI",
        view.roi_correlations,
        coordinates,
        "r of signal and reconstruction",
        "Correlation over time of a ROI's signal with its reconstruction.",
    )


def _strongest(view: ScanView, contributions: np.ndarray) -> str:
    step, slot = np.unravel_index(np.abs(contributions).argmax(), contributions.shape)
    width = view.seconds / len(view.codes)
    return (
        f"token {slot} at {step * width:.0f} to {(step + 1) * width:.0f} s"
        f"<small>{as_number(float(contributions[step, slot]), '+.3f')} nats</small>"
    )


def _shortened(text: str, length: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
