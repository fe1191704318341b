"""The command `fmrilm evaluate`: its options, and what it prints. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a model and its processor.")],
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
    splits: Annotated[
        str | None, typer.Option(help="CSV of subject and split (train, test), as the model was trained with.")
    ] = None,
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
    steps: Annotated[int, typer.Option(min=1, help="Steps of tuning, at most.")] = 60,
    rank: Annotated[int, typer.Option(min=0, help="Rank of LoRA; 0 tunes the whole language model.")] = 8,
    seed: Annotated[int, typer.Option(help="Of folds, resamples and tuning.")] = 0,
    card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Model card (README.md) to enter the results in.")
    ] = None,
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
    split = SplitArguments(splits=splits, leave_out=leave_out)
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
    shown = table(results)
    shown = shown.loc[shown.comparison.isin(["right", "shuffled"]) & (shown.variant != "uncalibrated")]
    columns = ["task", "condition", "shots", "variant", "comparison", "metric", "value", "low", "high"]
    typer.echo(shown.loc[:, columns].to_string(index=False, float_format="%.3f", na_rep="-"))
    for name, found in results["tasks"].items():
        for site, reason in found["sites_of_one_class"].items():
            typer.echo(f"{name}: site {site} is left out of the AUC within sites, {reason}")
    typer.echo(f"\nresults.json, results.csv and results.png are in {output}")
