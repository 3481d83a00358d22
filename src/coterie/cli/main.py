"""The command `coterie`: one file per verb, and one way for errors to come out.

Nothing heavy is imported here: `--help` and mistakes in a config answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coterie.cli.bench import bench
from coterie.cli.check import check
from coterie.cli.common import say, say_error
from coterie.cli.doctor import doctor
from coterie.cli.eval import evaluate
from coterie.cli.init import init
from coterie.cli.models import app as models
from coterie.cli.play import play
from coterie.cli.serve import serve
from coterie.cli.train import train
from coterie.errors import CoterieError


class Commands(TyperGroup):
    """Turns an error Coterie raises on purpose into one line and its exit code; any other is a bug, with its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CoterieError as error:
            say_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            say("\ninterrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="coterie",
    cls=Commands,
    help="Co-train several LoRA policies of one language model in one shared environment.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("play")(play)
app.command("init")(init)
app.command("check")(check)
app.command("serve")(serve)
app.command("bench")(bench)
app.command("doctor")(doctor)
app.add_typer(models, name="models")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # late: it costs more than all else `--help` needs of ours

        typer.echo(f"coterie {version('coterie')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the console script."""
    app()
