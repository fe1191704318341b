"""What the `fmrilm` commands share: options, JSON, and how a command ends when something is wrong."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


DEFAULT_MODEL = "runs/demo/model"
MODEL_VARIABLE = "FMRILM_MODEL"

# work over many scans
Jobs = Annotated[int, typer.Option(help="Processes on this machine; -1 for one per core.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of the Dask scheduler.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Scans per Parquet file.")]

# subjects that are held out, as in every program; the default is that of `data.splits`, which imports scikit-learn
HELD_OUT_SHARE = 0.2
HeldOutShare = Annotated[
    float, typer.Option(help="Share of the subjects that are held out, by a hash of their names.")
]
Splits = Annotated[
    str | None, typer.Option(metavar="FILE", help="Table of subject and split (train, test), in place of the hash.")
]
LeaveOut = Annotated[
    str | None, typer.Option(metavar="COLUMN=VALUE", help="Hold out the subjects with this value instead of the hash.")
]

# one scan and the model that reads it
Scan = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help="File of a scan: NIfTI, CIFTI, GIFTI, MGZ, .npy, .csv, .tsv or .1D."
    ),
]
Model = Annotated[
    str, typer.Option(envvar=MODEL_VARIABLE, help="Folder of a model and its processor, or their id on the Hub.")
]


def existing_folder(folder: Path | None) -> Path | None:
    """Wrong usage where there is no such folder of a model, with the way to get one."""
    if folder is not None and not folder.is_dir():
        made = f"`fmrilm demo` makes a model in {DEFAULT_MODEL}"
        raise typer.BadParameter(f"expected the folder of a model, got {folder}, which is none: {made}")
    return folder


ModelFolder = Annotated[
    Path, typer.Argument(callback=existing_folder, help="Folder of a model or adapter and its processor.")
]
RepetitionTime = Annotated[float | None, typer.Option(help="Seconds between two frames, if the file does not say.")]
AtlasName = Annotated[
    str | None, typer.Option(help="Atlas of the scan's ROIs, if the model knows several: a name, or a table (.tsv).")
]
LabelImage = Annotated[
    Path | None, typer.Option(exists=True, help="Parcels of the atlas in the space of the scan, for images.")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator, if any.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


# what tells OpenMP's runtimes how a thread waits for the others
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """
    Threads that wait for others sleep, where the user has set nothing: beside another busy process, threads that spin
    keep the one they wait for from running. To be called before torch is imported; subprocesses inherit it.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, allow_nan=False, default=str))


class OneLineErrors(TyperGroup):
    """
    Errors of the commands are one line and a hint on standard error, with exit code 1; `--debug` (an option of the
    group) lets them through. Wrong usage (code 2) and interruptions (code 130) are left to typer.
    """

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            # what this package says is written to be read; what libraries say may take many lines
            lines = str(error).strip() if isinstance(error, ValueError) else " ".join(str(error).split())
            typer.echo(f"error: {lines or type(error).__name__}", err=True)
            typer.echo(f"hint: {_hint(error, str(ctx.info_name), str(ctx.invoked_subcommand))}", err=True)
            raise typer.Exit(1) from error


def _hint(error: Exception, program: str, command: str) -> str:
    if isinstance(error, ImportError):
        return f"{command} needs all of: pip install 'fmri-lm[{'space' if command == 'app' else 'train'}]'"
    shown = f"`{program} --debug {command} ...` shows where it happened"
    expected = f"`{program} {command} --help` describes what is expected; "
    return expected + shown if isinstance(error, ValueError | OSError) else shown
