"""
Draws `docs/images/reading.png`: a held-out scan, its codes, what they decode to, and answers about it beside answers
about another held-out subject's scan.

    python docs/picture.py runs/demo/model
"""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

import fmrilm
from fmrilm.processors.descriptors.cohort import LEVELS, Cohort
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import question
from fmrilm.training.data.dataset import core_descriptors
from fmrilm.training.data.open_data import open_scans


OUTPUT = Path(__file__).parent / "images" / "reading.png"
# two subjects whom the demo's model has not learned from, of one scanner and atlas
SUBJECTS = ("213522", "377451")
DESCRIPTORS = ("strength/Default", "connectivity/Vis-SomMot", "autocorrelation/Vis")
SIGNAL_LIMIT = 3.0


def main(model: Annotated[Path, typer.Argument(exists=True, file_okay=False)], output: Path = OUTPUT) -> None:
    reader, cohort = fmrilm.load(model), Cohort.load(model)
    scans = {scan.subject: scan for scan in open_scans()}
    given: list[dict[str, Any]] = [
        {"signal": scan.signal, "tr": scan.tr, "atlas": scan.atlas} for scan in (scans[name] for name in SUBJECTS)
    ]
    atlas = fmrilm.Atlas.load(scans[SUBJECTS[0]].atlas)
    length = reader.processor.feature_extractor.window_length
    signals = [reader.signal(one)[:length] for one in given]
    order = np.argsort(atlas.networks, kind="stable")
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.subplot_mosaic("aab;ccd;eef", height_ratios=[3, 1.3, 3])
    decoded = reader.reconstruct(given[0])[:length]
    for place, values, title in (("a", signals[0], "signal"), ("e", decoded, "decoded from the codes")):
        axes = grid[place]
        seconds = len(values) * reader.processor.feature_extractor.repetition_time
        extent = (0, seconds, len(order), 0)
        axes.imshow(
            values[:, order].T, aspect="auto", cmap="gray", vmin=-SIGNAL_LIMIT, vmax=SIGNAL_LIMIT, extent=extent
        )
        axes.set(title=f"{title}, {len(order)} regions", xlabel="seconds", ylabel="region")
    codes = reader.tokenize(given[0])
    grid["c"].imshow(codes[..., 0].T, aspect="auto", cmap="nipy_spectral", interpolation="nearest")
    grid["c"].set(title=f"codes, level 1 of {codes.shape[-1]}", xlabel="patch of 32 s", ylabel="token")
    truths = [cohort.levels(core_descriptors(signal, atlas)[None])[0] for signal in signals]
    for place, name in zip("bdf", DESCRIPTORS, strict=True):
        axes, asked = grid[place], question(name)
        for number, (label, one, color) in enumerate(zip(("this scan", "another"), given, ("C0", "C7"), strict=True)):
            found = reader.ask(one, asked, list(LEVELS), window="first")["probabilities"]
            axes.bar(np.arange(3) + 0.38 * number, [found[level] for level in LEVELS], 0.36, label=label, color=color)
        truth = LEVELS[truths[0][CORE_NAMES.index(name)]]
        axes.set_xticks(np.arange(3) + 0.19, LEVELS)
        axes.set(ylim=(0, 1), ylabel="probability")
        axes.set_title(f"{textwrap.fill(asked, 46)}\nright answer about this scan: {truth}", fontsize=8)
    grid["b"].legend(fontsize=8)
    output.parent.mkdir(exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    typer.run(main)
