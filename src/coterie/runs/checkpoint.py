"""Everything a run needs to go on as if it had never stopped.

A checkpoint holds the adapters' weights and optimizer moments bit by bit, the update number, every model's version and
counters, and the states of mode, credit scheme and calibration. Random numbers need no state: each depends only on the
seed and on where it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import RunFolderError
from coterie.runs.directory import RunDirectory
from coterie.runs.sinks import write_atomically
from coterie.runs.state import Parts
from coterie.training.policies import TrainedPolicies


@dataclass(frozen=True, slots=True)
class Checkpoint:
    update: int
    tensors: Mapping[str, Tensor]
    """Of the learner."""
    state: Mapping[str, Any]
    """JSON values: "models", "lora_targets", "lora_layers", "mode", "credit", "calibration", "base_fingerprint"."""


class RunSaver:
    """Saves a run that trains."""

    def __init__(self, run: RunDirectory, parts: Parts, policies: TrainedPolicies) -> None:
        self.run, self.parts, self.policies = run, parts, policies

    def save(self, update: int) -> Path:
        """Write every model's adapter and a checkpoint after `update`; returns the checkpoint's folder."""
        for model in self.parts.models.values():
            directory = self.run.adapter_dir(model.adapter)
            if not directory.exists():
                self.policies.save(model.adapter, directory)
            model.adapter_dir = directory
        state = {"base_fingerprint": self.policies.base.fingerprint, **self.parts.state()}
        return save_checkpoint(self.run, Checkpoint(update, self.policies.learner.state(), state))


def save_checkpoint(run: RunDirectory, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; it counts once its last file is there. Writing the same update again replaces it.

    Raises:
        RunFolderError: the disk refuses; there is then no checkpoint of this update.
    """
    folder = run.checkpoint_dir(checkpoint.update)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        save_file(tensors, folder / "learner.safetensors")
        write_atomically(folder / "state.json", json.dumps({"update": checkpoint.update, **checkpoint.state}))
        return run.complete_checkpoint(checkpoint.update)
    except (OSError, SafetensorError, RunFolderError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RunFolderError):  # names the file
            raise
        raise RunFolderError(
            f"cannot write checkpoint {folder}: {error}; make room or choose another folder"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Raises `RunFolderError` when a file of the checkpoint is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(int(state.pop("update")), load_file(folder / "learner.safetensors"), state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunFolderError(
            f"checkpoint {folder} is damaged: {error}; delete that folder to go on from the one before"
        ) from error
