"""The `fmrilm` command."""

from pathlib import Path
from typing import Annotated

import typer


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


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Saved model or adapter with its processor.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    branch: Annotated[str, typer.Option("--revision", help="Branch to commit to.")] = "main",
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
    card_data: Annotated[Path | None, typer.Option(help="results.json to fill the card from.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list what would go, upload nothing.")] = False,
) -> None:
    """Check a folder to the last file, then upload it to the Hub in one commit."""
    from huggingface_hub.errors import HfHubHTTPError

    from .publish import push as push_folder

    try:
        commit, sizes = push_folder(folder, repo, private, branch, message, card_data, dry_run)
    except (ValueError, HfHubHTTPError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, size in sizes.items():
        typer.echo(f"{size:>12,} bytes  {name}")
    typer.echo("nothing was uploaded" if commit is None else f"{repo} is at commit {commit}")


def main() -> None:
    app()
