"""What was measured, kept small: one JSON file per claim, written by `claims.py`, read by `write_docs.py`.

    {"claim": "signaling", "config": "configs/signaling.toml", "digest": "…", "runs": [run, …]}

A run is told apart by its variant ("" where a claim has only one) and its seed; measuring it again replaces it. The
digest is of the config's content and of whatever was changed by ``--set``: a file never mixes runs of different
configs, and `write_docs.py` can tell whether its numbers are those of the config as it is now.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeping import replace_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

CONFIGS = {
    "tasks": "configs/tasks-cooperative.toml",
    "signaling": "configs/signaling.toml",
    "prisoners_dilemma": "configs/prisoners-dilemma.toml",
}
"""Claim -> the shipped config it is about, relative to the repository."""

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ClaimFile:
    """All runs of one claim."""

    claim: str
    config: str
    digest: str
    runs: tuple[Run, ...] = ()

    def find(self, variant: str, seed: int) -> Run | None:
        """The run of this variant and seed, if there is one."""
        return next((run for run in self.runs if (run["variant"], run["seed"]) == (variant, seed)), None)

    def merged(self, run: Run) -> ClaimFile:
        """With `run` added, or put in the place of the one it repeats; runs stay sorted by variant and seed."""
        others = [r for r in self.runs if (r["variant"], r["seed"]) != (run["variant"], run["seed"])]
        runs = sorted([*others, run], key=lambda r: (r["variant"], r["seed"]))
        return ClaimFile(self.claim, self.config, self.digest, tuple(runs))


def digest(config: Path, changes: Sequence[str] = ()) -> str:
    """Tells configs apart by what they say; comments and the order of keys do not count."""
    content = {"config": tomllib.loads(config.read_text(encoding="utf-8")), "changes": list(changes)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> ClaimFile | None:
    """A claim's file; None when there is none yet.

    Raises:
        ValueError: the file is not one of these.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return ClaimFile(data["claim"], data["config"], data["digest"], tuple(data["runs"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of results ({error!r}); delete it and measure again") from error


def write(path: Path, found: ClaimFile) -> None:
    """Replace `path` as a whole."""
    data = {"claim": found.claim, "config": found.config, "digest": found.digest, "runs": list(found.runs)}
    replace_file(path, _text(data))


def _text(data: object) -> str:
    """JSON with one key a line and every list of numbers in one line, so that changes can be read."""
    spread = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\s+([-+.\deEnul,\s]+?)\s+\]", lambda m: "[" + re.sub(r",\s+", ", ", m[1]) + "]", spread)
    return (text if json.loads(text) == data else spread) + "\n"
