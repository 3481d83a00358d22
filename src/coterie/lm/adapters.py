"""Adapters on disk, in PEFT's format, so that PEFT and vLLM load what Coterie trains."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coterie.errors import AdapterError
from coterie.lm.adapter import Adapter
from coterie.lm.base import BaseModel
from coterie.types import AdapterVersion

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_OURS = "coterie.json"


def save_adapter(adapter: Adapter, directory: Path, base: BaseModel, version: AdapterVersion) -> None:
    """Write one adapter version as a PEFT directory; written aside and renamed, so it is whole or absent.

    Raises:
        AdapterError: the directory exists (versions are immutable), or the disk refuses.
    """
    if directory.exists():
        raise AdapterError(f"adapter directory {directory} exists already; versions are never overwritten")
    try:
        _write_adapter(adapter, directory, base, version)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot write adapter {directory}: {error}; make room or choose another folder") from error


def _write_adapter(adapter: Adapter, directory: Path, base: BaseModel, version: AdapterVersion) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
    try:
        tensors = {}
        for shape in adapter.shapes:
            tensors[f"{_PREFIX}{shape.name}.lora_A.weight"] = shape.a(adapter.flat, adapter.rank).cpu().clone()
            tensors[f"{_PREFIX}{shape.name}.lora_B.weight"] = shape.b(adapter.flat, adapter.rank).cpu().clone()
        save_file(tensors, aside / _WEIGHTS, metadata={"format": "pt"})
        layers = list(base.bank.layers)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path),
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted(base.bank.targets),
            "layers_to_transform": layers if len(layers) < base.layers else None,
        }
        (aside / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        ours = {"model_id": version.model_id, "version": version.version, "base_fingerprint": base.fingerprint}
        (aside / _OURS).write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load_adapter(directory: Path, base: BaseModel) -> Adapter:
    """Read a PEFT LoRA directory as a frozen adapter for this base. Only safetensors are read.

    Raises:
        AdapterError: unreadable, not plain LoRA, made for another base, or of other layers or shapes.
    """
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{directory} is not a PEFT LoRA adapter ({_CONFIG}: {error}); give the directory that holds it"
        ) from error
    for key, plain in (("peft_type", "LORA"), ("use_dora", False), ("use_rslora", False), ("bias", "none")):
        if config.get(key, plain) != plain:
            raise AdapterError(f"adapter {directory}: {key}={config[key]!r} is not supported; only plain LoRA is")
    _check_base(directory, base)
    adapter = base.bank.empty(rank, alpha)
    wanted = {
        f"{_PREFIX}{shape.name}.lora_{letter}.weight": view(adapter.flat, rank)
        for shape in adapter.shapes
        for letter, view in (("A", shape.a), ("B", shape.b))
    }
    try:
        with safe_open(directory / _WEIGHTS, framework="pt") as file:
            present = set(file.keys())
            if present != set(wanted):
                odd = sorted(present ^ set(wanted))[0]
                side = "lacks" if odd in wanted else "has, but this run does not adapt,"
                raise AdapterError(
                    f"adapter {directory} {side} {odd!r}; base.lora_targets and base.lora_layers must be as in its run"
                )
            for name, target in wanted.items():
                tensor = file.get_tensor(name)
                if tensor.shape != target.shape:
                    raise AdapterError(
                        f"adapter {directory} is of another base: {name} is {tuple(tensor.shape)}, "
                        f"this base needs {tuple(target.shape)}"
                    )
                with torch.no_grad():
                    target.copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {directory}: cannot read {_WEIGHTS}: {error}") from error
    return adapter


def restore_adapter(adapter: Adapter, directory: Path, base: BaseModel, version: AdapterVersion) -> None:
    """Fill an adapter in training with a saved version of its own model.

    Raises:
        AdapterError: as `load_adapter`; or the directory holds another version, or another rank or alpha.
    """
    ours = _ours(directory)
    if ours is not None and AdapterVersion(ours["model_id"], ours["version"]) != version:
        raise AdapterError(f"{directory} holds {ours['model_id']}@v{ours['version']}, not {version.name}")
    saved = load_adapter(directory, base)
    if (saved.rank, saved.alpha) != (adapter.rank, adapter.alpha):
        raise AdapterError(
            f"adapter {directory} has rank {saved.rank} and alpha {saved.alpha:g}, but model {version.model_id!r} has "
            f"lora_rank {adapter.rank} and lora_alpha {adapter.alpha:g}; they must be the same"
        )
    with torch.no_grad():
        adapter.flat.copy_(saved.flat)
    adapter.touch()


def _ours(directory: Path) -> dict[str, Any] | None:
    """What Coterie wrote beside an adapter of its own: model_id, version, base_fingerprint."""
    path = directory / _OURS
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("model_id", "version", "base_fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"adapter {directory}: {_OURS} is damaged: {error}") from error


def _check_base(directory: Path, base: BaseModel) -> None:
    ours = _ours(directory)
    if ours is None:
        return
    fingerprint = ours["base_fingerprint"]
    if fingerprint != base.fingerprint:
        raise AdapterError(
            f"adapter {directory} was trained on another base (fingerprint {fingerprint}, "
            f"this base {base.path} has {base.fingerprint}); load the base it was trained on"
        )
