"""
What a scan's sheet says: the likeliest level of each descriptor, which the codec's head tells from the codes of
held-out people, without the language model. Beside it the scans of other people of the dataset, as in the demo's
evaluation, and the right ones before they are rounded to codes.

    python benchmarks/reading.py runs/demo/model     # writes results/reading.csv
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.modeling_fmrilm import FmriLMModel
from fmrilm.training.codec.trainer import window_items
from fmrilm.training.data.dataset import collate_signals, cut_windows
from fmrilm.training.demo import Demo, DemoSettings
from fmrilm.training.evaluation import levels as evaluate
from fmrilm.training.evaluation.baselines import most_frequent


RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def told(model: FmriLMModel, items: list[dict[str, np.ndarray]], quantize: bool = True) -> np.ndarray:
    """
    Probabilities [items, descriptors, levels] on the sheet of each item; without `quantize` told from the vectors
    that are rounded to codes.
    """
    z_scores = []
    for item in items:
        batch = collate_signals([item])
        inputs = (batch[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask"))
        z_scores.append(model.codec(*inputs, quantize=quantize).descriptors[0])
    return model.descriptors.probabilities(torch.stack(z_scores)).numpy()


def main(
    model: Annotated[Path, typer.Argument(help="Model folder of the demo.")],
    out: Annotated[Path, typer.Option(help="Table to write.")] = RESULTS / "reading.csv",
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(DemoSettings(), quick=False, output=Path(folder))
        demo.prepare()
    reader = FmriLMForConditionalGeneration.from_pretrained(model).eval().model
    windows = demo.windows
    stand_ins = cut_windows(demo.training, demo.extractor.window_length, stride=2 * demo.settings.window_stride)
    pool = [*windows, *stand_ins]
    answers = told(reader, window_items(pool))
    noise = told(reader, evaluate.noise_items(windows, demo.settings.seed))
    truths = demo.cohort.levels(np.stack([window.descriptors for window in windows]))
    unrounded = told(reader, window_items(windows), quantize=False)
    scored, continuous = [], []
    for row, (window, truth) in enumerate(zip(windows, truths, strict=True)):
        asked = np.flatnonzero(truth >= 0)
        others = [
            answers[place][asked]
            for place, other in enumerate(pool)
            if other.scan.dataset == window.scan.dataset and other.scan.subject != window.scan.subject
        ]
        conditions = {"right": answers[row][asked], "swapped": np.stack(others), "noise": noise[row][asked]}
        scored.append(evaluate.Scored(window, asked, truth[asked], conditions))
        continuous.append(replace(scored[-1], scores={**conditions, "right": unrounded[row][asked]}))
    training = demo.cohort.levels(np.stack([window.descriptors for window in demo.training_windows]))
    majority = most_frequent(training)
    found, without = (
        evaluate.question_results(each, majority, demo.settings.seed)["families"] for each in (scored, continuous)
    )
    rows = [
        {
            "family": family,
            "questions": entry["questions"],
            **{name: entry[name]["accuracy"] for name in ("right", "swapped", "noise", "majority")},
            "right_unrounded": without[family]["right"]["accuracy"],
            "right_minus_swapped": entry["difference"]["value"],
            "low": entry["difference"]["interval"][0],
            "high": entry["difference"]["interval"][1],
        }
        for family, entry in found.items()
    ]
    table = pd.DataFrame(rows).round(4)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
