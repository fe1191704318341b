"""
Minutes from a fresh clone to a first answer: the README's commands, one after the other, in a new folder.

    python benchmarks/newcomer.py FOLDER

FOLDER is made here, and kept: `git clone`, `make install data`, `make demo`, `fmrilm ask` about the first of the
demo's scans, twice. Writes results/newcomer.csv: seconds of each, and how many cores other programs kept busy.
"""

import csv
import os
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from ask import CHOICES, QUESTION, timed


ROOT = Path(__file__).parents[1]


def main(folder: Annotated[Path, typer.Argument(help="Of the clone; not there yet.")]) -> None:
    rows = []
    # nothing of an earlier run is known
    os.environ["FMRILM_CACHE"] = str(folder / "cache")

    def step(what: str, *command: str) -> str:
        seconds, printed, others = timed([*command])
        rows.append({"what": what, "seconds": round(seconds, 1), "others": round(others, 2)})
        print(rows[-1], flush=True)
        return printed

    step("clone", "git", "clone", "--quiet", str(ROOT), str(folder))
    make = ("make", "--silent", "--directory", str(folder))
    step("install", *make, "install", "data")
    step("demo", *make, "demo")
    scans = folder / "runs" / "demo" / "scans"
    with open(scans / "manifest.csv", encoding="utf-8") as handle:
        scan = next(csv.DictReader(handle))
    ask = [str(folder / ".venv" / "bin" / "fmrilm"), "ask", str(scans / scan["path"]), QUESTION]
    ask += ["--choices", ",".join(CHOICES), "--tr", scan["tr"], "--atlas", scan["atlas"]]
    ask += ["--model", str(folder / "runs" / "demo" / "model")]
    for what in ("first answer", "second answer"):
        print(step(what, *ask))
    pd.DataFrame(rows).to_csv(Path(__file__).parent / "results" / "newcomer.csv", index=False)


if __name__ == "__main__":
    typer.run(main)
