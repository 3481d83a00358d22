"""What a run leaves on disk while it trains: metrics and episodes of every update, and all it needs to go on.

A run that goes on from a checkpoint first forgets the updates past it; they are done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coterie.lm.adapters import save_adapter
from coterie.lm.base import BaseModel
from coterie.runs.checkpoint import Checkpoint, save_checkpoint
from coterie.runs.directory import RunDirectory
from coterie.runs.sinks import MetricsFile, UpdateFigures
from coterie.runs.state import Parts
from coterie.runs.store import Store
from coterie.training.learner import Learner
from coterie.types import Episode, FailedEpisode


class RunWriter:
    """Writes one run. `close` it, or its database stays open."""

    def __init__(self, run: RunDirectory, parts: Parts, base: BaseModel, learner: Learner, start: int) -> None:
        """`start`: updates that are done already; what the folder has of later ones is deleted."""
        self.run, self.parts, self.base, self.learner = run, parts, base, learner
        self._metrics = MetricsFile(run.metrics_path)
        self._store = Store(run.database_path)
        if start:
            self._metrics.truncate_after(start)
            self._store.delete_after(start)

    def keep(
        self, update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], record: UpdateFigures | None
    ) -> None:
        """Write an update; without a record when too many of its episodes failed to learn from it."""
        self._store.record(update, episodes, failed, self.parts.config.run.episodes_kept)
        if record is not None:
            self._metrics.append(record)

    def save(self, update: int) -> Path:
        """Write every model's adapter and a checkpoint after `update`; returns the checkpoint's folder."""
        for model in self.parts.models.values():
            directory = self.run.adapter_dir(model.adapter)
            if not directory.exists():
                save_adapter(self.base.bank.training(model.model_id), directory, self.base, model.adapter)
            model.adapter_dir = directory
        state = {"base_fingerprint": self.base.fingerprint, **self.parts.state()}
        return save_checkpoint(self.run, Checkpoint(update, self.learner.state(), state))

    def close(self) -> None:
        self._store.close()
