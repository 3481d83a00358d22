"""The machine: cores, threads, memory, what its processor multiplies fast, disk, and the base model."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.capacity import free_memory
from coterie.doctor.findings import Finding, Level
from coterie.lm.catalog import CATALOG, cache_root
from coterie.lm.native.build import Library

AREA = "machine"

NEEDED_MEMORY = 2 * 2**30
"""Bytes a run with the embedded model takes, about."""
NEEDED_DISK = 2**30
"""Bytes for the base model's download and copy, and a run's adapters."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was read of the machine; made by `read_machine`, or by hand in tests."""

    cores: int
    """This process may use."""
    all_cores: int
    quota: float | None
    """Cores' worth of time the container may use; None: no limit."""
    load: float
    """Processes that want to run, on average over the last minute."""
    memory: int | None
    """Bytes free for new processes; None where it cannot be read."""
    flags: frozenset[str]
    """Of the processor, in Linux's words; empty where they cannot be read."""
    gpu: bool
    threads: str | None
    """OMP_NUM_THREADS."""


def read_machine(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Machine:
    """Read the machine. `root`: where proc, sys and dev are."""
    everything = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else everything
    return Machine(
        cores=cores,
        all_cores=everything,
        quota=_quota(_text(root / "sys/fs/cgroup/cpu.max")),
        load=os.getloadavg()[0] if os.name == "posix" else 0.0,
        memory=free_memory(root),
        flags=_flags(_text(root / "proc/cpuinfo")),
        gpu=(root / "dev/nvidia0").exists() or (root / "dev/kfd").exists(),
        threads=environ.get("OMP_NUM_THREADS"),
    )


def check_machine(machine: Machine, dtype: str = "auto") -> Iterator[Finding]:
    """Findings about cores, threads, data types and memory; `dtype` is that of the config."""
    yield from _cores(machine)
    yield from _threads(machine)
    yield from _dtype(machine, dtype)
    if machine.memory is not None:
        facts = {"available_bytes": machine.memory}
        free = f"{machine.memory / 2**30:.1f} GiB of memory free"
        if machine.memory < NEEDED_MEMORY:
            mend = "end other programs, or lower engine.cache_tokens and learner.tokens_per_pass"
            yield Finding(AREA, "memory", Level.WARNING, f"{free}; a small run needs about 2", mend, facts)
        else:
            yield Finding(AREA, "memory", Level.OK, free, facts=facts)


def _cores(machine: Machine) -> Iterator[Finding]:
    facts = {"cores": machine.cores, "all_cores": machine.all_cores, "quota": machine.quota, "load": machine.load}
    said = f"{machine.cores} cores"
    if machine.cores < machine.all_cores:
        said += f" of {machine.all_cores}"
    if machine.quota is not None and machine.quota < machine.cores:
        mend = f"set OMP_NUM_THREADS={max(1, round(machine.quota))}, or raise the container's CPU limit"
        text = f"{said}, but the container may use the time of {machine.quota:g}: threads will wait for each other"
        yield Finding(AREA, "cores", Level.WARNING, text, mend, facts)
    elif machine.load > 1.5 * machine.cores:
        mend = "wait for other programs, or expect times several times longer"
        text = f"{said}, and {machine.load:.1f} processes want them"
        yield Finding(AREA, "cores", Level.WARNING, text, mend, facts)
    else:
        yield Finding(AREA, "cores", Level.OK, said, facts=facts)


def _threads(machine: Machine) -> Iterator[Finding]:
    if machine.threads is None:
        return
    facts = {"OMP_NUM_THREADS": machine.threads}
    if not machine.threads.isdecimal() or int(machine.threads) < 1:
        text = f"OMP_NUM_THREADS={machine.threads!r} is no number of threads"
        yield Finding(AREA, "threads", Level.WARNING, text, "unset OMP_NUM_THREADS, or set base.threads", facts)
    elif int(machine.threads) > machine.cores:
        text = f"OMP_NUM_THREADS={machine.threads} on {machine.cores} cores: threads will wait for each other"
        yield Finding(AREA, "threads", Level.WARNING, text, f"set OMP_NUM_THREADS={machine.cores} or unset it", facts)
    elif int(machine.threads) < machine.cores:
        text = f"OMP_NUM_THREADS={machine.threads}: training uses {machine.threads} of {machine.cores} cores"
        yield Finding(AREA, "threads", Level.NOTE, text, facts=facts)


def _dtype(machine: Machine, dtype: str) -> Iterator[Finding]:
    """bfloat16 is fast only where the processor multiplies it itself; elsewhere it is emulated, many times slower."""
    if machine.gpu:
        yield Finding(AREA, "dtype", Level.OK, "a GPU; the data type is chosen when the base is loaded")
        return
    if not machine.flags:
        text = f"{platform.machine()}: whether it multiplies bfloat16 is found out when the base is loaded"
        yield Finding(AREA, "dtype", Level.NOTE, text)
        return
    native = bool(machine.flags & {"avx512_bf16", "amx_bf16", "bf16"})
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if f in machine.flags), "none")
    facts = {"native_bfloat16": native, "vectors": widest}
    if dtype == "bfloat16" and not native:
        text = "base.dtype is bfloat16, which this processor only emulates, many times slower than float32"
        yield Finding(AREA, "dtype", Level.WARNING, text, 'set base.dtype = "auto" or "float32"', facts)
    elif dtype == "float32" and native:
        text = "base.dtype is float32, though this processor multiplies bfloat16 natively, about twice as fast"
        yield Finding(AREA, "dtype", Level.NOTE, text, facts=facts)
    elif widest == "none":
        text = "no AVX2: matrix work will be several times slower, and vLLM's CPU build does not run at all"
        yield Finding(AREA, "dtype", Level.WARNING, text, "use a newer processor, or servers (--url)", facts)
    else:
        kind = "bfloat16" if native else "float32"
        yield Finding(AREA, "dtype", Level.OK, f"data type {kind} ({widest})", facts=facts)


def check_kernels(state: Library) -> Iterator[Finding]:
    """Whether what stands between matrix products is compiled for this processor."""
    facts = {"path": None if state.path is None else str(state.path)}
    if state.path is not None:
        yield Finding(AREA, "kernels", Level.OK, "kernels are compiled for this processor", facts=facts)
    elif state.compiler:
        text = f"kernels will be compiled with {state.compiler} at the first run, once, in some 10 s"
        yield Finding(AREA, "kernels", Level.OK, text, facts=facts)
    else:
        text = f"no compiled kernels ({state.problem}): everything runs, but an update takes about twice as long"
        mend = "install a C++ compiler (Debian and Ubuntu: apt install g++)"
        yield Finding(AREA, "kernels", Level.NOTE, text, mend, facts)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Findings about free space where runs and base models are kept. `folder`: where runs go."""
    for check, path in (("disk_runs", folder), ("disk_models", cache_root())):
        place = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            mend = "check that the folder can be read"
            yield Finding(AREA, check, Level.WARNING, f"{place}: {error.strerror or error}", mend)
            continue
        facts = {"path": str(path), "free_bytes": free}
        said = f"{free / 2**30:.1f} GiB free in {path}"
        if not os.access(place, os.W_OK):
            mend = "choose another folder (--folder)" if check == "disk_runs" else "set COTERIE_CACHE to another folder"
            yield Finding(AREA, check, Level.PROBLEM, f"{place} cannot be written", mend, facts)
        elif free < NEEDED_DISK:
            mend = "make space, or choose another folder (--folder for runs, COTERIE_CACHE for base models)"
            yield Finding(AREA, check, Level.WARNING, f"{said}; about 1 is needed", mend, facts)
        else:
            yield Finding(AREA, check, Level.OK, said, facts=facts)


def check_base(name: str) -> Iterator[Finding]:
    """Whether the base model `name` is at hand."""
    facts = {"base": name}
    if name not in CATALOG:
        known = Path(name).expanduser().is_dir()
        text = f"base model {name}: {'a directory' if known else 'from the hub, or its cache'}"
        yield Finding(AREA, "base", Level.OK if known else Level.NOTE, text, facts=facts)
        return
    from coterie.lm.embedded import list_models

    status = next(status for status in list_models() if status.model.name == name)
    if status.cached:
        yield Finding(AREA, "base", Level.OK, f"base model {name} in {status.path}", facts=facts)
    else:
        mend = f"it is fetched at first use; to do it now: coterie models pull {name}"
        level = Level.NOTE if status.problem == "not fetched" else Level.WARNING
        yield Finding(AREA, "base", level, f"base model {name}: {status.problem}", mend, facts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _quota(text: str) -> float | None:
    """Of cgroup v2's cpu.max: "200000 100000" is 2 cores, "max 100000" no limit."""
    limit, _, period = text.strip().partition(" ")
    return int(limit) / int(period) if limit.isdecimal() and period.isdecimal() and int(period) else None


def _flags(text: str) -> frozenset[str]:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
