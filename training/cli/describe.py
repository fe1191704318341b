"""The command `fmrilm describe`: its options, and what it says. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.splits import HELD_OUT_SHARE
from .options import Backend, Jobs, Scheduler, ShardSize, check_backend


def describe(
    dataset: Annotated[str, typer.Argument(help="Folder of a dataset of scans (as `prepare` writes it), or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder of the corpus: a new one; a stopped run goes on.")],
    cohort: Annotated[
        Path | None, typer.Option(help="Folder of a fitted cohort; by default, one of the training subjects.")
    ] = None,
    atlas: Annotated[list[Path] | None, typer.Option(help="Table (.tsv) of an atlas that is not packaged.")] = None,
    test_share: Annotated[
        float, typer.Option(help="Share of the subjects to hold out, beside those of the dataset's own test split.")
    ] = HELD_OUT_SHARE,
    statements: Annotated[int, typer.Option(min=1, help="Statements per family in a description.")] = 6,
    questions: Annotated[int, typer.Option(min=0, help="Questions about a scan.")] = 6,
    min_margin: Annotated[float, typer.Option(min=0, help="Leave out nearer ties, in SD of the cohort.")] = 0.0,
    rewrite: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Word the descriptions anew with this language model, checked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the wording and the questions.")] = 0,
    jobs: Jobs = 1,
    backend: Backend = "local",
    scheduler: Scheduler = None,
    shard_size: ShardSize = 64,
) -> None:
    """Turn a dataset of scans into a corpus: descriptors, descriptions and questions, split by subject."""
    check_backend(backend, scheduler)

    from fmrilm.processors import Atlas
    from fmrilm.processors.descriptors.cohort import Cohort

    from ..corpus.describe import CorpusSettings, describe_dataset
    from ..corpus.source import load_source

    atlases = {known.name: known for known in map(Atlas.from_table, atlas or [])}
    outcome = describe_dataset(
        load_source(dataset, atlases),
        output,
        CorpusSettings(test_share, statements, questions, min_margin, rewrite, shard_size, seed),
        None if cohort is None else Cohort.load(cohort),
        jobs,
        scheduler,
    )
    for scan, reason in outcome.left_out.items():
        typer.echo(f"left out scan {scan}: {reason}", err=True)
    if outcome.rejection_rate is not None:
        typer.echo(f"{outcome.rejection_rate:.0%} of the rewrites were refused, their template text kept")
    typer.echo(f"{outcome.scans} scans described, {len(outcome.left_out)} left out: {output}")
