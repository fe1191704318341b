"""The `fmrilm` command."""

from pathlib import Path
from typing import Annotated

import typer

from .describe_command import describe


app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def fmrilm() -> None:
    """A language model that reads fMRI scans."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, results.json and report.html.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="The same chain in about a minute; learns nothing.")] = False,
) -> None:
    """Train all three stages on real scans out of Python packages, and question people the model never saw."""
    # imported here, so that --help answers at once
    from .demo import run_demo

    try:
        run_demo(output, quick)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"\nmodel, results.json and report.html are in {output}")


app.command()(describe)


def main() -> None:
    app()
