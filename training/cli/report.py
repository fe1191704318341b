"""The command `fmrilm report`: its options. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, AtlasName, Model, RepetitionTime, Scan


# asked unless others are given
QUESTIONS = (
    "Is connectivity between the visual and default mode networks low, typical or high?",
    "Is overall connectivity of the default mode network low, typical or high?",
    "Is signal persistence of the visual network low, typical or high?",
)


def report(
    scan: Scan,
    model: Model = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option(help="Page to write.")] = Path("scan_report.html"),
    question: Annotated[list[str] | None, typer.Option(help="What to ask; repeat for more.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Allowed answers to all questions, with commas; else known from the question.")
    ] = None,
    title: Annotated[str, typer.Option(help="What the page calls the scan; its file's name appears nowhere.")] = (
        "One scan"
    ),
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
) -> None:
    """Write a page about one scan: signal, codes, surprise, and answers with the tokens they rest on."""
    from fmrilm import load
    from fmrilm.processors.descriptors.text import level_answers

    from ..report.scan_report import write_scan_report

    given = None if choices is None else [choice.strip() for choice in choices.split(",")]
    asked = {text: given or level_answers(text) for text in question or QUESTIONS}
    write_scan_report(output, load(model), scan, asked, title, tr=tr, atlas=atlas)
    typer.echo(str(output))
