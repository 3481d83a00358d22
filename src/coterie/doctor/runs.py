"""A run: whether its folder, its checkpoint and its adapters are whole and fit together."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.doctor.findings import Finding, Level
from coterie.errors import CoterieError

AREA = "run"
_MOST_HEADER = 100 * 2**20


def check_run(path: Path) -> Iterator[Finding]:
    """Findings about the run in `path`."""
    from coterie.runs.directory import RunDirectory, resume_command

    try:
        run = RunDirectory.open(path)
    except CoterieError as error:
        yield Finding(AREA, "folder", Level.PROBLEM, str(error), "give the path that `coterie train` printed")
        return
    done = run.updates_done()
    facts: dict[str, Any] = {"path": str(path), "updates": done, "planned": run.config.updates}
    yield Finding(AREA, "folder", Level.OK, f"{run.name}: {done} of {run.config.updates} updates", facts=facts)
    last = run.latest_checkpoint()
    if last is None:
        text = "no checkpoint yet: it cannot be evaluated, played or resumed from where it is"
        yield Finding(AREA, "checkpoint", Level.WARNING, text, resume_command(path))
    elif problem := _damage(last / "learner.safetensors"):
        mend = f"delete {last} to go on from the checkpoint before"
        yield Finding(AREA, "checkpoint", Level.PROBLEM, f"checkpoint {last.name}: {problem}", mend)
    else:
        yield Finding(AREA, "checkpoint", Level.OK, f"checkpoint after update {int(last.name)}")
    yield from check_adapters(path / "adapters", {m.model_id: m.lora_rank for m in run.config.models})


def check_adapters(folder: Path, ranks: dict[str, int]) -> Iterator[Finding]:
    """Findings about the adapters below `folder`, made for models of these ranks."""
    bases: dict[str, list[str]] = {}
    whole = 0
    for directory in sorted(folder.glob("*/*")):
        name = f"{directory.parent.name}/{directory.name}"
        if directory.name.startswith("."):
            text = f"{name} was left behind by a process that was killed while writing"
            yield Finding(AREA, "leftover", Level.NOTE, text, f"rm -r {directory}")
            continue
        if not directory.is_dir():
            continue
        problem, base = _adapter(directory, ranks.get(directory.parent.name))
        if problem:
            mend = "train on from an earlier checkpoint, or copy the adapter again from where it is whole"
            yield Finding(AREA, "adapter", Level.PROBLEM, f"adapter {name}: {problem}", mend, {"path": str(directory)})
            continue
        whole += 1
        if base:
            bases.setdefault(base, []).append(name)
    if whole:
        yield Finding(AREA, "adapter", Level.OK, f"{whole} adapters are whole", facts={"adapters": whole})
    if len(bases) > 1:
        text = "adapters were trained on different bases: " + "; ".join(
            f"{', '.join(names[:3])} on {base}" for base, names in bases.items()
        )
        yield Finding(AREA, "bases", Level.PROBLEM, text, "keep adapters of different bases in different runs")


def _adapter(directory: Path, rank: int | None) -> tuple[str, str]:
    """(what is wrong, fingerprint of its base)."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        has = int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"adapter_config.json cannot be read ({type(error).__name__})", ""
    if problem := _damage(directory / "adapter_model.safetensors"):
        return problem, ""
    if rank is not None and has != rank:
        return f"has rank {has}, the run's config says {rank}", ""
    try:
        ours = json.loads((directory / "coterie.json").read_text(encoding="utf-8"))
        return "", str(ours["base_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""  # made elsewhere


def _damage(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size; empty: nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MOST_HEADER + 1
            if length > min(size, _MOST_HEADER):
                return f"{path.name} is no safetensors file"
            header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{path.name} is no safetensors file"
    wanted = 8 + length + max(ends, default=0)
    return "" if size == wanted else f"{path.name} has {size} bytes and should have {wanted}"
