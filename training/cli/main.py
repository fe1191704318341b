"""
The `fmrilm` command: each of its commands is in a module of its own, which imports what is heavy when it runs.

Exit codes: 0, all went well; 1, bad input or something that failed; 2, wrong usage; 3, `prepare` left out scans that
failed; 130, interrupted.
"""

import os
import sys
from typing import Annotated

import typer

from .app import app as serve
from .ask import ask, describe_scan, forecast
from .convert import convert_original
from .demo import demo
from .describe import describe
from .errors import OneLineErrors
from .evaluate import evaluate
from .export import export
from .info import info
from .prepare import prepare
from .push import push
from .report import report
from .train import train


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bad input or failure, 2 wrong usage, 3 some scans failed (prepare), 130 stopped.",
)


@app.callback()
def fmrilm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """A language model that reads fMRI scans."""
    if not sys.stderr.isatty():
        # progress is for those who look: tqdm reads its variable, the Hub's libraries read theirs
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


READ, MAKE, SHARE = "Read a scan", "Prepare, train, measure", "Share and inspect"
app.command(rich_help_panel=READ)(ask)
app.command("describe-scan", rich_help_panel=READ)(describe_scan)
app.command(rich_help_panel=READ)(forecast)
app.command(rich_help_panel=READ)(report)
app.command("app", rich_help_panel=READ)(serve)
app.command(rich_help_panel=MAKE)(demo)
app.command(rich_help_panel=MAKE)(prepare)
app.command(rich_help_panel=MAKE)(describe)
app.add_typer(train, name="train", rich_help_panel=MAKE)
app.command(rich_help_panel=MAKE)(evaluate)
app.command(rich_help_panel=SHARE)(push)
app.command(rich_help_panel=SHARE)(export)
app.command("convert-original", rich_help_panel=SHARE)(convert_original)
app.command(rich_help_panel=SHARE)(info)


def main() -> None:
    app()
