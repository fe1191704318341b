"""The command `fmrilm app`: a model in the browser."""

from typing import Annotated

import typer

from .options import DEFAULT_MODEL, Model


def app(
    model: Model = DEFAULT_MODEL,
    port: Annotated[int | None, typer.Option(help="7860 or the next free one, unless given.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve at; 0.0.0.0 serves other machines, too.")] = None,
) -> None:
    """Ask a model about scans in the browser."""
    from ..space import main

    main(model, port, host)
