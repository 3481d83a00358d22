"""`coterie eval`: measure a trained run on held-out tasks against its bare and its calibrated base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.common import and_close, open_trained, run_interruptible, say


def evaluate(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.", show_default=False)],
    tasks: Annotated[int | None, typer.Option(min=1, help="Held-out tasks.", show_default="the run's, or 100")] = None,
) -> None:
    """Measure a trained run on held-out tasks.

    The table has the bare base, the calibrated base and the trained models.
    """
    run = open_trained(run_path)
    from coterie.monitor.console import observer_for

    with run.lock():
        observer = observer_for(sys.stdout)
        try:
            observer.stage("loading")
            from coterie.environment import MultiModelEnvironment

            environment = MultiModelEnvironment.resume(run, observer)
            table = run_interruptible(
                and_close(environment, environment.evaluate(tasks or run.config.evaluation.tasks or 100))
            )
            observer.table(table)
        finally:
            observer.close()
        run.write_results("eval", table.as_dict())
    say(f"\nkept in {run.path / 'results' / 'eval.json'}")
