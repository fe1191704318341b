"""The command `fmrilm evaluate`: its options, and what it says. Heavy imports wait until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.splits import HELD_OUT_SHARE


def evaluate(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a model and its processor.")],
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `fmrilm prepare` wrote.")],
    task: Annotated[str, typer.Option(help="Packaged task, or a YAML file of one's own.")],
    output: Annotated[
        Path, typer.Option(help="Folder for results.json, results.csv and plots; goes on where it was stopped.")
    ] = Path("runs/evaluation"),
    shots: Annotated[
        str, typer.Option(help="Labelled subjects of each class to learn from, by comma: 0, numbers, full.")
    ] = "0,full",
    methods: Annotated[
        str,
        typer.Option(help="By comma: zero-shot, tuned, context (scans in the prompt), probe, connectivity, majority."),
    ] = "zero-shot,tuned,connectivity,majority",
    draws: Annotated[int, typer.Option(min=1, help="Draws of so many subjects.")] = 3,
    new_people: Annotated[
        bool,
        typer.Option(
            "--new-people",
            help="The model was trained on nobody in DATA: test anyone, not those alone whom no program trains on.",
        ),
    ] = False,
    folds: Annotated[int | None, typer.Option(min=2, help="Of a cross-validation over new people.")] = None,
    test_share: Annotated[float, typer.Option(help="Share of the subjects that are tested on.")] = HELD_OUT_SHARE,
    open_ended: Annotated[bool, typer.Option("--open-ended", help="Answers in words in place of choices.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of tuning, at most.")] = 60,
    rank: Annotated[int, typer.Option(min=0, help="Rank of LoRA; 0 tunes the whole language model.")] = 8,
    seed: Annotated[int, typer.Option(help="Of splits, draws and tuning.")] = 0,
    card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Model card (README.md) to enter the results in.")
    ] = None,
) -> None:
    """Ask a model about unseen subjects, beside baselines and other people's scans."""
    from ..evaluation.adapt import Tuning
    from ..evaluation.program import Protocol
    from ..evaluation.program import evaluate as run
    from ..evaluation.report import add_to_card, table

    protocol = Protocol(
        shots=tuple(int(count) if count.isdigit() else count for count in shots.replace(" ", "").split(",")),
        draws=draws,
        methods=tuple(methods.replace(" ", "").split(",")),
        new_people=new_people,
        folds=folds,
        test_share=test_share,
        open_ended=open_ended,
        tuning=Tuning(steps=steps, rank=rank or None),
        seed=seed,
    )
    results = run(model, data, task, output, protocol)
    if card is not None:
        add_to_card(card, results)
    shown = table(results)
    shown = shown.loc[shown.reading.isin(["right", "swapped"]) & (shown.variant == "")]
    columns = ["method", "shots", "reading", "metric", "value", "low", "high", "parse_failures"]
    typer.echo(shown.loc[:, columns].to_string(index=False, float_format="%.3f", na_rep="-"))
    typer.echo(f"\nresults.json, results.csv and plots are in {output}")
