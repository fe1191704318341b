"""The commands that make a model: `fmrilm demo`, `prepare`, `describe`, `train ...` and `evaluate`."""

import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    HELD_OUT_SHARE,
    AsJson,
    HeldOutShare,
    Jobs,
    LeaveOut,
    ModelFolder,
    Scheduler,
    ShardSize,
    Splits,
    print_json,
)


SOME_FAILED = 3


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, results.json and report.html.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="The same chain in about a minute; learns nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the texts, the three trainings and the evaluation.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train all three stages on real scans out of Python packages, and ask about held-out subjects."""
    from ..demo import run_demo

    if as_json:
        # progress is printed, too
        with redirect_stdout(sys.stderr):
            results = run_demo(output, quick, seed)
        return print_json({"output": str(output), **results})
    run_demo(output, quick, seed)
    typer.echo(f"\nmodel, results.json and report.html are in {output}")


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
    tr: Annotated[float | None, typer.Option(help="Repetition time (s) where the manifest has none.")] = None,
    space: Annotated[str, typer.Option(help="Template space to take of a derivatives folder.")] = "MNI*",
    max_missing_rois: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of its ROIs that a scan may lack; above it, it fails.")
    ] = 0.2,
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    shard_size: ShardSize = 64,
    as_json: AsJson = False,
) -> None:
    """Turn scans into a dataset (Parquet) that `datasets.load_dataset` and training read; resumes where it stopped."""
    from ..data.prepare import FAILURES, Preparation
    from ..data.prepare import prepare as run
    from ..data.scan_sources import find_scans

    outcome = run(
        find_scans(source, labels, space, atlas),
        output,
        atlas,
        Preparation(tr, label_image and label_image.absolute(), confounds, high_pass, low_pass, max_missing_rois),
        jobs,
        scheduler,
        shard_size,
    )
    if as_json:
        counts = {name: getattr(outcome, name) for name in ("prepared", "skipped", "failed", "dropped")}
        print_json({"output": str(output), **counts})
    else:
        done = f"{outcome.prepared} scans prepared, {outcome.skipped} done before, {outcome.failed} failed"
        if outcome.dropped:
            done += f"; {outcome.dropped} that were there are not among these scans, or have changed, and went"
        typer.echo(f"{done}: {output}")
    if outcome.failed:
        typer.echo(f"why they failed is in {output / FAILURES}; the same command tries them again", err=True)
        raise typer.Exit(SOME_FAILED)


def describe(
    dataset: Annotated[str, typer.Argument(help="Folder of a dataset of scans (as `prepare` writes it), or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder of the corpus: a new one; a stopped run goes on.")],
    cohort: Annotated[
        Path | None, typer.Option(help="Folder of a fitted cohort; by default, one of the training subjects.")
    ] = None,
    atlas: Annotated[list[Path] | None, typer.Option(help="Table (.tsv) of an atlas that is not packaged.")] = None,
    held_out_share: HeldOutShare = HELD_OUT_SHARE,
    splits: Splits = None,
    leave_out: LeaveOut = None,
    statements: Annotated[int, typer.Option(min=1, help="Statements per family in a description.")] = 6,
    questions: Annotated[int, typer.Option(min=0, help="Questions about a scan.")] = 6,
    rewrite: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Word the descriptions anew with this language model, checked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the wording and the questions.")] = 0,
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    shard_size: ShardSize = 64,
    as_json: AsJson = False,
) -> None:
    """Turn a dataset of scans into a corpus: descriptors, descriptions and questions, split by subject."""
    from fmrilm.processors import Atlas
    from fmrilm.processors.descriptors.cohort import Cohort

    from ..corpus.describe import CorpusSettings, describe_dataset
    from ..corpus.source import load_source
    from ..data.splits import SplitArguments

    split = SplitArguments(held_out_share, splits, leave_out)
    atlases = {known.name: known for known in map(Atlas.from_table, atlas or [])}
    outcome = describe_dataset(
        load_source(dataset, atlases),
        output,
        CorpusSettings(split, statements, questions, rewrite, shard_size, seed),
        None if cohort is None else Cohort.load(cohort),
        jobs,
        scheduler,
    )
    if as_json:
        return print_json({"output": str(output), "scans": outcome.scans, "left_out": outcome.left_out})
    for scan, reason in outcome.left_out.items():
        typer.echo(f"left out scan {scan}: {reason}", err=True)
    if outcome.rejection_rate is not None:
        typer.echo(f"{outcome.rejection_rate:.0%} of the rewrites were refused, their template text kept")
    typer.echo(f"{outcome.scans} scans described, {len(outcome.left_out)} left out: {output}")


def evaluate(
    model: ModelFolder,
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `fmrilm prepare` wrote.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Packaged task, or a YAML file of one's own; may be given several times.")
    ] = None,
    descriptors: Annotated[
        bool, typer.Option("--descriptors", help="Ask about descriptors of the scans, and for free descriptions.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for results.json, results.csv and results.png; goes on where it was stopped.")
    ] = Path("runs/evaluation"),
    column: Annotated[
        list[str] | None, typer.Option(help="Column of the task's labels, or TASK=COLUMN where there are several.")
    ] = None,
    held_out_share: HeldOutShare = HELD_OUT_SHARE,
    splits: Splits = None,
    leave_out: Annotated[
        str | None,
        typer.Option(help="COLUMN=VALUE that the model was trained without; or COLUMN, each value in turn."),
    ] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="Of a cross-validation over new subjects.")] = None,
    new_subjects: Annotated[
        bool, typer.Option("--new-subjects", help="The model was trained on no subject of DATA: all may be tested.")
    ] = False,
    shots: Annotated[
        str, typer.Option(help="Labelled subjects of each class to learn from, by comma: 0, numbers, full.")
    ] = "0",
    conditions: Annotated[
        str | None,
        typer.Option(
            help="By comma: zero-shot, few-shot (scans in the prompt), tuned, probe, majority, covariates, fc_ridge, "
            "tangent_ridge, codes_ridge; by default zero-shot and the baselines, and with shots also tuned."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of so many subjects of each class.")] = 10,
    steps: Annotated[int, typer.Option(min=0, help="Steps of tuning; 0: what is in closed form.")] = 60,
    rank: Annotated[int, typer.Option(min=0, help="Rank of LoRA; 0 tunes the whole language model.")] = 8,
    seed: Annotated[int, typer.Option(help="Of folds, resamples and tuning.")] = 0,
    card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Model card (README.md) to enter the results in.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about held-out subjects, beside baselines and the subject-shuffled control."""
    from ..data.splits import SplitArguments
    from ..evaluation.program import BASELINES, EvaluationSettings
    from ..evaluation.program import evaluate as run
    from ..evaluation.report import add_to_card, table
    from ..evaluation.tuning import Tuning

    counts = tuple(int(count) if count.isdigit() else count for count in shots.replace(" ", "").split(","))
    default = ("zero-shot", *(["tuned"] if counts != (0,) else []), *BASELINES)
    settings = EvaluationSettings(
        shots=counts,
        resamples=resamples,
        conditions=default if conditions is None else tuple(conditions.replace(" ", "").split(",")),
        tuning=Tuning(steps=steps, rank=rank or None),
        seed=seed,
    )
    split = SplitArguments(held_out_share, splits, leave_out)
    results = run(
        model,
        data,
        output,
        task or (),
        descriptors,
        split=split,
        folds=folds,
        new_subjects=new_subjects,
        columns=column or (),
        settings=settings,
    )
    if card is not None:
        add_to_card(card, results)
    if as_json:
        return print_json(results)
    shown = table(results)
    shown = shown.loc[shown.comparison.isin(["right", "shuffled"]) & (shown.variant != "uncalibrated")]
    columns = ["task", "condition", "shots", "variant", "comparison", "metric", "value", "low", "high"]
    typer.echo(shown.loc[:, columns].to_string(index=False, float_format="%.3f", na_rep="-"))
    for name, found in results["tasks"].items():
        for site, reason in found["sites_of_one_class"].items():
            typer.echo(f"{name}: site {site} is left out of the AUC within sites, {reason}")
    typer.echo(f"\nresults.json, results.csv and results.png are in {output}")


train = typer.Typer(no_args_is_help=True, help="Train one of the three stages, or all of them.")

Config = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="Settings of the run (.yaml), such as training/configs/*.")
]
# what stands on the command line beside --config is an option of the program, and it is the program that knows it
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}
USAGE = "--config FILE [OVERRIDES]..."


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def codec(ctx: typer.Context, config: Config) -> None:
    """Stage 1: a codec, which encodes scans as discrete tokens. `python -m fmrilm.training.codec.program --help`."""
    _run("codec", config, ctx.args)


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def align(ctx: typer.Context, config: Config) -> None:
    """Stage 2: a language model learns to read and predict codes. `... fmrilm.training.alignment.program --help`."""
    _run("alignment", config, ctx.args)


@train.command(context_settings=FORWARDED, options_metavar=USAGE)
def sft(ctx: typer.Context, config: Config) -> None:
    """Stage 3: it learns to answer questions. `python -m fmrilm.training.sft.program --help` lists overrides."""
    _run("sft", config, ctx.args)


@train.command(context_settings=FORWARDED, options_metavar="--data FOLDER... --tasks TASK... [OPTIONS]...")
def release(ctx: typer.Context) -> None:
    """All stages by the release recipe, for hundreds of subjects. `python -m fmrilm.training.release --help`."""
    from ..release import main

    main(ctx.args)


def _run(stage: str, config: Path, overrides: list[str]) -> None:
    import_module(f"fmrilm.training.{stage}.program").main(["--config", str(config), *overrides])
