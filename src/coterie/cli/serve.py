"""`coterie serve`: a base model and adapters behind vLLM's HTTP API.

The in-process engine serves, or a real vLLM is started in its own environment with the flags that training needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.cli.common import say
from coterie.errors import ConfigError

if TYPE_CHECKING:
    from coterie.serve.settings import ServeSettings

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Base model: a name of `coterie models list`, a directory or a hub id."),
    ] = "smollm2-135m-instruct",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    served_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the base is called in requests.", show_default="MODEL")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIRECTORY", help="Serve this PEFT adapter; may be repeated.")
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIRECTORY", help="Adapters may be loaded over HTTP from here; may be repeated."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the key clients must send.")
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Serve an address other machines reach without asking for a key.")
    ] = False,
    backend: Annotated[
        Literal["local", "vllm"], typer.Option(help="The in-process engine, or a real vLLM in its own environment.")
    ] = "local",
    max_adapters: Annotated[int, typer.Option(min=1, help="Adapters held at once.")] = 64,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="Largest rank of an adapter.")] = 64,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer.", show_default="the model's")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one answer.", show_default="as many as fit")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Answers made at once; beyond it: 503.")] = 256,
    cache_tokens: Annotated[int, typer.Option(min=256, help="Tokens of key/value cache.")] = 16384,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Layers that adapters adapt; may be repeated.", show_default="all linear"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the base weights.")] = "auto",
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds running requests get when the server is stopped.")
    ] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Of requests without one.", show_default="from the system")] = None,
    vllm_python: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="Interpreter that has vLLM.", show_default="found")
    ] = None,
    max_loras: Annotated[
        int, typer.Option(min=1, help="vLLM: adapters active at once; policies x (staleness + 2) is enough.")
    ] = 8,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="One more flag for vLLM, as --flag=value; may be repeated.")
    ] = None,
) -> None:
    """Serve a base model and adapters through vLLM's HTTP API."""
    if host not in _LOOPBACK and api_key_env is None and not no_api_key:
        raise ConfigError(
            f"--host {host} lets other machines in; name the variable with a key by --api-key-env, "
            "or say --no-api-key if a network you trust is all that reaches it"
        )
    if backend == "local" and (vllm_python or vllm_arg):
        raise ConfigError("--vllm-python and --vllm-arg belong to --backend vllm")
    adapters = _adapters(adapter or [])
    for directory in adapter_dir or []:
        if not directory.is_dir():
            raise ConfigError(f"--adapter-dir {directory}: no such directory; make it first")
    from coterie.serve.settings import ServeSettings

    settings = ServeSettings(
        model=served_name or model,
        root=model,
        api_key=_api_key(api_key_env),
        adapter_dirs=tuple(adapter_dir or ()),
        max_adapters=max_adapters,
        max_lora_rank=max_lora_rank,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        seed=seed,
    )
    if backend == "vllm":
        _become_vllm(model, settings, host, port, adapters, vllm_python, max_loras, vllm_arg or [])
        return
    import asyncio

    from coterie.config import BaseConfig, EngineConfig
    from coterie.serve.run import load_engine
    from coterie.serve.run import serve as run

    base = BaseConfig(model=model, device=device, dtype=dtype)
    if lora_target:
        base = base.model_copy(update={"lora_targets": tuple(lora_target)})
    say(f"loading {model}")
    engine, path = load_engine(base, EngineConfig(cache_tokens=cache_tokens))
    settings = settings.model_copy(update={"root": str(path)})
    asyncio.run(run(engine, settings, host=host, port=port, adapters=adapters, drain_s=drain, say=_say_now))


def _say_now(text: str) -> None:
    """A line that is seen at once, also by whoever reads a pipe; a server outlives the terminal it was started from."""
    import sys

    from coterie.monitor.lasting import LastingStream
    from coterie.monitor.tables import clean

    print(clean(text), file=LastingStream(sys.stdout), flush=True)


def _adapters(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for item in given:
        name, separator, path = item.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"--adapter {item!r}: write it as NAME=DIRECTORY, for example leader=runs/one/leader")
        if name in found:
            raise ConfigError(f"--adapter {name!r} is given twice; names must differ")
        found[name] = Path(path)
    return found


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"--api-key-env {variable}: this environment variable is not set")
    return key


def _become_vllm(
    model: str,
    settings: ServeSettings,
    host: str,
    port: int,
    adapters: dict[str, Path],
    python: str | None,
    max_loras: int,
    extra: list[str],
) -> None:
    from coterie.lm.catalog import CATALOG
    from coterie.serve.vllm import become, build_command, find_python, on_cpu

    interpreter = find_python(python)
    if model in CATALOG:
        from coterie.lm.embedded import resolve_base

        model = str(resolve_base(model))
    if settings.adapter_dirs:
        say("note: vLLM itself does not hold adapters to --adapter-dir; keep its port to yourself")
    command = build_command(
        interpreter,
        model,
        settings,
        host=host,
        port=port,
        max_loras=max_loras,
        adapters=adapters,
        cpu=on_cpu(interpreter),
        extra=extra,
    )
    become(command, say=say)
