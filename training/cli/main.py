"""
The `fmrilm` command. Its commands import what is heavy when they run.

Exit codes: 0, all went well; 1, bad input or something that failed; 2, wrong usage; 3, `prepare` left out scans that
failed; 130, interrupted.
"""

import atexit
import os
import sys
import warnings
from typing import Annotated

import typer

from .make import demo, describe, evaluate, prepare, train
from .options import OneLineErrors, let_threads_sleep
from .read import app as serve
from .read import ask, describe_scan, forecast, report
from .share import convert_original, export, info, push


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bad input or failure, 2 wrong usage, 3 some scans failed (prepare), 130 stopped.",
)


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fmri-lm {version('fmri-lm')}")
        raise typer.Exit


@app.callback()
def fmrilm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A language model that reads fMRI scans."""
    # peft asks transformers by an older name, which is no concern of a user
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    if not sys.stderr.isatty():
        # progress is for those who look: tqdm reads its variable, the Hub's libraries read theirs
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


READ, MAKE, SHARE = "Read a scan", "Prepare, train, measure", "Share and inspect"
for panel, commands in {
    READ: {"ask": ask, "describe-scan": describe_scan, "forecast": forecast, "report": report, "app": serve},
    MAKE: {"demo": demo, "prepare": prepare, "describe": describe, "evaluate": evaluate},
    SHARE: {"push": push, "export": export, "convert-original": convert_original, "info": info},
}.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(train, name="train", rich_help_panel=MAKE)


def main() -> None:
    let_threads_sleep()
    # the first that is registered runs last
    status: list[int] = []
    atexit.register(leave, status)
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            status.append(ended.code)
        raise


def leave(status: list[int]) -> None:
    """End the process with its status, if it has one: to take a model apart first costs a fifth of a second."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])
