"""The command `fmrilm export`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AtlasName, RepetitionTime


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a model and its processor.")],
    output: Annotated[Path, typer.Argument(help="New folder for the language model as a plain checkpoint.")],
    scan: Annotated[Path | None, typer.Option(help="Scan to write as prompt embeddings, too.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the scan.")] = None,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
) -> None:
    """Write the language model and a scan's prompt for servers that do not know fMRI, such as vLLM."""
    from ..hub.export import export as write

    difference = write(model, output, scan, question, tr, atlas)
    typer.echo(str(output))
    if difference:
        typer.echo(
            f"a causal server moves {difference['total_variation']:.0%} of the next word's probability; the likeliest "
            f"word {'stays' if difference['same_word'] else 'changes'}"
        )
