"""Real servers for the external tests, started once and shared.

    vllm            one real vLLM                       vllm_pair       two of them, restarted when a test killed one
    coterie_serve   `coterie serve` in a process of its own, with the same base
    fleet_of(…)     what an engine needs to talk to servers

Servers listen on free ports, say why when they do not start, and are killed with all their children at the end. Which
interpreter has vLLM is said by COTERIE_VLLM_PYTHON, which `make test-external` sets. Nothing is skipped but on a
processor or a platform that vLLM's CPU build does not run on.

COTERIE_EXTERNAL=serve puts `coterie serve` in vLLM's place everywhere: quick, for writing tests.
"""

from __future__ import annotations

import os
import platform
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coterie.config import BaseConfig
from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import save_adapter
from coterie.lm.base import BaseModel, load_base
from coterie.lm.embedded import resolve_base
from coterie.types import AdapterVersion
from tests.external.processes import Launch, ServerProcess, coterie_command, vllm_command

BASE = "smollm2-135m-instruct"
SERVED = "base"
"""Name of the base on every server here."""


def pytest_configure(config: pytest.Config) -> None:
    # packages tested here warn about their own dependencies
    config.addinivalue_line("filterwarnings", "default")
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "1"
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    """As Ctrl-C: servers are in sessions of their own, and would outlive tests that just end."""
    raise KeyboardInterrupt


def why_no_vllm() -> str | None:
    """Why vLLM's CPU build cannot run here; None: it can."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in ("x86_64", "aarch64"):
        return f"vLLM's CPU build runs on Linux with x86-64 or arm64; this is {platform.system()} on {machine}"
    if machine == "x86_64" and "avx2" not in Path("/proc/cpuinfo").read_text():
        return "vLLM's CPU build needs a processor with AVX2; this one has none"
    return None


@pytest.fixture(scope="session")
def base_path() -> Path:
    """The embedded base model."""
    return resolve_base(BASE)


def launch(number: int, base: Path, adapters: Path) -> Launch:
    """How the `number`-th server of `base` is started; it may read adapters below `adapters` and temporary folders."""
    if os.environ.get("COTERIE_EXTERNAL") == "serve":
        return coterie_command(str(base), SERVED, adapters, Path(tempfile.gettempdir()))
    if problem := why_no_vllm():
        pytest.skip(problem)
    python = os.environ.get("COTERIE_VLLM_PYTHON")
    if not python:
        pytest.fail("COTERIE_VLLM_PYTHON is not set; run these tests by: make test-external", pytrace=False)
    return vllm_command(python, str(base), SERVED, core=number)


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers write their logs and may read adapters from."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def _servers(base_path: Path, server_folder: Path) -> Iterator[list[ServerProcess]]:
    """Servers started so far; more are added as tests want them."""
    started: list[ServerProcess] = []
    try:
        yield started
    finally:
        for server in started:
            server.kill()


def _wanted(count: int, started: list[ServerProcess], base: Path, folder: Path) -> list[ServerProcess]:
    while len(started) < count:
        number = len(started)
        started.append(ServerProcess(f"server-{number}", launch(number, base, folder), folder))
    servers = started[:count]
    for server in servers:
        server.start()
    for server in servers:
        server.wait_until_up()
    return servers


@pytest.fixture
def vllm(_servers: list[ServerProcess], base_path: Path, server_folder: Path) -> ServerProcess:
    """A vLLM that is up."""
    return _wanted(1, _servers, base_path, server_folder)[0]


@pytest.fixture
def vllm_pair(_servers: list[ServerProcess], base_path: Path, server_folder: Path) -> list[ServerProcess]:
    """Two vLLMs that are up; tests may kill and restart them."""
    return _wanted(2, _servers, base_path, server_folder)


@pytest.fixture(scope="session")
def coterie_serve(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`coterie serve` with an API key ("secret"), in another process."""
    folder = tmp_path_factory.mktemp("coterie-serve")
    server = ServerProcess("coterie-serve", coterie_command(str(base_path), SERVED, folder, api_key="secret"), folder)
    server.start()
    try:
        server.wait_until_up()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def base_model(base_path: Path) -> BaseModel:
    """The same base in this process, in float32: the oracle."""
    return load_base(BaseConfig(model=str(base_path), threads=1, dtype="float32"))


@pytest.fixture(scope="session")
def trained(base_model: BaseModel, server_folder: Path) -> dict[AdapterVersion, Path]:
    """Two adapters that change answers: version -> its PEFT directory; `oracle` has them too."""
    import torch

    found = {}
    for number, rank in ((1, 8), (2, 16)):
        version = AdapterVersion(f"trained_{number}", 1)
        base_model.bank.add(version.model_id, rank, 2.0 * rank, seed=number)
        adapter = base_model.bank.training(version.model_id)
        noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            adapter.flat.add_(0.04 * noise)
        base_model.bank.publish(version)
        found[version] = server_folder / "adapters" / f"{version.model_id}-v{version.version}"
        save_adapter(adapter, found[version], base_model, version)
    return found


@pytest.fixture(scope="session")
def oracle(base_model: BaseModel, trained: dict[AdapterVersion, Path]) -> LocalEngine:
    """The in-process engine over the same base, with the trained adapters."""
    return LocalEngine(base_model, cache_tokens=4096)
