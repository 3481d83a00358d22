"""Without torch: everything that can be done is done, what cannot be says so, and no weight moves.

Each process here sees this environment's packages but torch, transformers and what needs them. One test refuses their
import instead, as a broken installation does.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coterie.config import parse_config
from coterie.inference.fake import FakeServer, HubTokenizer
from coterie.runs.directory import toml_text
from tests.support.scripts import ROOT
from tests.support.torchless import MAIN, command, environment, python, without

BANNER = "SIMULATED RESPONSES, NOTHING IS TRAINED"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without(tmp_path_factory.mktemp("packages"))


def write_config(folder: Path, base: Path | str, **more: Any) -> Path:
    settings = {
        "updates": 2,
        "models": [{"model_id": "a"}, {"model_id": "b"}],
        "base": {"model": str(base)},
        "scenario": {"id": "matrix", "options": {"game": "stag_hunt"}},
        "rollout": {"tasks_per_update": 2, "group_size": 4},
        "evaluation": {"tasks": 2},
        **more,
    }
    path = folder / "config.toml"
    path.write_text(toml_text(parse_config(settings)), encoding="utf-8")
    return path


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tiers(run: Path) -> set[str]:
    """Of every turn that was kept."""
    with closing(sqlite3.connect(run / "episodes.sqlite")) as database:
        return {tier for (tier,) in database.execute("select tier from calls")}


def test_the_packages_are_gone(packages: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec; from importlib.metadata import version\n"
        "print(find_spec('torch'), find_spec('transformers'), find_spec('tokenizers') is not None, version('numpy'))"
    )
    done = python(packages, code, cwd=tmp_path)
    assert done.stdout.startswith("None None True "), done.stderr


def test_help_and_doctor_answer(packages: Path, tmp_path: Path) -> None:
    helped = python(packages, MAIN, "--help", cwd=tmp_path)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "train" in helped.stdout
    checked = python(packages, MAIN, "doctor", "--json", cwd=tmp_path)
    assert checked.returncode == 1, checked.stderr
    (torch,) = [f for f in json.loads(checked.stdout)["findings"] if f["check"] == "torch"]
    assert torch["level"] == "problem"
    assert "nothing can be trained" in torch["message"]
    assert torch["mend"] == "pip install torch"


def test_training_plays_on_simulated_answers_and_cannot_be_mistaken_for_training(
    packages: Path, tiny_path: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, tiny_path), tmp_path / "run"
    done = python(packages, MAIN, "train", config, "--folder", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    framed = [at for at, line in enumerate(lines) if line.startswith(BANNER)]
    assert len(framed) == 2  # before and after
    assert all(set(lines[at - 1]) == {"!"} for at in framed)
    assert "pip install torch transformers" in " ".join(lines)
    assert all("SIMULATED 100%" in line for line in lines if line.startswith("update "))
    assert "measure it again" not in done.stdout
    assert [r["metrics"]["episodes/simulated_share"] for r in records(run)] == [1.0, 1.0]
    assert all(r["metrics"]["learn/a/grad_norm"] == 0.0 == r["metrics"]["learn/a/tokens"] for r in records(run))
    for folder in ("adapters", "checkpoints", "results"):
        assert not any((run / folder).rglob("*"))
    assert tiers(run) == {"simulated"}
    assert json.loads((run / "run.json").read_text())["versions"]["torch"] is None

    again = python(packages, MAIN, "eval", run, cwd=tmp_path)
    assert again.returncode == 5
    assert "no checkpoint" in again.stderr


ENVIRONMENT = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())

from coterie import ModelConfig, MultiModelEnvironment
env = MultiModelEnvironment(training_mode="cooperative")
for name in ("a", "b", "c"):
    env.add_model(ModelConfig(model_id=name))
records = env.run_training_cycle(2)
env.add_model(ModelConfig(model_id="late"))
env.remove_model("late")
stats = env.get_environment_stats()
try:
    env.base
except Exception as error:
    stats["base_error"] = f"{type(error).__name__}: {error}"
stats["shares"] = [record.metrics["episodes/simulated_share"] for record in records]
print(json.dumps(stats, default=str))
"""


def test_a_library_user_is_told_by_the_log_and_by_the_figures(tmp_path: Path) -> None:
    """The packages are there and refuse to be imported, and the base was never fetched."""
    (tmp_path / "packages").mkdir()
    everything = without(tmp_path / "packages", ())
    done = python(everything, ENVIRONMENT, cwd=tmp_path, COTERIE_CACHE=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert BANNER in done.stderr
    assert "tokenizer of bytes" in done.stderr
    stats = json.loads(done.stdout)
    assert stats["untrained"].startswith(BANNER)
    assert stats["tiers"] == {"simulated": "up"}
    assert stats["shares"] == [1.0, 1.0]
    assert stats["base_error"].startswith("BaseModelError: SIMULATED")
    assert {(m["adapter"][-2:], m["weight_updates"]) for m in stats["models"].values()} == {("v0", 0)}


def test_the_demo_runs_and_says_that_nothing_was_trained(packages: Path, tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    demo = ROOT / "demo" / "multi_model_single_env_simple.py"
    done = python(packages, code, demo, "--cycles", 2, cwd=tmp_path, COTERIE_CACHE=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"!!! {BANNER}") == done.stdout.count("(nothing was trained: see !!! above)") == 4
    rows = [found[0].split() for found in re.finditer(r"^(leader|rival|red_1) .*$", done.stdout, re.MULTILINE)]
    assert len(rows) == 4
    assert all(row[-2:] == ["0", f"{row[0]}@v0"] for row in rows)  # columns "updates" and "adapter"


def test_with_a_server_turns_are_real_and_nothing_is_trained(packages: Path, tiny_path: Path, tmp_path: Path) -> None:
    tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(tiny_path))

    async def play() -> tuple[int, str, str]:
        async with FakeServer(tokenizer=tokenizer, seed=3) as server:
            inference = {"servers": [{"url": server.url}], "tiers": ["http", "local", "simulated"]}
            config = write_config(tmp_path, tiny_path, inference=inference)
            process = await asyncio.create_subprocess_exec(
                *command(MAIN, "train", config, "--folder", tmp_path / "run"),
                env=environment(packages), cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, err = await asyncio.wait_for(process.communicate(), 120)
            assert server.answered > 0
            assert server.loaded == {}
            assert process.returncode is not None
            return process.returncode, out.decode(), err.decode()

    code, out, err = asyncio.run(play())
    assert code == 0, err
    said = " ".join(out.split())
    assert "NOTHING IS TRAINED: torch and transformers cannot be imported" in said
    assert "SIMULATED" not in said
    assert all("episodes/simulated_share" not in r["metrics"] for r in records(tmp_path / "run"))
    assert records(tmp_path / "run")[-1]["metrics"]["calls/http/success_rate"] == 1.0
    assert tiers(tmp_path / "run") == {"http"}


def test_what_cannot_be_done_says_what_is_missing(packages: Path, tiny_path: Path, tmp_path: Path) -> None:
    served = python(packages, MAIN, "serve", tiny_path, "--port", "0", cwd=tmp_path)
    assert served.returncode == 3
    assert "serving a model from this process (without --backend vllm) needs torch and transformers" in served.stderr

    config = write_config(tmp_path, "smollm2-135m-instruct", inference={"servers": [{"url": "http://127.0.0.1:9"}]})
    asked = python(packages, MAIN, "train", config, cwd=tmp_path, COTERIE_CACHE=str(tmp_path / "empty"))
    assert asked.returncode == 3
    assert "set base.model to a directory with its tokenizer.json" in asked.stderr
    pulled = python(
        packages, MAIN, "models", "pull", "smollm2-135m-instruct", cwd=tmp_path, COTERIE_CACHE=str(tmp_path)
    )
    assert pulled.returncode == 3
    assert "converting base model" in pulled.stderr

    config = write_config(tmp_path, tiny_path, inference={"tiers": ["http", "local"]})
    refused = python(packages, MAIN, "train", config, cwd=tmp_path)
    assert refused.returncode == 2
    assert "none of them can answer here" in refused.stderr
    assert tomllib.loads(config.read_text(encoding="utf-8"))["inference"]["tiers"] == ["http", "local"]


def test_a_trained_run_cannot_go_on(packages: Path, tiny_path: Path, tmp_path: Path) -> None:
    from coterie.environment import MultiModelEnvironment
    from coterie.runs.directory import RunDirectory

    config = parse_config(tomllib.loads(write_config(tmp_path, tiny_path, evaluation={"tasks": 0}).read_text()))

    async def train() -> None:
        env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
        assert (await env.train()).untrained == ""
        assert env.get_environment_stats()["untrained"] == ""
        await env.aclose()

    asyncio.run(train())
    for verb in (["train", "--resume"], ["eval"]):
        done = python(packages, MAIN, *verb, tmp_path / "run", cwd=tmp_path)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "whose checkpoint holds weights, needs torch and transformers" in done.stderr
