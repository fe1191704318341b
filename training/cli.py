"""The `fmrilm` command."""

from pathlib import Path
from typing import Annotated

import typer

from .describe_command import describe
from .evaluate_command import evaluate
from .prepare_command import prepare


app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def fmrilm() -> None:
    """A language model that reads fMRI scans."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, results.json and report.html.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="The same chain in about a minute; learns nothing.")] = False,
) -> None:
    """Train all three stages on real scans out of Python packages, and question people the model never saw."""
    # imported here, so that --help answers at once
    from .demo import run_demo

    try:
        run_demo(output, quick)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"\nmodel, results.json and report.html are in {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Saved model or adapter with its processor.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    branch: Annotated[str, typer.Option("--revision", help="Branch to commit to.")] = "main",
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
    card_data: Annotated[Path | None, typer.Option(help="results.json to fill the card from.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list what would go, upload nothing.")] = False,
) -> None:
    """Check a folder to the last file, then upload it to the Hub in one commit."""
    from huggingface_hub.errors import HfHubHTTPError

    from .publish import push as push_folder

    try:
        commit, sizes = push_folder(folder, repo, private, branch, message, card_data, dry_run)
    except (ValueError, HfHubHTTPError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, size in sizes.items():
        typer.echo(f"{size:>12,} bytes  {name}")
    typer.echo("nothing was uploaded" if commit is None else f"{repo} is at commit {commit}")


@app.command("convert-original")
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
    from fmrilm import Atlas

    from .convert_original import convert_original as convert

    try:
        table = None if atlas is None else Atlas.from_table(atlas)
        report = convert(checkpoint, output, median, iqr, text_config, lora_alpha, delimiters, table)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    used, unused = len(report["used"]), len(report["unused"])
    typer.echo(f"{output}: layout {report['layout']}, {used} tensors used, {unused} not (conversion.json names them)")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a model and its processor.")],
    output: Annotated[Path, typer.Argument(help="New folder for the language model as a plain checkpoint.")],
    scan: Annotated[Path | None, typer.Option(help="Scan to write as prompt embeddings, too.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the scan.")] = None,
    tr: Annotated[float | None, typer.Option(help="Seconds between two frames of the scan.")] = None,
) -> None:
    """Write the language model and a scan's prompt for servers that do not know fMRI, such as vLLM."""
    from .export import export as write

    try:
        difference = write(model, output, scan, question, tr)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(str(output))
    if difference:
        typer.echo(
            f"a causal server moves {difference['total_variation']:.0%} of the next word's probability; the likeliest "
            f"word {'stays' if difference['same_word'] else 'changes'}"
        )


app.command()(prepare)
app.command()(describe)
app.command()(evaluate)


def main() -> None:
    app()
