"""The command `fmrilm push`."""

from pathlib import Path
from typing import Annotated

import typer


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
    from ..hub.push import push as push_folder

    commit, sizes = push_folder(folder, repo, private, branch, message, card_data, dry_run)
    for name, size in sizes.items():
        typer.echo(f"{size:>12,} bytes  {name}")
    typer.echo("nothing was uploaded" if commit is None else f"{repo} is at commit {commit}")
