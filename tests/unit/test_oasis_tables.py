"""What happened on an OASIS platform, read from its tables and compared with counting by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios.oasis.tables import FIGURES, Ledger, PostFigures
from tests.support.oasis_tables import Tables


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    made = Tables(tmp_path / "platform.db", users=5)
    yield made
    made.db.close()


def only(tables: Tables) -> PostFigures:
    (post,) = Ledger().read(tables.db).posts
    return post


def test_a_post_reaches_each_other_user_it_is_shown_to_once(tables: Tables) -> None:
    post = tables.post(0)
    tables.shown(1, [post])
    tables.shown(1, [post])
    tables.shown(2, [post])
    tables.shown(0, [post])  # its author
    assert only(tables).viewers == {1, 2}
    assert only(tables).views == 3


def test_a_repost_counts_for_the_post_it_repeats(tables: Tables) -> None:
    post = tables.post(0)
    again = tables.repost(1, post)
    own = tables.repost(0, post)  # the platform allows it
    tables.shown(3, [again])
    tables.shown(4, [own])
    found = only(tables)
    assert (found.post_id, found.author) == (post, 0)
    assert found.viewers == {3, 4}
    assert found.reposters == {1}


def test_a_quote_is_a_post_of_its_own(tables: Tables) -> None:
    quote = tables.quote(1, tables.post(0))
    tables.shown(2, [quote])
    original, quoting = Ledger().read(tables.db).posts
    assert original.viewers == frozenset()
    assert (quoting.author, quoting.viewers) == (1, {2})


def test_nobody_counts_at_its_own_posts(tables: Tables) -> None:
    post = tables.post(0)
    for user in (0, 1):
        tables.like(user, post)
        tables.comment(user, post)
        tables.comment(user, post)
        tables.follow(user, 0)
    found = Ledger().read(tables.db)
    assert found.posts[0].likers == {1}
    assert found.posts[0].commenters == {1}
    assert found.followers == {0: {1}}


def test_a_follow_of_a_user_who_does_not_exist_is_none(tables: Tables) -> None:
    tables.follow(1, 99)
    tables.follow(98, 2)
    tables.follow(1, 2)
    assert Ledger().read(tables.db).followers == {2: {1}}


def test_figures_are_means_per_post_and_shares_of_the_others(tables: Tables) -> None:
    first, second, others = tables.post(0), tables.post(1), tables.post(4)
    for user in (1, 2, 3, 4):
        tables.shown(user, [first])
    tables.shown(3, [second, others])
    tables.like(2, first)
    tables.like(3, second)
    tables.repost(2, second)
    tables.comment(4, first)
    tables.follow(3, 0)
    standing = Ledger().read(tables.db)
    found = standing.figures([0, 1], population=5)
    assert tuple(found) == FIGURES
    assert found["reach"] == pytest.approx((4 + 1) / 2 / 4)
    assert found["views"] == pytest.approx((4 + 1) / 6)
    assert found["likes"] == pytest.approx((1 + 1) / 2 / 4)
    assert found["reposts"] == pytest.approx(1 / 2 / 4)
    assert found["comments"] == pytest.approx(1 / 2 / 4)
    assert found["followers"] == pytest.approx(1 / 2 / 4)
    assert standing.count([0, 1]) == 2
    assert standing.figures([4], 5)["reach"] == pytest.approx(1 / 4)
    assert set(standing.figures([2], 5).values()) == {0.0}  # who posted nothing reached nobody


def test_reading_again_goes_on_where_it_was(tables: Tables) -> None:
    post, ledger = tables.post(0), Ledger()
    tables.shown(1, [post])
    assert ledger.read(tables.db).posts[0].views == 1
    tables.shown(2, [post])
    tables.trace(2, "create_post", "{}")
    assert ledger.read(tables.db).posts[0].views == 2
    assert ledger.read(tables.db) == Ledger().read(tables.db)


def test_tables_that_are_not_oasis_are_refused(tmp_path: Path, tables: Tables) -> None:
    with pytest.raises(ScenarioError, match=r"tables cannot be read .*camel-oasis 0\.2\.5"):
        Ledger().read(sqlite3.connect(":memory:"))
    tables.trace(1, "refresh", "not json")
    with pytest.raises(ScenarioError, match="JSONDecodeError"):
        Ledger().read(tables.db)
    tables.db.execute("DELETE FROM trace")
    tables.shown(1, [77])
    with pytest.raises(ScenarioError, match="KeyError: 77"):
        Ledger().read(tables.db)
