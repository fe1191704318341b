"""The commands that read one scan: `fmrilm ask`, `describe-scan`, `forecast`, `report` and `app`."""

import csv
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DEFAULT_MODEL,
    AsJson,
    AtlasName,
    Device,
    LabelImage,
    Model,
    RepetitionTime,
    Scan,
    print_json,
)


if TYPE_CHECKING:
    from fmrilm import ScanReader


# asked by `report` unless others are given
QUESTIONS = (
    "Is the connectivity between the visual and default mode networks low, typical or high?",
    "Is the overall connectivity of the default mode network low, typical or high?",
    "Is the signal persistence of the visual network low, typical or high?",
)


def ask(
    scan: Scan,
    question: Annotated[str, typer.Argument(help="What to ask about the scan.")],
    choices: Annotated[
        str | None, typer.Option(help="Allowed answers with commas between them, such as low,typical,high.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Ask about a scan. With choices, each of them gets its probability."""
    if not question.strip():
        raise typer.BadParameter("expected a question about the scan, got an empty one")
    options = {"tr": tr, "atlas": atlas, "label_image": label_image}
    if choices is None and not as_json:
        return _print_stream(model, device, lambda reader: reader.ask(scan, question, stream=True, **options))
    with _reader(model, device) as (reader, seconds):
        allowed = None if choices is None else [choice.strip() for choice in choices.split(",")]
        found = reader.ask(scan, question, allowed, **options)
    if as_json:
        return print_json({"scan": str(scan), "question": question, **found, "seconds": seconds})
    typer.echo(found["answer"])
    for choice, probability in found["probabilities"].items():
        typer.echo(f"{probability:7.1%}  {choice}")
    typer.echo(_what_was_read(found))


def describe_scan(
    scan: Scan,
    model: Model = DEFAULT_MODEL,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Describe a scan in free text."""
    options = {"tr": tr, "atlas": atlas, "label_image": label_image}
    if not as_json:
        return _print_stream(model, device, lambda reader: reader.describe(scan, stream=True, **options))
    with _reader(model, device) as (reader, seconds):
        found = reader.ask(scan, "Describe this scan.", **options)
    print_json({"scan": str(scan), "description": found.pop("answer"), **found, "seconds": seconds})


def forecast(
    scan: Scan,
    seconds: Annotated[float, typer.Option(min=0, help="How far to look ahead.")] = 32.0,
    model: Model = DEFAULT_MODEL,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print what follows a scan: a table (CSV) of frames by ROIs, robust z-scores of the scan."""
    with _reader(model, device) as (reader, _):
        extractor = reader.processor.feature_extractor
        # read once, for its signal and for the names of its ROIs
        read = extractor.read_signal(scan, tr=tr, atlas=atlas, label_image=label_image)
        future = reader.forecast({"signal": read.signal, "tr": read.tr, "atlas": read.atlas}, seconds)
    # the digits of float32
    rows = [[None if value != value else float(f"{value:.7g}") for value in row] for row in future.tolist()]
    rois = list(read.atlas.rois)
    if as_json:
        return print_json(
            {"scan": str(scan), "repetition_time": extractor.repetition_time, "rois": rois, "signal": rows}
        )
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(rois)
    writer.writerows(rows)


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
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about one scan: signal, codes, next-code NLL, and answers with the tokens they rest on."""
    from fmrilm.processors.descriptors.text import level_answers

    from ..report.scan_report import write_scan_report

    given = None if choices is None else [choice.strip() for choice in choices.split(",")]
    asked = {text: given or level_answers(text) for text in question or QUESTIONS}
    with _reader(model, device) as (reader, _):
        write_scan_report(output, reader, scan, asked, title, tr=tr, atlas=atlas, label_image=label_image)
    if as_json:
        return print_json({"scan": str(scan), "output": str(output), "questions": list(asked)})
    typer.echo(str(output))


def app(
    model: Model = DEFAULT_MODEL,
    port: Annotated[int | None, typer.Option(help="7860 or the next free one, unless given.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve at; 0.0.0.0 serves other machines, too.")] = None,
) -> None:
    """Ask a model about scans in the browser."""
    from ..space import main

    main(model, port, host)


@contextmanager
def _reader(model: str, device: str | None) -> Iterator[tuple["ScanReader", dict[str, float]]]:
    """
    The model's reader, a sign of life on a terminal until the work with it is done, and the seconds that importing,
    loading and answering took, of which the last is known in the end.
    """
    from rich.console import Console

    with Console(stderr=True).status(f"opening {model}") as status:
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        # what is imported and loaded stays: looking for garbage in it takes a third of the time
        gc.disable()
        from fmrilm.scan_reader import load

        seconds["import"] = round(time.perf_counter() - start, 3)
        reader = load(model, device)
        seconds["load"] = round(time.perf_counter() - start - seconds["import"], 3)
        gc.freeze()
        gc.enable()
        status.update("reading the scan")
        start = time.perf_counter()
        yield reader, seconds
        seconds["answer"] = round(time.perf_counter() - start, 3)


def _what_was_read(found: dict[str, Any]) -> str:
    """A line about the windows and ROIs that an answer is about."""
    window, missing = found["window"], found["missing_rois"]
    seconds = f"{window['start']:g} to {window['stop']:g} s of {window['scan_seconds']:g} s"
    rois = f"{found['rois']} ROIs of {found['atlas']}" + (f" ({len(missing)} missing)" if missing else "")
    windows = "1 window" if window["windows"] == 1 else f"{window['windows']} windows"
    return f"read: {seconds}, {window['frames']} frames in {windows}, {rois}"


def _print_stream(model: str, device: str | None, answer: "Callable[[ScanReader], Iterator[str]]") -> None:
    """An answer in free text as it grows; the sign of life stays until its first piece."""
    with _reader(model, device) as (reader, _):
        pieces = answer(reader)
        first = next(pieces, "")
    for piece in chain([first], pieces):
        typer.echo(piece, nl=False)
    typer.echo()
