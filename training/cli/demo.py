"""The command `fmrilm demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, results.json and report.html.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="The same chain in about a minute; learns nothing.")] = False,
) -> None:
    """Train all three stages on real scans out of Python packages, and question people the model never saw."""
    from ..demo import run_demo

    run_demo(output, quick)
    typer.echo(f"\nmodel, results.json and report.html are in {output}")
