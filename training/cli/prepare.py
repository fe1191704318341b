"""The command `fmrilm prepare`: its options, and what it says. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Backend, Jobs, Scheduler, ShardSize, check_backend


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
    jobs: Jobs = 1,
    backend: Backend = "local",
    scheduler: Scheduler = None,
    shard_size: ShardSize = 64,
) -> None:
    """Turn scans into a dataset (Parquet) that `datasets.load_dataset` and training read; resumes where it stopped."""
    check_backend(backend, scheduler)

    from ..data.prepare import FAILURES, Preparation
    from ..data.prepare import prepare as run
    from ..data.scan_sources import find_scans

    outcome = run(
        find_scans(source, labels, space),
        output,
        atlas,
        Preparation(tr, label_image and label_image.absolute(), confounds, high_pass, low_pass),
        jobs,
        scheduler,
        shard_size,
    )
    typer.echo(f"{outcome.prepared} scans prepared, {outcome.skipped} done before, {outcome.failed} failed: {output}")
    if outcome.failed:
        typer.echo(f"why they failed is in {output / FAILURES}; the same command tries them again", err=True)
        raise typer.Exit(SOME_FAILED)
