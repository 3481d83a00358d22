"""`coterie doctor`: what is wrong here, and how to mend it. Exit code 1 when something will not work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.common import say
from coterie.errors import ConfigError

if TYPE_CHECKING:
    from coterie.config import RunConfig
    from coterie.doctor.findings import Finding
    from coterie.inference.wire import ServerSpec


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Check what this config uses.", show_default=False)
    ] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="URL", help="Check this server; may be repeated.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Check a run and its adapters.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the key for --url.")
    ] = None,
    imports: Annotated[bool, typer.Option("--imports", help="Also import the large packages (slow).")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a server may take for an answer.")] = 20.0,
    json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Check machine, packages, servers and a run, and say how to mend what is wrong."""
    from coterie.doctor.findings import Level, as_json, as_lines, worst

    findings = list(_here(_settings(config, run)))
    servers, adapters = _servers(config, url or [], api_key_env)
    if servers:
        import asyncio

        from coterie.doctor.servers import check_servers

        findings += asyncio.run(check_servers(servers, adapters=adapters, timeout_s=timeout))
    if imports:
        from coterie.doctor.packages import check_imports

        findings += check_imports()
    if run is not None:
        from coterie.doctor.runs import check_run

        findings += check_run(run)
    if json:
        from json import dumps

        typer.echo(dumps(as_json(findings), indent=2))
    else:
        for line in as_lines(findings):
            say(line)
    if worst(findings) is Level.PROBLEM:
        raise typer.Exit(1)


def _settings(config: Path | None, run: Path | None) -> RunConfig | None:
    """The config that is checked, if one was named: a mistake in it is told as everywhere."""
    if config is None and run is None:
        return None
    from coterie.config import load_config

    if config is not None:
        return load_config(config)
    assert run is not None
    named = run / "config.toml"
    return load_config(named) if named.is_file() else None


def _here(config: RunConfig | None) -> list[Finding]:
    from coterie.doctor.machine import check_base, check_disk, check_kernels, check_machine, read_machine
    from coterie.doctor.packages import check_packages, check_shadows, check_torch_build
    from coterie.lm.native.build import state

    machine = read_machine()
    base, dtype, folder = "smollm2-135m-instruct", "auto", Path("runs")
    if config is not None:
        base, dtype = config.base.model, config.base.dtype
        folder = config.run.folder or folder
    return [
        *check_machine(machine, dtype),
        *check_kernels(state()),
        *check_disk(folder),
        *check_base(base),
        *check_packages(),
        *check_torch_build(machine.gpu),
        *check_shadows(Path.cwd()),
    ]


def _servers(config: Path | None, urls: list[str], api_key_env: str | None) -> tuple[list[ServerSpec], int]:
    """Servers of the command line and of the config, and how many adapter versions the config uses at once."""
    if not urls and config is None:
        return [], 0
    from coterie.inference.wire import server_spec

    servers = [server_spec(url, _key(api_key_env)) for url in urls]
    if config is None:
        return servers, 0
    from coterie.config import load_config

    settings = load_config(config)
    for server in settings.inference.servers:
        spec = server_spec(server.url, _key(server.api_key_env), server.paths)
        if spec.name not in [known.name for known in servers]:
            servers.append(spec)
    return servers, len(settings.models) * (settings.inference.staleness + 2)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"environment variable {variable} is not set; it should hold the server's API key")
    return key
