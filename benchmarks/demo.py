"""
What the demo's model reads, over seeds: writes demo.csv. What the demo costs is measured by `newcomer.py`.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/demo.py runs/demo-seeds    # threads wait as those of `fmrilm demo`

Runs the demo once for each seed, in a folder of its own; goes on where it was stopped, as a finished run is not
repeated. Figures are means over seeds, with the lowest and the highest seed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from fmrilm.training.data.shards import write_whole
from fmrilm.training.demo import run_demo
from fmrilm.training.evaluation.descriptors import CONDITIONS


RESULTS = Path(__file__).parent / "results"


def figures(results: dict) -> Iterator[tuple[str, str, float | None]]:
    """What was measured, the condition ("" where there is none) and the value of a run's results.json."""
    descriptors = results["descriptors"]
    for family, found in descriptors["families"].items():
        for condition in CONDITIONS:
            yield f"balanced accuracy, {family}", condition, found[condition]["accuracy"]
        yield f"balanced accuracy, {family}", "right minus shuffled", found["difference"]["value"]
    descriptions = descriptors["descriptions"]
    for condition, share in descriptions["statement_accuracy"].items():
        yield "true statements in descriptions", condition, share
    yield "statements in descriptions", "", descriptions["statements"]
    yield "R2 of the decoded signal", "", results["codec"]["r_squared"]["value"]
    yield "FC correlation of the decoded signal", "", results["codec"]["fc_correlation"]["value"]


def table(runs: Sequence[dict]) -> pd.DataFrame:
    """A row for each figure of the runs' results: mean, lowest and highest of the runs in which it is defined."""
    values: dict[tuple[str, str], list[float]] = {}
    for results in runs:
        for what, condition, value in figures(results):
            values.setdefault((what, condition), []).extend([] if value is None else [value])
    rows = []
    for (what, condition), found in values.items():
        mean, lowest, highest = (np.mean(found), min(found), max(found)) if found else (np.nan, np.nan, np.nan)
        rows.append([what, condition, mean, lowest, highest, len(found)])
    return pd.DataFrame(rows, columns=["what", "condition", "mean", "lowest", "highest", "runs"])


def main(
    work: Annotated[Path, typer.Argument(help="Folder for a run of each seed.")],
    seeds: Annotated[str, typer.Option(help="By comma.")] = "0,1,2",
    results: Annotated[Path, typer.Option(help="Folder of demo.csv.")] = RESULTS,
) -> None:
    """The demo for each seed, and the table over seeds."""
    found = table([run_demo(work / f"seed{seed}", seed=int(seed)) for seed in seeds.split(",")])
    write_whole(results / "demo.csv", found.to_csv(index=False, float_format="%.4f"))
    print(found.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    typer.run(main)
