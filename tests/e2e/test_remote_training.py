"""Training while the turns come from servers: weights move, versions are published, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.monitor.console import Silent
from coterie.monitor.metrics import UpdateRecord
from coterie.runs.directory import RunDirectory
from coterie.types import Episode, Tier
from tests.support.served import MAIN, served

PAIR = [{"model_id": "a", "lora_rank": 4, "learning_rate": 5e-4}, {"model_id": "b", "learning_rate": 5e-4}]


@pytest.fixture
def settings(tiny_path: Path) -> Callable[..., RunConfig]:
    def make(urls: Sequence[str], updates: int = 6, **inference: Any) -> RunConfig:
        return parse_config(
            {
                "updates": updates,
                "models": PAIR,
                "base": {"model": str(tiny_path), "threads": 1, "dtype": "float32"},  # as `served` has it
                # in one round, calibrated choices are exactly even: their entropy has no slope, and where advantages
                # happen to cancel nothing is learned; what is shown after a round makes prompts that differ
                "scenario": {"id": "matrix", "options": {"game": "matching_pennies", "rounds": 2}},
                "mode": "competitive",
                "rollout": {"tasks_per_update": 3, "group_size": 6},
                "learner": {"entropy_bonus": 0.05},
                "evaluation": {"tasks": 0},
                "inference": {
                    "servers": [{"url": url} for url in urls], "tiers": ["http", "local"], "poll_every_s": 0.2,
                    **inference,
                },
            }
        )  # fmt: skip

    return make


class Watch(Silent):
    """Keeps what happened, and does something after some update."""

    def __init__(self, after: dict[int, Callable[[], None]] | None = None) -> None:
        self.after = after or {}
        self.notes: list[str] = []
        self.records: list[UpdateRecord] = []

    def update(self, record: UpdateRecord) -> None:
        self.records.append(record)
        self.after.get(record.update, lambda: None)()

    def note(self, text: str) -> None:
        self.notes.append(text)


def train(config: RunConfig, path: Path, watch: Watch) -> tuple[MultiModelEnvironment, list[Episode]]:
    """Train the whole config; returns the environment, closed, and every episode that was trained on."""
    run = RunDirectory.create(path, config)

    async def go() -> tuple[MultiModelEnvironment, list[Episode]]:
        env = MultiModelEnvironment.from_config(config, run_dir=run, observer=watch)
        played: list[Episode] = []
        loop = env._ready()
        keep = loop.keep
        assert keep is not None

        def kept(update: int, episodes: Sequence[Episode], failed: Any, record: UpdateRecord | None) -> None:
            assert not failed
            played.extend(episodes)
            keep(update, episodes, failed, record)

        loop.keep = kept
        summary = await env.train()
        assert summary.completed
        await env.aclose()
        return env, played

    return asyncio.run(go())


def turns(episodes: Sequence[Episode]) -> list[Any]:
    return [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_run_on_a_server_trains_what_the_server_said(
    settings: Callable[..., RunConfig], tiny_path: Path, tmp_path: Path, staleness: int
) -> None:
    watch = Watch()
    with served(tiny_path, tmp_path) as (_, url):
        env, episodes = train(settings([url], staleness=staleness), tmp_path / "run", watch)
    said = turns(episodes)
    assert {turn.tier for turn in said} == {Tier.HTTP}
    assert len(episodes) == 6 * 18
    for model in env.models.values():
        assert model.version == model.weight_updates == 6
        assert env.base.bank.training(model.model_id).b[env.base.bank.sizes[0][0]].any()
    # an episode of update n was sampled by the version of n - 1, or by one at most `staleness` older
    for e in episodes:
        for turn in turns([e]):
            lag = e.update - 1 - turn.adapter.version
            assert 0 <= lag <= staleness
            assert lag == min(staleness, e.update - 1)
    for record in watch.records:
        for model_id in ("a", "b"):
            if record.metrics[f"learn/{model_id}/learning_rate"] and not staleness:
                assert record.metrics[f"learn/{model_id}/mismatch"] < 1e-3
    assert any(record.metrics[f"learn/{m}/max_ratio"] > 1.0 + 1e-6 for record in watch.records for m in "ab") or (
        not staleness
    )
    assert watch.records[-1].metrics["calls/http/success_rate"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "calls.jsonl").read_text().splitlines()]
    assert {line["tier"] for line in lines} == {"http"}
    assert not (tmp_path / "run" / "published").exists()  # nothing is left behind


def test_a_command_leaves_no_adapter_on_the_server_and_says_nothing_of_connections(
    settings: Callable[..., RunConfig], tiny_path: Path, tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path / "run", settings([], updates=0))  # for its folder alone
    with served(tiny_path, tmp_path) as (_, url):
        config = tmp_path / "config.toml"
        written = (run.path / "config.toml").read_text()
        config.write_text(written.replace("servers = []", f'servers = [{{url = "{url}"}}]'))
        trained = tmp_path / "trained"
        commands = {
            "train": [
                "train",
                str(config),
                "--folder",
                str(trained),
                "--set",
                "updates=2",
                "--set",
                "evaluation.every=1",
            ],
            "resume": ["train", "--resume", str(trained)],
            "eval": ["eval", str(trained), "--tasks", "2"],
            "play": ["play", str(trained)],
        }
        for name, arguments in commands.items():
            done = subprocess.run(
                [sys.executable, "-c", MAIN, *arguments],
                input="1\n1\n", capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, (name, done.stdout, done.stderr)
            assert "inference by tier http" in done.stdout, name
            assert done.stderr == "", name
            with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
                assert len(json.load(answer)["data"]) == 1, name
            assert not (trained / "published").exists(), name


def test_the_same_run_in_process_and_on_a_server_learns_the_same(
    settings: Callable[..., RunConfig], tiny_path: Path, tmp_path: Path
) -> None:
    with served(tiny_path, tmp_path) as (_, url):
        remote, there = train(settings([url], updates=3), tmp_path / "remote", Watch())
    local, here = train(settings([], updates=3), tmp_path / "local", Watch())
    start = MultiModelEnvironment.from_config(settings([], updates=0))
    assert [turn.token_ids for turn in turns(here)] == [turn.token_ids for turn in turns(there)]
    for model_id in ("a", "b"):
        before, ours, theirs = (env.base.bank.training(model_id).flat for env in (start, local, remote))
        # Adam turns the sign of a gradient near zero into a whole step: single weights may differ, the way gone may not
        assert torch.nn.functional.cosine_similarity(ours - before, theirs - before, dim=0) > 0.98


def test_a_server_killed_in_mid_run_costs_no_episode_and_is_used_again(
    settings: Callable[..., RunConfig], tiny_path: Path, tmp_path: Path
) -> None:
    with served(tiny_path, tmp_path) as (first, one), served(tiny_path, tmp_path) as (_, two):
        watch = Watch({2: first.kill})
        env, episodes = train(settings([one, two], updates=5), tmp_path / "run", watch)
    assert len(episodes) == 5 * 18
    assert {turn.tier for turn in turns(episodes)} == {Tier.HTTP}
    assert all(model.version == 5 for model in env.models.values())
    used = {turn.server for turn in turns([e for e in episodes if e.update > 3])}
    assert used == {two.removeprefix("http://")}


def test_without_its_only_server_a_run_goes_on_inside_the_process(
    settings: Callable[..., RunConfig], tiny_path: Path, tmp_path: Path
) -> None:
    with served(tiny_path, tmp_path) as (only, url):
        watch = Watch({2: only.kill})
        env, episodes = train(settings([url], updates=4), tmp_path / "run", watch)
    tiers = {e.update: {turn.tier for turn in turns([e])} for e in episodes}
    assert tiers[1] == {Tier.HTTP}
    assert tiers[4] == {Tier.LOCAL}
    assert all(model.version == 4 for model in env.models.values())
    assert any("local" in note for note in watch.notes)


def test_with_nothing_but_simulation_no_weight_moves_and_it_is_said(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    watch = Watch()
    config = settings(["http://127.0.0.1:9"], updates=2, tiers=["http", "simulated"])
    env, episodes = train(config, tmp_path / "run", watch)
    assert {turn.tier for turn in turns(episodes)} == {Tier.SIMULATED}
    assert all(model.version == 0 and model.weight_updates == 0 for model in env.models.values())
    assert any("simulated" in note.lower() for note in watch.notes)
