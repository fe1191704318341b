"""The command `fmrilm convert-original`."""

from pathlib import Path
from typing import Annotated

import typer


def convert_original(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint, a .pt file.")],
    output: Annotated[Path, typer.Argument(help="New folder for the model and its processor.")],
    median: Annotated[float, typer.Option(help="Median of the data's intensities (official: medians).")],
    iqr: Annotated[float, typer.Option(help="Interquartile range of the data's intensities (official: iqrs).")],
    text_config: Annotated[str | None, typer.Option(help="Folder or Hub id of the language model.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the LoRA weights, if not in the file.")] = None,
    delimiters: Annotated[bool | None, typer.Option(help="Write <fmri> and </fmri> around a scan.")] = None,
    atlas: Annotated[Path | None, typer.Option(help="ROI table (TSV), if not Tian S3 and Schaefer-400.")] = None,
) -> None:
    """Turn an official checkpoint of the paper into a model and a processor of this package."""
    from fmrilm.processors import Atlas

    from ..hub.convert_original import convert_original as convert

    table = None if atlas is None else Atlas.from_table(atlas)
    report = convert(checkpoint, output, median, iqr, text_config, lora_alpha, delimiters, table)
    used, unused = len(report["used"]), len(report["unused"])
    typer.echo(f"{output}: layout {report['layout']}, {used} tensors used, {unused} not (conversion.json names them)")
