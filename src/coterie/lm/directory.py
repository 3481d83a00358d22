"""What a directory must hold to be a base model: a config, safetensors weights, and a tokenizer.

Looked at before anything is loaded, so that a wrong directory fails at once and with a reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coterie.errors import BaseModelError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model_directory(path: Path) -> None:
    """Raise `BaseModelError` naming everything that keeps `path` from being a base model."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = _read(path / "adapter_config.json").get("base_model_name_or_path")
        raise BaseModelError(
            f"{path} is a LoRA adapter, not a base model; its base is {base!r}: set base.model to that"
        )
    problems = []
    if not (path / "config.json").is_file():
        problems.append("no config.json")
    elif "model_type" not in _read(path / "config.json"):
        problems.append("config.json names no model_type")
    problems += _weight_problems(path)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        problems.append(f"no tokenizer ({', '.join(_TOKENIZERS)})")
    if problems:
        raise BaseModelError(
            f"{path} is not a base model: {'; '.join(problems)}. "
            f"It must be a directory as `model.save_pretrained` and `tokenizer.save_pretrained` write it"
        )


def _weight_problems(path: Path) -> list[str]:
    if (path / "model.safetensors").is_file():
        return []
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = _read(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            return [f"{index.name} lists no weights"]
        missing = sorted({str(shard) for shard in shards.values() if not (path / str(shard)).is_file()})
        return [f"{index.name} lists {missing[0]}, which is missing ({len(missing)} in all)"] if missing else []
    if any(path.glob("pytorch_model*.bin")):
        return ["weights are pickled (pytorch_model*.bin), which can run code: save them again as safetensors"]
    if any(path.glob("*.gguf")):
        return ["weights are GGUF: load them in transformers and save them as safetensors"]
    return ["no weights (model.safetensors)"]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} cannot be read as JSON: {error}; fetch or write it again") from error
    if not isinstance(data, dict):
        raise BaseModelError(f"{file} must hold a JSON object; fetch or write it again")
    return data
