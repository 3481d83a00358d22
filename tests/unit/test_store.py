"""The database of a run: a fair sample of episodes, every failure, and texts that can hold anything."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import RunFolderError
from coterie.runs.store import SCHEMA_VERSION, Store, choose
from coterie.types import AdapterVersion, Episode, FailedEpisode, TaskType, Tier
from tests.support.episodes import episode, group, make_task, make_turn

NASTY = "'); DROP TABLE calls; --\x00\u202e\n\"\ud800 协同"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "episodes.sqlite") as opened:
        yield opened


def failure(name: str, error: str = "boom") -> FailedEpisode:
    return FailedEpisode(name, make_task(name), error)


# -- choosing -----------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 9), max_size=8), st.integers(0, 40))
def test_choice_is_even_as_large_as_allowed_and_blind_to_order(sizes: dict[str, int], keep: int) -> None:
    episodes = [e for name, size in sizes.items() for e in group(name, scores=[{"a": 1.0}] * size)]
    chosen = choose(episodes, keep)
    assert len(chosen) == min(keep, len(episodes))
    assert len({e.episode_id for e in chosen}) == len(chosen)
    shuffled = episodes[:]
    random.Random(0).shuffle(shuffled)
    assert choose(shuffled, keep) == chosen
    counts = Counter(e.group for e in chosen)
    for name, size in sizes.items():
        # a group may have fewer than another only if it is used up, and then by at most the last round
        assert counts[name] == size or counts[name] >= max(counts.values(), default=0) - 1


def test_few_places_are_spaced_over_all_groups() -> None:
    episodes = [e for at in range(8) for e in group(f"g{at}", scores=[{"a": 1.0}] * 2)]
    assert [e.group for e in choose(episodes, 4)] == ["g0", "g2", "g4", "g6"]


# -- writing and reading ------------------------------------------------------------------------------------------


def test_an_episode_comes_back_whole(store: Store) -> None:
    task = make_task("t", task_type=TaskType.REASONING, content={"words": ("a", "b"), "answer": {"n": 3}})
    advice = make_turn("a", kind="advice", token_ids=(4, 5), logprobs=(-0.25, -0.5), entropy=(0.2, 0.4), text="go left")
    answer = make_turn(
        "b",
        adapter=AdapterVersion("model_b", 3),
        choice=1,
        valid=False,
        tier=Tier.HTTP,
        server="http://one:8000",
        latency_s=0.125,
        entropy=(),
    )
    played = episode(
        "e1",
        scores={"a": 0.5, "b": 1.0},
        rewards={"a": 0.25, "b": 0.75},
        accuracy={"b": 1.0},
        metrics={"cooperation": 1.0},
        task=task,
        group="g1",
        turns={"a": [advice], "b": [answer]},
        withheld={"a"},
    )
    store.record(4, [played], [], keep=8)

    [row] = store.episodes()
    assert row["update"] == 4
    assert (row["episode_id"], row["group_id"], row["task_id"], row["task_type"]) == ("e1", "g1", "t", "reasoning")
    assert row["task"]["content"] == {"words": ["a", "b"], "answer": {"n": 3}}
    assert row["task"]["reward_pool"] == 1.0
    expected = {"scores": {"a": 0.5, "b": 1.0}, "accuracy": {"b": 1.0}, "metrics": {"cooperation": 1.0}}
    assert row["outcome"] == expected
    assert row["rewards"] == {"a": 0.25, "b": 0.75}
    assert row["withheld"] == ["a"]

    first, second = store.calls(episode_id="e1")
    assert first == {
        "update": 4,
        "episode_id": "e1",
        "seat_id": "a",
        "turn": 0,
        "model_id": "model_a",
        "adapter": "model_a@v0",
        "tier": "local",
        "server": "",
        "kind": "advice",
        "prompt_tokens": 3,
        "new_tokens": 2,
        "latency_s": 0.0,
        "text": "go left",
        "valid": True,
        "choice": None,
        "logprob": pytest.approx(-0.75),
        "entropy": pytest.approx(0.3),
    }
    assert (second["adapter"], second["tier"], second["server"]) == ("model_b@v3", "http", "http://one:8000")
    assert (second["valid"], second["choice"], second["latency_s"], second["entropy"]) == (False, 1, 0.125, None)


def test_text_is_data_whatever_it_says(store: Store) -> None:
    said = make_turn("a", text=NASTY, kind=NASTY)
    task = make_task(NASTY, content={NASTY: NASTY})
    played = episode(NASTY, scores={"a": 1.0}, task=task, group=NASTY, turns={"a": [said]})
    store.record(1, [played], [failure(NASTY, NASTY)], keep=1)
    as_stored = NASTY.replace("\ud800", "?")
    [call] = store.calls(episode_id=as_stored)
    assert call["text"] == as_stored
    assert store.episodes()[0]["task"]["content"] == {NASTY: NASTY}
    assert store.failures()[0]["error"] == as_stored
    assert store.calls(episode_id="' OR '1'='1") == []


def test_at_most_keep_and_all_failures_and_the_rest_counted(store: Store) -> None:
    episodes = [e for name in "abc" for e in group(name, scores=[{"a": 1.0, "b": 0.0}] * 4)]
    failed = [failure(f"f{at}") for at in range(5)]
    store.record(1, episodes, failed, keep=6)
    store.record(2, episodes, [], keep=0)
    assert Counter(row["group_id"] for row in store.episodes(update=1)) == {"a": 2, "b": 2, "c": 2}
    assert len(store.calls(update=1)) == 12
    assert [row["episode_id"] for row in store.failures()] == ["f0", "f1", "f2", "f3", "f4"]
    assert store.updates() == [
        {"update": 1, "run": 1, "played": 12, "kept": 6, "left_out": 6, "failed": 5},
        {"update": 2, "run": 1, "played": 12, "kept": 0, "left_out": 12, "failed": 0},
    ]


def test_filters_and_limits(store: Store) -> None:
    for update in (1, 2, 3):
        store.record(update, group("g", scores=[{"a": 1.0, "b": 0.0}] * 2), [], keep=2)
    assert len(store.episodes(update=2)) == 2
    assert [row["update"] for row in store.episodes(limit=3)] == [1, 1, 2]
    assert {row["seat_id"] for row in store.calls(model_id="model_b")} == {"b"}
    assert len(store.calls(update=3, episode_id="g/1", model_id="model_a")) == 1
    assert len(store.calls(limit=5)) == 5


def test_resume_forgets_what_is_done_again(store: Store) -> None:
    def update(number: int) -> tuple[int, list[Episode], list[FailedEpisode]]:
        return number, group("g", scores=[{"a": 1.0}] * 2), [failure("f")]

    for number in (1, 2, 3):
        store.record(*update(number), keep=2)
    with pytest.raises(RunFolderError, match="update 3"):
        store.record(*update(3), keep=2)
    store.delete_after(1)
    for rows in (store.updates(), store.episodes(), store.calls(), store.failures()):
        assert {row["update"] for row in rows} == {1}
    store.record(*update(2), keep=2)
    assert len(store.episodes(update=2)) == 2


def test_an_update_is_written_whole_or_not_at_all(store: Store) -> None:
    twin = episode("same", scores={"a": 1.0})
    with pytest.raises(RunFolderError, match="cannot write update 1"):
        store.record(1, [twin, twin], [failure("f")], keep=2)
    assert store.updates() == store.episodes() == store.failures() == []
    store.record(1, [twin], [], keep=2)
    assert [row["run"] for row in store.updates()] == [1]


# -- the file -----------------------------------------------------------------------------------------------------


def test_each_writing_process_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for update in (1, 2):
        with Store(path) as store:
            store.record(update, [], [], keep=1)
    with Store(path) as reader:
        assert [row["run"] for row in reader.updates()] == [1, 2]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT first_update FROM runs ORDER BY run").fetchall() == [(1,), (2,)]
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_reader_sees_a_run_that_is_being_written(store: Store) -> None:
    store.record(1, [episode("e", scores={"a": 1.0})], [], keep=1)
    with Store(store.path) as reader:
        store.record(2, [], [], keep=1)
        assert [row["update"] for row in reader.updates()] == [1, 2]


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to look at " * 40)
    with pytest.raises(RunFolderError, match="not a database of a run"):
        Store(text)

    other = tmp_path / "other"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    with pytest.raises(RunFolderError, match="something else"):
        Store(other)

    newer = tmp_path / "newer"
    connection = sqlite3.connect(newer)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(RunFolderError, match="upgrade Coterie"):
        Store(newer)

    with pytest.raises(RunFolderError, match="cannot open"):
        Store(tmp_path / "nowhere" / "db")
