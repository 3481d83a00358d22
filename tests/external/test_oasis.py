"""OASIS itself: what happens on its platform, both ways of acting, training, failures, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from coterie.config import parse_config
from coterie.environment import MultiModelEnvironment
from coterie.errors import EngineError, ScenarioError
from coterie.inference.fake import FakeServer
from coterie.inference.loop_thread import LoopThread
from coterie.runs.directory import RunDirectory
from coterie.scenarios.adapters.oasis import simulate
from coterie.scenarios.base import build_scenario
from coterie.scenarios.check import check
from coterie.scenarios.oasis.actions import Act
from coterie.scenarios.oasis.campaign import CampaignOptions
from coterie.scenarios.oasis.loading import load
from coterie.scenarios.oasis.tables import Ledger
from coterie.scenarios.practice import PracticeTable
from coterie.types import Observation, Outcome, Split
from tests.e2e.test_demo_camel import NOBODY, demo
from tests.external.conftest import SERVED
from tests.external.processes import ServerProcess
from tests.support.scripts import ROOT, load_script

pytestmark = pytest.mark.oasis

SMALL = {
    "groups": [{"name": "red", "agents": 2}, {"name": "blue", "agents": 3}],
    "rounds": 4,
    "actions": ["like", "repost", "comment", "follow", "post", "nothing"],
}

CONTESTED = {
    "rounds": 3, "actions": ["like", "repost", "nothing"], "recommended": 4, "shown": 2,
    "weights": {"reach": 1.0, "reposts": 1.0},
}  # fmt: skip
"""More posts than places, and reposts that count by themselves. Where every post has a place, or reach alone counts in
so few rounds, episodes of a task often end alike, and there is nothing to learn from them."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, to see what is left in it."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(work: Coroutine[Any, Any, Any], timeout_s: float = 240) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await work

    return asyncio.run(bounded())


def acts(**by_agent: tuple[str, Mapping[str, int | str]]) -> dict[int, Act]:
    """a0=("like", {"post_id": 1}) -> what agent 0 does."""
    return {int(name[1:]): Act(kind, kind, args) for name, (kind, args) in by_agent.items()}  # type: ignore[arg-type]


def simulation(users: int = 3, seed: int = 0, **settings: Any) -> Any:
    platform = load("platform")
    told = [platform.ToldUser(agent, f"user_{agent}", "somebody") for agent in range(users)]
    return platform.Simulation(told, platform.PlatformSettings(**settings), seed)


# -- the platform -----------------------------------------------------------------------------------------------------


def test_what_happens_stands_in_the_tables_and_is_read_from_them() -> None:
    async def play() -> None:
        async with simulation() as world:
            await world.publish(0, "Tea.")
            await world.publish(1, "Books.")
            feeds = await world.feeds()
            assert [[post.post_id for post in feed] for feed in feeds] == [[1, 2]] * 3
            first = await world.act(
                acts(a0=("like", {"post_id": 1}), a1=("repost", {"post_id": 1}), a2=("like", {"post_id": 1}))
            )
            assert [first[agent][0].accepted for agent in range(3)] == [False, True, True]  # nobody likes its own
            feeds = await world.feeds()
            assert {post.post_id for post in feeds[2]} == {1, 2}  # the repost is shown as what it repeats
            assert next(post for post in feeds[2] if post.post_id == 1).likes == 1
            second = await world.act(
                acts(
                    a0=("follow", {"followee_id": 77}),
                    a1=("comment", {"post_id": 1, "content": "Yes."}),
                    a2=("like", {"post_id": 1}),
                )
            )
            assert [second[agent][0].accepted for agent in range(3)] == [True, True, False]  # liked already
            third = await world.act(acts(a2=("follow", {"followee_id": 1}), a0=("like", {"post_id": 55})))
            assert third[2][0].accepted
            assert not third[0][0].accepted  # there is no such post
            standing = Ledger().read(world.db)
        tea, books = standing.posts
        assert (tea.author, tea.viewers, tea.likers, tea.reposters, tea.commenters) == (0, {1, 2}, {2}, {1}, {1})
        assert (books.author, books.viewers, books.likers) == (1, {0, 2}, frozenset())
        assert standing.followers == {1: {2}}  # user 77 does not exist

    run(play())


def test_liked_posts_are_recommended_longer() -> None:
    async def seen(hours: int, likers: Sequence[int]) -> set[int]:
        """What is recommended once two more posts are out, `hours` rounds of an hour after the first three."""
        async with simulation(users=4, recommended=2, shown=2, minutes=60.0) as world:
            for agent in range(3):
                await world.publish(agent, f"Post of {agent}.")
            await world.act({3: Act("", "nothing", {}), **{a: Act("", "like", {"post_id": 1}) for a in likers}})
            for _ in range(hours - 1):
                await world.act(acts(a3=("nothing", {})))
            for agent in (1, 2):
                await world.publish(agent, f"News of {agent}.")
            return {post.post_id for post in (await world.feeds())[3]}

    # two likes are worth log10(2) * 45,000 s = 3.76 hours, one or none nothing
    assert run(seen(3, [])) == {4, 5}
    assert run(seen(3, [1])) == {4, 5}
    assert 1 in run(seen(3, [1, 2]))
    assert run(seen(4, [1, 2])) == {4, 5}


@pytest.mark.parametrize("recommender", ["reddit", "random"])
def test_the_same_seed_gives_the_same_simulation_and_another_another(recommender: str) -> None:
    async def seen(seed: int) -> list[Any]:
        found = []
        async with simulation(users=5, seed=seed, recommender=recommender, recommended=4, shown=2) as world:
            for agent in range(5):
                await world.publish(agent, "…")
            for _ in range(3):
                found.append(await world.feeds())
                await world.act({agent: Act("", "nothing", {}) for agent in range(5)})
        return found

    async def play() -> None:
        before = random.getstate()
        one, same, other = await asyncio.gather(seen(1), seen(1), seen(2))
        assert one == same
        assert one != other
        assert random.getstate() == before

    run(play())


def test_a_platform_that_fails_ends_the_simulation_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead(self: Any, agent_id: int, post_id: int) -> Any:
        raise RuntimeError("the disk is gone")

    async def play() -> None:
        async with simulation() as world:
            await world.publish(0, "Tea.")
            monkeypatch.setattr(load("platform").Platform, "like_post", dead)
            await world.act(acts(a1=("like", {"post_id": 1}), a2=("nothing", {})))

    with pytest.raises(ScenarioError, match="OASIS platform stopped: RuntimeError: the disk is gone"):
        run(play(), timeout_s=20)


def test_an_error_the_platform_returns_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def locked(self: Any, agent_id: int, post_id: int) -> Any:
        return {"success": False, "error": "database is locked"}

    async def play() -> None:
        async with simulation() as world:
            monkeypatch.setattr(load("platform").Platform, "like_post", locked)
            await world.act(acts(a1=("like", {"post_id": 1})))

    with pytest.raises(ScenarioError, match=r"agent 1, like_post.*database is locked"):
        run(play(), timeout_s=20)


def test_users_must_be_numbered_from_zero() -> None:
    platform = load("platform")
    users = [platform.ToldUser(7, "seven", ""), platform.ToldUser(7, "seven again", "")]

    with pytest.raises(ScenarioError, match=r"numbered 0, 1, 2, …; these are \[7, 7\]"):
        platform.Simulation(users, platform.PlatformSettings(), 0)


# -- the scenario -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acting", ["told", "chat"])
def test_it_keeps_the_contract(acting: str) -> None:
    problems = check(build_scenario("oasis", {**SMALL, "rounds": 2, "acting": acting}), tasks=1, timeout_s=60)
    assert not problems, "\n".join(problems)


def played(options: Mapping[str, Any], answer: Any = None, seed: int = 0) -> tuple[Outcome, PracticeTable]:
    scenario = build_scenario("oasis", options)
    (task,) = islice(scenario.tasks(Split.TRAIN, 0), 1)
    table = PracticeTable(task, scenario.seats(task), seed=seed, answer=answer)
    return run(scenario.play(task, table)), table


@pytest.mark.parametrize("targets", [1, 2])
def test_told_or_by_chat_agents_the_same_choices_are_the_same_simulation(targets: int) -> None:
    one, here = played({**SMALL, "targets": targets, "acting": "told"})
    other, there = played({**SMALL, "targets": targets, "acting": "chat"})
    assert one == other
    assert [here[seat].shown for seat in here.seats] == [there[seat].shown for seat in there.seats]
    assert one.metrics["valid_calls"] == one.metrics["accepted_calls"] == 1.0


def test_a_loyal_group_is_seen_more() -> None:
    campaign = {"rounds": 10, "groups": [{"name": "red", "agents": 4}, {"name": "blue", "agents": 4}]}
    loyal = build_scenario("oasis", campaign).scripts["loyal"]  # type: ignore[attr-defined]

    def answer(seat: str, seen: Observation, choices: Sequence[str], rng: random.Random) -> str:
        return loyal(seen, choices, rng) if seat.startswith("red") else rng.choice(choices)

    gained = []
    for seed in range(3):
        found = played(campaign, answer, seed)[0]
        gained.append(found.metrics["red_reach"] - found.metrics["blue_reach"])
        assert found.scores["red_1"] == found.metrics["red_reach"]
        assert found.scores["blue_4"] == found.metrics["blue_reach"]
    assert min(gained) > 0


def test_what_an_agents_model_raises_ends_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise EngineError("no server is up")

    with pytest.raises(EngineError, match="no server is up"):
        played({**SMALL, "acting": "chat"}, broken)
    with pytest.raises(EngineError, match="no server is up"):
        played({**SMALL, "acting": "told"}, broken)


def played_elsewhere(elsewhere: Path, tmp_path: Path, play: str) -> subprocess.CompletedProcess[str]:
    """A process that plays, with a folder of its own for temporary files; nothing of ours is left in either place."""
    code = (
        "import asyncio, os\nfrom coterie.scenarios.base import build_scenario\n"
        "from coterie.scenarios.practice import PracticeTable\nfrom coterie.types import Split\n"
        f"s = build_scenario('oasis', {SMALL!r})\nt = next(s.tasks(Split.TRAIN, 0))\n{play}"
    )
    folder = tmp_path / "tmp"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in folder.iterdir() if "coterie" in path.name] == []
    return done


def test_nothing_is_left_behind(elsewhere: Path, tmp_path: Path) -> None:
    play = (
        "asyncio.run(s.play(t, PracticeTable(t, s.seats(t))))\n"
        "try:\n    asyncio.run(s.play(t, PracticeTable(t, s.seats(t), answer=lambda *a: 'dance')))\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    done = played_elsewhere(elsewhere, tmp_path, play)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ScenarioError\n"  # and not what OASIS prints


def test_a_process_that_is_killed_leaves_no_database(elsewhere: Path, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").glob("coterie*"))
    play = "asyncio.run(s.play(t, PracticeTable(t, s.seats(t), answer=lambda *a: os.kill(os.getpid(), 9))))\n"
    done = played_elsewhere(elsewhere, tmp_path, play)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert set(Path("/dev/shm").glob("coterie*")) == before


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acting", ["told", "chat"])
def test_what_happens_on_the_platform_trains_the_models(acting: str, tiny_path: Path, tmp_path: Path) -> None:
    groups = [{"name": "red", "agents": 2, "model": "red"}, {"name": "blue", "agents": 2, "model": "blue"}]
    config = parse_config({
        "mode": "team_battle",
        "updates": 2,
        "base": {"model": str(tiny_path), "threads": 1},
        "models": [{"model_id": name, "team_id": name, "lora_rank": 2} for name in ("red", "blue")],
        "scenario": {"id": "oasis", "options": {**CONTESTED, "groups": groups, "acting": acting}},
        "rollout": {"tasks_per_update": 1, "group_size": 4},
        "engine": {"calibration_tasks": 4},
        "evaluation": {"tasks": 1},
    })  # fmt: skip
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    summary = run(env.train())
    assert summary.completed
    for name in ("red", "blue"):
        assert env.models[name].weight_updates == 2
    run(env.aclose())


def test_an_untrained_group_is_played_by_the_base(tiny_path: Path, tmp_path: Path) -> None:
    groups = [{"name": "red", "agents": 2, "model": "red"}, {"name": "blue", "agents": 2, "untrained": True}]
    config = parse_config({
        "updates": 1,
        "base": {"model": str(tiny_path), "threads": 1},
        "models": [{"model_id": "red"}],
        "scenario": {"id": "oasis", "options": {"groups": groups, "rounds": 2}},
        "rollout": {"tasks_per_update": 1, "group_size": 3},
        "engine": {"calibration_tasks": 4},
        "evaluation": {"tasks": 1},
    })  # fmt: skip
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    assert run(env.train()).completed
    run(env.aclose())


# -- models on servers ------------------------------------------------------------------------------------------------


ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False}


def served_campaign(url: str, api_key: str | None) -> None:
    from coterie.inference.camel import CoterieModelBackend

    groups = [{"name": "red", "agents": 2}, {"name": "blue", "agents": 1}]
    options = CampaignOptions.model_validate({"groups": groups, "rounds": 2, "actions": ["like", "repost", "nothing"]})
    backends = {
        name: CoterieModelBackend(
            SERVED, {**ONE_CALL, "max_completion_tokens": 128, "temperature": 1.0, "seed": number},
            servers=url, api_key=api_key, context=2048,
        )
        for number, name in enumerate(("red", "blue"))
    }  # fmt: skip
    try:
        campaign = run(simulate(options, backends, seed=1))
        captured = {name: backend.captured() for name, backend in backends.items()}
    finally:
        for backend in backends.values():
            backend.close()
    assert {name: len(calls) for name, calls in captured.items()} == {"red": 4, "blue": 2}
    assert len(campaign.calls) == 6
    answers = [*captured["red"], *captured["blue"]]
    told = [(len(answer.token_ids), answer.reply.finish_reason, answer.text) for answer in answers]
    assert campaign.metrics()["valid_calls"] == 1.0, told
    for call in answers:
        assert len(call.token_ids) == len(call.logprobs) > 0
        assert [message["role"] for message in call.request.messages] == ["system", "user"]  # nothing of last round


@pytest.fixture
def fake() -> Iterator[str]:
    """Url of a fake server in a thread of its own."""
    thread = LoopThread("fake")
    server = FakeServer(model=SERVED, seed=4)
    thread.run(server.__aenter__())
    yield server.url
    thread.run(server.close())
    thread.close()


def test_agents_act_by_tool_calls_through_a_server(fake: str) -> None:
    served_campaign(fake, None)


def test_the_demo_ends_with_a_campaign_by_agents(fake: str, elsewhere: Path) -> None:
    done = demo(elsewhere, "--url", fake)
    assert done.returncode == 0, done.stderr
    told = done.stdout[done.stdout.index("4. OASIS agents on Coterie's backend") :]
    assert "red: 6 calls captured" in told
    assert "round 3: reach of red" in told
    assert "valid tool calls 100%" in told
    assert [path.name for path in elsewhere.iterdir() if path.name in ("log", "platform.db", "mock.db")] == []


def test_without_a_server_the_demo_trains_a_campaign(tiny_path: Path, elsewhere: Path) -> None:
    done = demo(elsewhere, "--url", NOBODY, "--base", tiny_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout[done.stdout.index("3. OASIS users as seats of a training run") :]
    assert "red: 1 update of its adapter" in told
    assert "blue: 1 update of its adapter" in told


def test_with_no_model_at_all_the_demo_says_that_it_draws(elsewhere: Path) -> None:
    done = demo(elsewhere, "--url", NOBODY)
    assert done.returncode == 0, done.stderr
    assert "choices are SIMULATED, drawn at random" in done.stdout
    assert "valid tool calls 100%" in done.stdout


def test_agents_act_by_tool_calls_through_coterie_serve(coterie_serve: ServerProcess) -> None:
    served_campaign(coterie_serve.url, coterie_serve.spec.api_key)


def test_agents_act_by_tool_calls_through_vllm(vllm: ServerProcess) -> None:
    served_campaign(vllm.url, None)


def test_a_tool_nobody_offered_is_a_call_that_is_not_valid() -> None:
    agents, actions = load("agents"), iter([Act("", "nothing", {}), Act("", "like", {"post_id": 1})])

    async def decide() -> Act:
        return next(actions)

    options = CampaignOptions.model_validate({"groups": [{"name": "red", "agents": 2}], "rounds": 1,
                                              "actions": ["repost"]})  # fmt: skip
    campaign = run(simulate(options, {"red": agents.SeatModel(decide)}))
    assert [(call.tool, call.valid) for call in campaign.calls] == [("do_nothing", True), ("like_post", False)]
    assert campaign.metrics()["valid_calls"] == 0.5


def test_the_page_shows_what_agents_are_shown() -> None:
    generate = load_script("docs/generate_scenarios.py")
    page = ROOT / "docs" / "scenarios" / "oasis.md"
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text, pages=page.parent, results=generate.FOLDER) == text
    spoilt = text.replace("\nuser: ", "\nuser: Once upon a time ", 1)
    assert spoilt != text == generate.filled(spoilt, pages=page.parent, results=generate.FOLDER)


def test_a_group_without_model_is_refused() -> None:
    with pytest.raises(ScenarioError, match="group 'blue' has no model"):
        run(simulate(CampaignOptions(), {"red": None}))
