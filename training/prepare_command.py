"""The command `fmrilm prepare`: its options, and what it says. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer


SOME_FAILED = 3


def prepare(
    source: Annotated[
        Path, typer.Argument(help="Manifest (.csv, .tsv), fMRIPrep or BIDS derivatives folder, or folder of scans.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the dataset: a new one, or one to go on with.")],
    atlas: Annotated[str | None, typer.Option(help="Packaged atlas, or a table (.tsv) of ROIs.")] = None,
    label_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Parcels of the atlas as an image, for volumes.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Table (.csv, .tsv) of labels by subject, or by subject and session.")
    ] = None,
    confounds: Annotated[
        Literal["simple", "scrubbing", "compcor"] | None,
        typer.Option(help="Regress out fMRIPrep's confounds by this strategy of nilearn."),
    ] = None,
    high_pass: Annotated[float | None, typer.Option(help="Remove slower fluctuations, Hz.")] = None,
    low_pass: Annotated[float | None, typer.Option(help="Remove faster fluctuations, Hz.")] = None,
    tr: Annotated[float | None, typer.Option(help="Repetition time, s, where the manifest tells none.")] = None,
    space: Annotated[str, typer.Option(help="Template space to take of a derivatives folder.")] = "MNI*",
    jobs: Annotated[int, typer.Option(help="Processes on this machine; -1 for one per core.")] = 1,
    backend: Annotated[Literal["local", "dask"], typer.Option(help="Where to work.")] = "local",
    scheduler: Annotated[str | None, typer.Option(help="Address of the Dask scheduler.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Scans per Parquet file.")] = 64,
) -> None:
    """Turn scans into a dataset (Parquet) that `datasets.load_dataset` and training read; resumes where it stopped."""
    if (backend == "dask") != (scheduler is not None):
        raise typer.BadParameter("--backend dask and --scheduler go together")

    from .prepare import FAILURES, Preparation
    from .prepare import prepare as run
    from .scan_sources import find_scans

    try:
        outcome = run(
            find_scans(source, labels, space),
            output,
            atlas,
            Preparation(tr, label_image and label_image.absolute(), confounds, high_pass, low_pass),
            jobs,
            scheduler,
            shard_size,
        )
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{outcome.prepared} scans prepared, {outcome.skipped} done before, {outcome.failed} failed: {output}")
    if outcome.failed:
        typer.echo(f"why they failed is in {output / FAILURES}; the same command tries them again", err=True)
        raise typer.Exit(SOME_FAILED)
