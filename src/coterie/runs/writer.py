"""What a run leaves on disk while it goes on: metrics and episodes of every update.

A run that goes on from a checkpoint first forgets the updates past it; they are done again. Weights and checkpoints are
`runs.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from coterie.runs.directory import RunDirectory
from coterie.runs.sinks import MetricsFile, UpdateFigures
from coterie.runs.store import Store
from coterie.types import Episode, FailedEpisode


class RunWriter:
    """Writes one run. `close` it, or its database stays open."""

    def __init__(self, run: RunDirectory, start: int) -> None:
        """`start`: updates that are done already; what the folder has of later ones is deleted."""
        self.run = run
        self._metrics = MetricsFile(run.metrics_path)
        self._store = Store(run.database_path)
        if start:
            self._metrics.truncate_after(start)
            self._store.delete_after(start)

    def keep(
        self, update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], record: UpdateFigures | None
    ) -> None:
        """Write an update; without a record when too many of its episodes failed to learn from it."""
        self._store.record(update, episodes, failed, self.run.config.run.episodes_kept)
        if record is not None:
            self._metrics.append(record)

    def close(self) -> None:
        self._store.close()
