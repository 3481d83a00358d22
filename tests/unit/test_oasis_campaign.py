"""The bookkeeping of a campaign on OASIS, and its scenario as far as it needs no OASIS."""

from __future__ import annotations

import random
from collections import Counter
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coterie.errors import ConfigError, MissingPackageError, ScenarioError
from coterie.scenarios.adapters import oasis as adapter
from coterie.scenarios.adapters.oasis import Oasis, OasisOptions
from coterie.scenarios.base import build_scenario
from coterie.scenarios.oasis import loading
from coterie.scenarios.oasis.actions import Call, Post
from coterie.scenarios.oasis.campaign import Campaign, CampaignOptions, GroupOptions, WeightOptions
from coterie.types import Frozen, Observation, Split, TaskType, Trained, TrainingTask
from tests.support.oasis_tables import Tables

OK = {"success": True}


def options(**settings: Any) -> CampaignOptions:
    settings = {"actions": ["like", "repost", "nothing"], **settings}
    groups = [{"name": "red", "agents": 2, "posts": ["Tea."]}, {"name": "blue", "agents": 3, "posts": ["Books."]}]
    return CampaignOptions.model_validate({"groups": groups, **settings})


def test_every_agent_begins_with_as_many_posts_and_every_group_goes_on_in_turn() -> None:
    campaign = Campaign(options(seed_posts=2, posts_per_round=1), seed=1)
    assert Counter(agent for agent, _ in campaign.seeds()) == dict.fromkeys(range(5), 2)
    rounds = [campaign.scheduled(number) for number in range(6)]
    assert all(sorted(text for _, text in posts) == ["Books.", "Tea."] for posts in rounds)
    by_agent = Counter(agent for posts in rounds for agent, _ in posts)
    assert by_agent == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    def drawn(seed: int) -> Any:
        campaign = Campaign(options(), seed)
        return campaign.seeds(), [(campaign.scheduled(k), campaign.order()) for k in range(4)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert all(sorted(order) == list(range(5)) for _, order in drawn(3)[1])
    firsts = Counter(Campaign(options(), seed).scheduled(0)[0][1] for seed in range(40))
    assert set(firsts) == {"Tea.", "Books."}  # no group always comes first


def test_an_agent_is_not_offered_what_it_has_done(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "platform.db", users=5)
    post = tables.post(1)
    feed = [Post(post, 1, 0)]
    campaign = Campaign(options(), seed=1)
    assert campaign.offer(0, feed).choices == ("like red", "repost red", "nothing")
    campaign.note({0: [Call("like_post", {"post_id": post}, OK, True)]}, tables.db)
    assert campaign.offer(0, feed).choices == ("repost red", "nothing")
    assert campaign.offer(2, feed).choices == ("like red", "repost red", "nothing")
    assert campaign.menus[0].choices == ("repost red", "nothing")
    tables.db.close()


def test_scores_and_metrics_by_hand(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "platform.db", users=5)
    first, second, third = tables.post(0), tables.post(1), tables.post(2)
    for user in (1, 2, 3, 4):
        tables.shown(user, [first])
    tables.shown(0, [third])
    tables.like(4, first)
    weights = {"reach": 3.0, "likes": 1.0}
    mixed = Campaign(options(weights=weights, shared=0.25), seed=1)
    calls = {
        0: [Call("like_post", {"post_id": second}, OK, True), Call("dance", {}, "no", False)],
        1: [Call("repost", {"post_id": first}, {"success": False, "error": "already exists"}, True)],
    }
    mixed.note(calls, tables.db)
    own = {0: (3 * 1.0 + 0.25) / 4, 1: 0.0, 2: 3 * 0.25 / 4, 3: 0.0, 4: 0.0}
    red, blue = (3 * 0.5 + 0.125) / 4, 3 * 0.25 / 4
    together = {0: red, 1: red, 2: blue, 3: blue, 4: blue}
    assert mixed.scores() == pytest.approx({a: 0.75 * own[a] + 0.25 * together[a] for a in range(5)})
    assert mixed.history == [pytest.approx({"red": red, "blue": blue})]
    metrics = mixed.metrics()
    assert metrics["red_reach"] == pytest.approx(0.5)
    assert metrics["blue_reach"] == pytest.approx(0.25)
    assert (metrics["red_posts"], metrics["blue_posts"]) == (2, 1)
    assert metrics["valid_calls"] == pytest.approx(2 / 3)
    assert metrics["accepted_calls"] == pytest.approx(1 / 3)
    tables.db.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": [{"name": "red"}, {"name": "red"}]}, "each with a name of its own"),
        ({"groups": []}, "at least one"),
        ({"groups": [{"name": "red", "agents": 1}]}, "nobody to reach"),
        ({"groups": [{"name": "two words"}]}, "pattern"),
        ({"groups": [{"name": "red", "model": "a", "untrained": True}]}, "leave one of the two out"),
        ({"groups": [{"name": "red", "posts": [" "]}]}, "a post is empty"),
        ({"actions": []}, "at least one action"),
        ({"actions": ["like", "like"]}, "each once"),
        ({"actions": ["dance"]}, "like"),
        ({"seed_posts": 0, "posts_per_round": 0}, "nobody ever posts"),
        ({"following": 2}, 'recommender = "random"'),
        ({"weights": {"reach": 0}}, "all weights are 0"),
        ({"recommender": "twhin-bert"}, "reddit"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OasisOptions.model_validate(settings)


def test_weights_make_a_mean() -> None:
    figures = {"reach": 1.0, "views": 0.0, "likes": 0.5, "reposts": 0.0, "comments": 0.0, "followers": 0.0}
    assert WeightOptions().of(figures) == 1.0
    assert WeightOptions(reach=1, likes=1).of(figures) == 0.75


@pytest.mark.parametrize(
    ("language", "system", "user", "prefix", "choices"),
    [
        (
            "en", "You are with red. Choose one action.", "Posts and their likes:\nred 2\nblue 5", "Action:",
            ("like red", "like blue", "dislike red", "dislike blue", "nothing"),
        ),
        (
            "zh", "你属于red。选一个动作。", "帖子和赞数：\nred 2\nblue 5", "动作：",
            ("赞red", "赞blue", "踩red", "踩blue", "无"),
        ),
    ],
)  # fmt: skip
def test_what_an_agent_is_shown(language: str, system: str, user: str, prefix: str, choices: tuple[str, ...]) -> None:
    campaign = Campaign(CampaignOptions(), seed=0, language=language)
    found = campaign.offer(0, [Post(1, 1, 2), Post(2, 9, 5)])
    assert found.observation == Observation(system=system, user=user, prefix=prefix)
    assert found.choices == choices


def test_the_loyal_script_works_for_its_own() -> None:
    options = OasisOptions.model_validate({"actions": ["like", "dislike", "repost", "nothing"], "targets": 2})
    for language in ("en", "zh"):
        campaign = Campaign(options, seed=0, language=language)
        chosen = []
        for feed in ([Post(1, 1, 2), Post(2, 9, 5)], [Post(1, 1, 2)], []):
            found = campaign.offer(0, feed)
            text = adapter._loyal(options, found.observation, found.choices, random.Random(0))
            chosen.append(found.acts[found.choices.index(text)])
        assert [(act.kind, act.args) for act in chosen] == [
            ("dislike", {"post_id": 2}), ("repost", {"post_id": 1}), ("nothing", {}),
        ]  # fmt: skip


# -- the scenario, without OASIS --------------------------------------------------------------------------------------


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch) -> Oasis:
    monkeypatch.setattr(adapter, "require", lambda: None)
    groups = (
        GroupOptions(name="red", agents=2, model="one"),
        GroupOptions(name="blue", agents=1),
        GroupOptions(name="gray", agents=1, untrained=True),
    )
    return Oasis(OasisOptions(groups=groups, rounds=3, simulations=2))


def test_groups_are_seats_and_say_who_plays_them(scenario: Oasis) -> None:
    task = next(scenario.tasks(Split.TRAIN, 0))
    assert [(seat.seat_id, seat.player) for seat in scenario.seats(task)] == [
        ("red_1", Trained("one")), ("red_2", Trained("one")), ("blue_1", None), ("gray_1", Frozen(None)),
    ]  # fmt: skip


def test_tasks_are_simulations_that_never_meet(scenario: Oasis) -> None:
    train = [task.content["simulation"] for task in islice(scenario.tasks(Split.TRAIN, 3), 6)]
    assert train[:2] * 3 == train
    assert len(set(train)) == 2
    held = [task.content["simulation"] for task in islice(scenario.tasks(Split.HELDOUT, 3), 50)]
    assert len(set(held)) == 50
    assert all(number % 2 == 0 for number in train)
    assert all(number % 2 == 1 for number in held)
    assert next(scenario.tasks(Split.TRAIN, 4)).content != next(scenario.tasks(Split.TRAIN, 3)).content
    task = next(scenario.tasks(Split.TRAIN, 3))
    assert (task.max_steps, task.required_models) == (3, 4)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"content": {"simulation": "one"}}, "a whole number"),
        ({"content": {"words": 1}}, "a whole number"),
        ({"max_steps": 2}, "has 3 rounds"),
        ({"required_models": 3}, "have 4 agents"),
    ],
)
def test_tasks_it_cannot_play_are_refused(scenario: Oasis, task: dict[str, Any], message: str) -> None:
    settings = {"task_id": "own", "task_type": TaskType.COLLABORATION, "max_steps": 3, "required_models": 4}
    scenario.check_task(TrainingTask(**settings))
    with pytest.raises(ScenarioError, match=f"'own'.*{message}"):
        scenario.check_task(TrainingTask(**{**settings, **task}))


def test_without_oasis_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"camel-oasis": "0.2.5"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(loading, "version", version)
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "igraph" else find_spec("json"))
    with pytest.raises(MissingPackageError, match=r"camel-oasis needs igraph, not installed here; run `make oasis`"):
        build_scenario("oasis", {})
    versions["camel-oasis"] = "0.3.0"
    with pytest.raises(ConfigError, match=r"made for camel-oasis 0\.2\.5, installed is 0\.3\.0"):
        build_scenario("oasis", {})
    versions.clear()
    with pytest.raises(MissingPackageError, match=r"\(the package named oasis is another one\).*--no-deps"):
        build_scenario("oasis", {})
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"which is not installed; run `make oasis`"):
        build_scenario("oasis", {})
