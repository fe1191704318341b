"""The commands that read one scan: `fmrilm ask`, `describe-scan` and `forecast`. Heavy imports wait until they run."""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DEFAULT_MODEL, AsJson, AtlasName, Device, LabelImage, Model, RepetitionTime, Scan


if TYPE_CHECKING:
    from fmrilm import ScanReader


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
    options = {"tr": tr, "atlas": atlas, "label_image": label_image}
    if choices is None and not as_json:
        with _reader(model, device) as reader:
            pieces = _begun(reader.ask(scan, question, stream=True, **options))
        return _print_pieces(pieces)
    with _reader(model, device) as reader:
        allowed = None if choices is None else [choice.strip() for choice in choices.split(",")]
        found = reader.ask(scan, question, allowed, **options)
    if as_json:
        return _print_json({"scan": str(scan), "question": question, **found})
    typer.echo(found["answer"])
    for choice, probability in found["probabilities"].items():
        typer.echo(f"{probability:7.1%}  {choice}")


def describe_scan(
    scan: Scan,
    model: Model = DEFAULT_MODEL,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Describe a scan in words."""
    options = {"tr": tr, "atlas": atlas, "label_image": label_image}
    if not as_json:
        with _reader(model, device) as reader:
            pieces = _begun(reader.describe(scan, stream=True, **options))
        return _print_pieces(pieces)
    with _reader(model, device) as reader:
        text = reader.describe(scan, **options)
    _print_json({"scan": str(scan), "description": text})


def forecast(
    scan: Scan,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the model to look ahead.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Draw the codes at this temperature; by default their mean is.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    tr: RepetitionTime = None,
    atlas: AtlasName = None,
    label_image: LabelImage = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print what follows a scan: a table (CSV) of frames by ROIs, robust z-scores of the scan."""
    with _reader(model, device) as reader:
        future = reader.forecast(scan, steps, temperature, tr=tr, atlas=atlas, label_image=label_image)
    extractor = reader.processor.feature_extractor
    rois = next(known["rois"] for known in extractor.atlases if atlas in (None, known["name"]))
    # the digits of float32
    rows = [[None if value != value else float(f"{value:.7g}") for value in row] for row in future.tolist()]
    if as_json:
        interval = extractor.repetition_time
        return _print_json({"scan": str(scan), "repetition_time": interval, "rois": rois, "signal": rows})
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(rois)
    writer.writerows(rows)


@contextmanager
def _reader(model: str, device: str | None) -> Iterator["ScanReader"]:
    """The model's reader, and a sign of life on a terminal until the work with it is done."""
    from rich.console import Console

    with Console(stderr=True).status(f"opening {model}") as status:
        from fmrilm import load

        reader = load(model, device)
        status.update("reading the scan")
        yield reader


def _begun(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces, the first of them waited for."""
    first = next(pieces, "")
    return (piece for part in ([first], pieces) for piece in part)


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))
