"""How every `fmrilm` command ends when something is wrong."""

import typer
from typer.core import TyperGroup


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
            typer.echo(f"hint: {_hint(error, f'{ctx.info_name} {ctx.invoked_subcommand}')}", err=True)
            raise typer.Exit(1) from error


def _hint(error: Exception, command: str) -> str:
    if isinstance(error, ImportError):
        return "the commands need all of: pip install 'fmri-lm[train]'"
    program, subcommand = command.split(" ", 1)
    shown = f"`{program} --debug {subcommand} ...` shows where it happened"
    return f"`{command} --help` tells what is expected; {shown}" if isinstance(error, ValueError | OSError) else shown
