"""`coterie bench` on the tiny base: what it counts, what it says, and that it changes nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile
from typer.testing import CliRunner

from coterie.bench.meter import LEARNING, PHASES, ROLLOUT, Meter, PhaseMeasure, UpdateMeasure
from coterie.bench.profile import KINDS, by_kind, kind_of, profiled, shares
from coterie.bench.report import BenchReport, bench
from coterie.cli.main import app
from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.lm.base import BaseModel
from coterie.lm.forest import pack
from coterie.types import Episode


@pytest.fixture
def config(tiny_path: Path) -> RunConfig:
    """Two models, text and choices."""
    return parse_config(settings(tiny_path))


def settings(tiny_path: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "updates": 2,
        "base": {"model": str(tiny_path), "threads": 1},
        "scenario": {"id": "signaling", "options": {}},
        "models": [{"model_id": "sender", "lora_rank": 4}, {"model_id": "receiver"}],
        "rollout": {"tasks_per_update": 2, "group_size": 8},
        "credit": {"scheme": "moving_average"},
        "learner": {"entropy_bonus": 0.1},
        "engine": {"calibration": False},
    }


def test_the_meter_counts_the_distinct_tokens_of_rollout_and_learning(config: RunConfig) -> None:
    async def run() -> tuple[UpdateMeasure, list[Episode], int]:
        environment = MultiModelEnvironment(config=config)
        meter = Meter(environment)
        kept: list[Episode] = []
        inner = meter.loop.keep
        assert inner is not None

        def keep(update: int, episodes: Any, failed: Any, record: Any) -> None:
            kept.extend(episodes)
            inner(update, episodes, failed, record)

        meter.loop.keep = keep
        measured = await meter.update()
        packed = meter.loop.records[-1].metrics["learn/packed_tokens"]
        await environment.aclose()
        return measured, kept, int(packed)

    measured, episodes, packed = asyncio.run(run())
    assert len(episodes) == 16
    turns = [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]
    assert measured.turns == len(turns) == 32
    # distinct (policy, prefix) pairs, found without a tree
    prefixes = set()
    for turn in turns:
        assert turn.allowed is not None
        free = [at for at, among in enumerate(turn.allowed) if len(among) > 1]
        whole = turn.prompt_ids + turn.token_ids[: free[-1]]
        prefixes |= {(turn.model_id, whole[: n + 1]) for n in range(len(whole))}
    rollout, learning = (measured.phases[phase] for phase in PHASES)
    # the entropy bonus keeps every turn, so both phases see the same prefixes, and the learner computes no other
    assert rollout.distinct == learning.distinct == len(prefixes) == packed
    assert rollout.sampled == sum(len(turn.token_ids) for turn in turns)
    # a forward and a backward pass, of which rollout hands on the first
    assert learning.separate_flops > 2 * rollout.flops > 0
    assert learning.separate_flops - learning.flops == pytest.approx(rollout.flops)
    assert rollout.separate_flops == rollout.flops
    assert measured.seconds >= rollout.seconds + learning.seconds
    assert rollout.naive > rollout.distinct


def test_turns_without_advantage_are_no_work_for_the_learner(tiny_path: Path) -> None:
    # one episode a group: nothing to compare with, so every advantage is zero
    data = {**settings(tiny_path), "learner": {}, "credit": {"scheme": "group_relative"}}
    data["rollout"] = {"tasks_per_update": 4, "group_size": 1}

    async def run() -> UpdateMeasure:
        environment = MultiModelEnvironment(config=parse_config(data))
        measured = await Meter(environment).update()
        await environment.aclose()
        return measured

    measured = asyncio.run(run())
    assert measured.phases[ROLLOUT].distinct > 0
    assert measured.phases[LEARNING].distinct == 0
    assert measured.phases[LEARNING].flops == 0


def test_bench_measures_and_profiles(config: RunConfig) -> None:
    report = asyncio.run(bench(config, updates=2))
    assert len(report.updates) == 2
    assert len(report.rates) == 3
    found = report.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["policies"] == 2
    assert found["turns"] == 32
    for phase in PHASES:
        assert sum(found["time"][phase].values()) == pytest.approx(1.0)
        assert set(found["time"][phase]) == set(KINDS)
        assert found["time"][phase]["matrix products"] > 0.01
        assert 0 < found["phases"][phase]["share_of_limit"] < 1
    assert found["time"][LEARNING]["attention"] > 0
    speed, time = report.tables()
    assert [row[0] for row in speed.rows] == list(PHASES)
    assert [row[0] for row in time.rows] == list(KINDS)


def test_figures_are_medians_and_limits_use_the_rates_around_an_update() -> None:
    def update(seconds: float, flops: float) -> UpdateMeasure:
        measure = PhaseMeasure(seconds, flops, flops, sampled=100, distinct=50, naive=400)
        return UpdateMeasure(2 * seconds, dict.fromkeys(PHASES, measure), 10)

    report = BenchReport({}, (1e9, 3e9, 3e9, 1e9), (update(2.0, 2e9), update(4.0, 3e9), update(10.0, 4e9)))
    assert report.limits(ROLLOUT) == pytest.approx([1.0, 1.0, 2.0])
    found = report.phase(ROLLOUT)
    assert found["seconds"] == 4.0
    assert (found["seconds_min"], found["seconds_max"]) == (2.0, 10.0)
    assert found["tokens_per_second"] == 25.0
    assert found["naive_tokens_per_second"] == 100.0
    assert found["share_of_limit"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::addmm", [[8], [4, 8], [8, 8]], "matrix products"),
        ("aten::mm", [[4, 8], [8, 8]], "matrix products"),
        ("aten::bmm", [[6, 4, 16], [6, 16, 9]], "attention"),
        ("aten::bmm", [[6, 4, 9], [6, 9, 16]], "attention"),
        ("aten::bmm", [[2, 4, 64], [2, 64, 8]], "adapters"),
        ("coterie::product", [], "matrix products"),
        ("coterie::pack_panels", [], "copies"),
        ("coterie::add_low_rank", [], "adapters"),
        ("coterie::attend", [], "attention"),
        ("coterie::summarise", [], "sampling and loss"),
        ("coterie::rms_norm_backward", [], "element-wise"),
        ("coterie::attend_tree_backward", [], "attention"),
        ("coterie::low_rank_gradients", [], "adapters"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "attention"),
        ("aten::_softmax", [], "attention"),
        ("aten::_log_softmax_backward_data", [], "sampling and loss"),
        ("aten::cumsum", [], "sampling and loss"),
        ("aten::index_select", [], "copies"),
        ("aten::mul", [], "element-wise"),
        ("_LoRALinearBackward", [], None),
        ("Optimizer.step#AdamW.step", [], None),
    ],
)
def test_operations_are_told_apart(name: str, shapes: list[list[int]], kind: str | None) -> None:
    assert kind_of(name, shapes, head_dim=16) == kind


def test_profiled_time_is_that_of_the_operations_and_the_rest_is_python(tiny_base: BaseModel) -> None:
    a = torch.ones(400, 400)

    async def work() -> int:
        for _ in range(5):
            torch.mm(a, a)
        return sum(i * i for i in range(100_000))

    returned, events = asyncio.run(profiled(work(), tiny_base))
    assert returned > 0
    assert sum(event.name == "aten::mm" for event in events) == 5
    found = by_kind(events, 10.0, head_dim=16)
    assert sum(found.values()) == pytest.approx(10.0)
    assert 0 < found["matrix products"] < 10.0
    assert found["Python"] > 5.0
    # a wall time below that of the operations is measured without the profiler's own cost: no negative remainder
    assert by_kind(events, 0.0, head_dim=16)["Python"] == 0.0
    assert shares(found)["Python"] == pytest.approx(found["Python"] / 10.0)
    assert shares(dict.fromkeys(KINDS, 0.0)) == {}


def test_our_own_kernels_are_seen_while_it_is_profiled(tiny_base: BaseModel) -> None:
    async def work() -> None:
        tiny_base.hidden(torch.arange(3), torch.arange(3), pack([(0, (0, 1, 2))]).plan(), [])

    _, events = asyncio.run(profiled(work(), tiny_base))
    seen = {event.name for event in events if event.name.startswith("coterie::")}
    parts = {"rms_norm", "rotate", "attend_tree", "swiglu"} if tiny_base.kernels is not None else set()
    if tiny_base.kernels is not None and tiny_base.kernels.panel:
        parts |= {"product", "pack_panels"}
    assert seen == {f"coterie::{part}" for part in parts}
    with profile() as later:
        asyncio.run(work())
    assert not any(event.name.startswith("coterie::") for event in later.function_events or ())


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tiny_path: Path, tmp_path: Path) -> Path:
    import tomli_w

    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(settings(tiny_path)))
    return path


def test_the_command_shows_tables_and_writes_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", str(file), "--updates", "1"])
    assert done.exit_code == 0, done.output
    for word in ("rollout", "learning", "of the limit", "where the time goes", *KINDS):
        assert word in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_the_command_prints_json_alone(file: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(file), "--updates", "1", "--json", "--set", "rollout.group_size=4"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["episodes"] == 8
    assert "measuring" in done.stderr


def test_a_wrong_config_is_refused_before_anything_is_loaded(file: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(file), "--set", "rollout.groupsize=4"])
    assert done.exit_code == 2
    assert "group_size" in done.stderr
