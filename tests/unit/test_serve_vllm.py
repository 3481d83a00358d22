"""Starting a real vLLM: the right interpreter, the right flags, the key kept off the command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import ConfigError
from coterie.serve import vllm
from coterie.serve.settings import ServeSettings
from coterie.serve.vllm import MODULE, PYTHON_VARIABLE, build_command, find_python, on_cpu


def command(**changes: Any) -> vllm.Command:
    """Of a plain server; settings and arguments may be changed."""
    settings = ServeSettings(model="base", **changes.pop("settings", {}))
    arguments = {"host": "127.0.0.1", "port": 8000, "max_loras": 6, "adapters": {}, **changes}
    return build_command("/opt/python", "/models/m", settings, **arguments)


def flag(made: vllm.Command, name: str) -> str:
    return made.argv[made.argv.index(name) + 1]


def test_vllm_gets_the_flags_training_needs() -> None:
    made = command()
    assert made.argv[:3] == ("/opt/python", "-m", "vllm.entrypoints.openai.api_server")
    assert (flag(made, "--model"), flag(made, "--served-model-name")) == ("/models/m", "base")
    assert (flag(made, "--host"), flag(made, "--port")) == ("127.0.0.1", "8000")
    assert "--enable-lora" in made.argv
    assert flag(made, "--max-loras") == "6"
    assert flag(made, "--logprobs-mode") == "processed_logprobs"
    assert "--enable-auto-tool-choice" in made.argv
    assert flag(made, "--tool-call-parser") == "hermes"
    assert dict(made.environment) == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert "--max-model-len" not in made.argv
    assert "--lora-modules" not in made.argv


@pytest.mark.parametrize(("wanted", "given"), [(1, "8"), (8, "8"), (9, "16"), (64, "64"), (257, "320"), (512, "512")])
def test_ranks_are_those_vllm_knows(wanted: int, given: str) -> None:
    assert flag(command(settings={"max_lora_rank": wanted}), "--max-lora-rank") == given


def test_settings_adapters_and_flags_of_ones_own() -> None:
    made = command(
        settings={"max_model_len": 2048}, adapters={"a": Path("/x/a"), "b": Path("/x/b")}, extra=["--max-loras=9"]
    )
    assert flag(made, "--max-model-len") == "2048"
    at = made.argv.index("--lora-modules")
    assert made.argv[at + 1 : at + 3] == ("a=/x/a", "b=/x/b")
    assert made.argv[-1] == "--max-loras=9"


def test_the_key_is_in_the_environment_and_never_shown() -> None:
    made = command(settings={"api_key": "s3cret"})
    assert made.environment["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in " ".join(made.argv)
    assert "s3cret" not in made.shown()
    assert made.shown().startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_API_KEY=*** /opt/python -m")


# -- interpreters -----------------------------------------------------------------------------------------------------


def interpreter(path: Path, *, has_vllm: bool = True) -> Path:
    """A script that stands for Python: it writes how it was called, and says whether it has vLLM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"if sys.argv[1] == '-c': sys.exit({0 if has_vllm else 1})\n"
        "kept = {k: v for k, v in os.environ.items() if k.startswith('VLLM')}\n"
        "print(json.dumps([sys.argv[1:], kept]))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_interpreter_that_is_named_is_used(tmp_path: Path) -> None:
    one, two = interpreter(tmp_path / "one" / "python"), interpreter(tmp_path / "two" / "python")
    assert find_python(str(one), {PYTHON_VARIABLE: str(two)}) == str(one)
    assert find_python(None, {PYTHON_VARIABLE: str(two)}) == str(two)


def test_the_interpreter_beside_the_command_vllm_is_found(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "env" / "bin" / "python")
    interpreter(tmp_path / "env" / "bin" / "vllm")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").symlink_to(tmp_path / "env" / "bin" / "vllm")
    assert find_python(None, {"PATH": str(tmp_path / "bin")}) == str(python)


@pytest.mark.parametrize(
    ("given", "said"),
    [("missing", "no such interpreter"), ("without", "it cannot import vllm"), (None, "no vLLM found")],
)
def test_where_there_is_no_vllm_it_is_said_how_to_get_one(tmp_path: Path, given: str | None, said: str) -> None:
    interpreter(tmp_path / "without", has_vllm=False)
    with pytest.raises(ConfigError, match=said):
        find_python(None if given is None else str(tmp_path / given), {"PATH": str(tmp_path)})


# -- the command ------------------------------------------------------------------------------------------------------


def serve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`coterie serve --backend vllm` in a process of its own: it becomes another program."""
    code = "import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()"
    command = [sys.executable, "-c", code, "serve", "--backend", "vllm", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def test_coterie_serve_becomes_vllm_and_says_which(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python")
    adapter = tmp_path / "leader"
    done = serve(
        tmp_path, "--vllm-python", python, "--served-name", "base", "--port", 8123, "--max-loras", 4,
        "--max-lora-rank", 16, "--adapter", f"leader={adapter}", "--api-key-env", "MY_KEY", "--vllm-arg=--seed=3",
        MY_KEY="s3cret",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    argv, environment = json.loads(last)
    assert argv == [
        "-m", MODULE, "--model", str(tmp_path), "--served-model-name", "base", "--host", "127.0.0.1", "--port", "8123",
        "--enable-lora", "--max-loras", "4", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--lora-modules", f"leader={adapter}", "--seed=3",
    ]  # fmt: skip
    assert environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": "s3cret"}
    assert said[0].startswith("starting vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_API_KEY=*** ")
    assert str(python) in said[0]
    assert "s3cret" not in "".join(said)


@pytest.mark.parametrize(("said", "cpu"), [("cpu", True), ("other", False), ("", False)])
def test_a_build_for_cpu_computes_whole_prompts(tmp_path: Path, said: str, cpu: bool) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {said}\n")
    python.chmod(0o755)
    assert on_cpu(str(python)) is cpu
    assert ("--no-enable-chunked-prefill" in command(cpu=cpu).argv) is cpu
    assert flag(command(cpu=cpu), "--max-loras") == ("12" if cpu else "6")


def test_this_interpreter_has_no_build_for_cpu() -> None:
    assert not on_cpu(sys.executable)


def test_starting_vllm_imports_no_torch() -> None:
    code = "import sys, coterie.cli.serve, coterie.serve.vllm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
