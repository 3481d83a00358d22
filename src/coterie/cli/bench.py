"""`coterie bench`: how fast a config's own run is on this machine, and what bounds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.common import check_parts, run_interruptible


def bench(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of a run.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, like base.threads=2; may be repeated."),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Updates to measure.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output, progress elsewhere.")] = False,
) -> None:
    """Measure some updates of a config: tokens a second, how near that is to what the processor can do, and where the
    time goes. Nothing is written; no run is made.

    "tokens" were sampled, or trained on; "distinct" ones had to be computed; "one by one" is what one sequence at a
    time would compute. The limit is the time the multiplications of the distinct tokens take at the rate at which
    large matrices multiply here.
    """
    from coterie.config import load_config
    from coterie.monitor.console import observer_for

    settings = load_config(config, set_ or [])
    check_parts(settings)
    observer = observer_for(sys.stderr if as_json else sys.stdout)
    try:
        observer.stage("loading")
        from coterie.bench.report import bench as measure

        report = run_interruptible(measure(settings, updates, observer))
        if not as_json:
            for table in report.tables():
                observer.table(table)
    finally:
        observer.close()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
