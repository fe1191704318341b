"""Options that several `fmrilm` commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer


DEFAULT_MODEL = "runs/demo/model"
MODEL_VARIABLE = "FMRILM_MODEL"

# work over many scans
Jobs = Annotated[int, typer.Option(help="Processes on this machine; -1 for one per core.")]
Backend = Annotated[Literal["local", "dask"], typer.Option(help="Where to work.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of the Dask scheduler.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Scans per Parquet file.")]

# one scan and the model that reads it
Scan = Annotated[
    Path,
    typer.Argument(exists=True, dir_okay=False, help="File of a scan: NIfTI, CIFTI, GIFTI, MGZ, .npy, .csv or .tsv."),
]
Model = Annotated[
    str, typer.Option(envvar=MODEL_VARIABLE, help="Folder of a model and its processor, or their id on the Hub.")
]
RepetitionTime = Annotated[float | None, typer.Option(help="Seconds between two frames, if the file does not say.")]
AtlasName = Annotated[str | None, typer.Option(help="Atlas of the scan's ROIs, if the model knows several.")]
LabelImage = Annotated[
    Path | None, typer.Option(exists=True, help="Parcels of the atlas in the space of the scan, for images.")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator, if any.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def check_backend(backend: str, scheduler: str | None) -> None:
    """Wrong usage, if one of the two is given without the other."""
    if (backend == "dask") != (scheduler is not None):
        raise typer.BadParameter("--backend dask and --scheduler go together")
