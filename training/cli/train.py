"""The commands `fmrilm train codec`, `align` and `sft`: the three stages, as their programs run them."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer


train = typer.Typer(no_args_is_help=True, help="Train one of the three stages.")

Config = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="Settings of the run (.yaml), such as training/configs/*.")
]
# what stands on the command line beside --config is an option of the program, and it is the program that knows it
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}
USAGE = "--config FILE [OVERRIDES]..."


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def codec(ctx: typer.Context, config: Config) -> None:
    """Stage 1: a codec, which turns scans into codes. Overrides: `python -m fmrilm.training.codec.program --help`."""
    _run("codec", config, ctx.args)


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def align(ctx: typer.Context, config: Config) -> None:
    """Stage 2: a language model learns to read and predict codes. Overrides: `... alignment_program --help`."""
    _run("alignment", config, ctx.args)


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def sft(ctx: typer.Context, config: Config) -> None:
    """Stage 3: it learns to answer questions. Overrides: `python -m fmrilm.training.sft.program --help`."""
    _run("sft", config, ctx.args)


def _run(stage: str, config: Path, overrides: list[str]) -> None:
    import_module(f"fmrilm.training.{stage}.program").main(["--config", str(config), *overrides])
