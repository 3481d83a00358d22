from __future__ import annotations

import gc

from coterie.collector import rare_collections


def test_what_exists_is_set_aside_and_comes_back() -> None:
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_garbage_made_within_is_still_found() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            Node.alive += 1
            self.me = self

        def __del__(self) -> None:
            Node.alive -= 1

    with rare_collections():
        for _ in range(10):
            Node()
        gc.collect()
        assert Node.alive == 0


def test_who_froze_before_keeps_it() -> None:
    gc.freeze()
    try:
        with rare_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
