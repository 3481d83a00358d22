from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from coterie import collector
from coterie.collector import RareCollections


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A first threshold small enough for a test; before and after, nothing is young."""
    monkeypatch.setattr(collector, "_YOUNG", 2000)
    gc.collect()
    yield 2000
    assert not gc.callbacks or all("_follow" not in repr(one) for one in gc.callbacks)


def test_what_exists_is_set_aside_and_comes_back() -> None:
    before = gc.get_threshold()
    with RareCollections():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


class Node:
    alive = 0

    def __init__(self) -> None:
        Node.alive += 1
        self.me = self

    def __del__(self) -> None:
        Node.alive -= 1


def test_garbage_made_within_is_found(begins: int) -> None:
    with RareCollections():
        for _ in range(10 * begins):
            Node()
        assert gc.get_threshold()[0] == begins
        assert Node.alive <= 2 * begins
        gc.collect()
        assert Node.alive == 0


def test_the_more_is_alive_the_rarer_the_visits(begins: int) -> None:
    visits = []

    def visited(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            visits.append(info["generation"])

    rare = RareCollections()
    gc.callbacks.append(visited)
    try:
        with rare:
            alive = [[n] for n in range(50 * begins)]
            first = len(visits)
        del alive
        with rare:  # another update of the same size
            alive = [[n] for n in range(50 * begins)]
    finally:
        gc.callbacks.remove(visited)
    assert 4 <= first <= 6  # at 1, 2, 4, 8 and 16 times the beginning, of 50 in all
    assert len(visits) - first <= 1
    assert len(alive) == 50 * begins


def test_once_there_is_garbage_it_is_looked_for_more_often(begins: int) -> None:
    with RareCollections():
        alive = [[n] for n in range(50 * begins)]
        high = gc.get_threshold()[0]
        del alive
        for _ in range(20 * high):
            Node()
        assert gc.get_threshold()[0] == begins
        assert Node.alive <= 2 * begins
    gc.collect()
    assert Node.alive == 0
    assert high >= 16 * begins


def test_who_froze_before_keeps_it() -> None:
    gc.freeze()
    try:
        with RareCollections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
