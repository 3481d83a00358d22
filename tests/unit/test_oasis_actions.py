"""What an OASIS agent sees and may do: only what the platform would accept."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios.oasis.actions import Call, Menu, Post, check_result, done_by, menu

GROUPS = {"red": range(2), "blue": range(2, 4)}
FEED = (
    Post(7, author=1, likes=2, text="Tea."), Post(8, author=0, likes=9, text="Mine."),
    Post(9, author=3, likes=0, text="Books."), Post(10, author=2, likes=0, text="Songs."),
)  # fmt: skip


def offered(feed: tuple[Post, ...] = FEED, me: int = 0, **settings: Any) -> Menu:
    settings = {"kinds": ("like", "repost", "nothing"), "own_group": "red", **settings}
    return menu(feed, me, groups=GROUPS, **settings)


def calls(menu: Menu) -> dict[str, tuple[str, dict[str, Any]]]:
    return {act.text: (act.tool, dict(act.args)) for act in menu.acts}


def test_it_is_shown_the_best_post_of_each_group_and_may_act_upon_it() -> None:
    found = offered()
    assert found.observation.user.splitlines() == ["Posts and their likes:", "red 2", "blue 0"]
    assert found.observation.system == "You are with red. Choose one action."
    assert calls(found) == {
        "like red": ("like_post", {"post_id": 7}),
        "like blue": ("like_post", {"post_id": 10}),  # as well liked as 9, and newer
        "repost red": ("repost", {"post_id": 7}),
        "repost blue": ("repost", {"post_id": 10}),
        "nothing": ("do_nothing", {}),
    }


def test_its_own_posts_are_not_offered() -> None:
    assert offered(me=1).acts[0].args == {"post_id": 8}
    alone = offered((FEED[1],))
    assert alone.observation.user.splitlines()[1:] == ["red none", "blue none"]
    assert alone.choices == ("nothing",)


def test_what_was_done_is_not_offered_again() -> None:
    assert offered(done={("like", 7)}).choices == ("like blue", "repost red", "repost blue", "nothing")
    both = offered(done={("like", 10), ("repost", 10)})  # nothing is left to do about it, so the next one comes
    assert calls(both)["like blue"] == ("like_post", {"post_id": 9})


def test_a_follow_is_of_the_author_and_done_once() -> None:
    found = offered(kinds=("follow", "nothing"))
    assert calls(found)["follow red"] == ("follow", {"followee_id": 1})
    assert offered(kinds=("follow", "nothing"), done={("follow", 1)}).choices == ("follow blue", "nothing")


def test_several_posts_of_a_group_are_numbered_from_the_best() -> None:
    found = offered(targets=2, show_text=True)
    assert found.observation.user.splitlines()[1:] == ["red1 2 Tea.", "blue1 0 Songs.", "blue2 0 Books."]
    assert calls(found)["like blue2"] == ("like_post", {"post_id": 9})


def test_posting_and_commenting_say_what_they_are_given() -> None:
    found = offered(kinds=("comment", "post"), texts=("One.", "Two."), comment="Yes!")
    assert calls(found) == {
        "comment red": ("create_comment", {"post_id": 7, "content": "Yes!"}),
        "comment blue": ("create_comment", {"post_id": 10, "content": "Yes!"}),
        "post 1": ("create_post", {"content": "One."}),
        "post 2": ("create_post", {"content": "Two."}),
    }
    assert offered(kinds=("post",), texts=("One.",)).choices == ("post",)


def test_without_actions_at_posts_the_feed_is_still_shown() -> None:
    found = offered(kinds=("post", "nothing"), texts=("One.",))
    assert found.observation.user.splitlines()[1:] == ["red 2", "blue 0"]


def test_a_post_shown_twice_counts_once_and_strangers_do_not() -> None:
    assert offered((*FEED, FEED[0], Post(11, author=50, likes=99))) == offered()


def test_the_two_sides_get_the_same_words() -> None:
    mirrored = tuple(Post(p.post_id, (p.author + 2) % 4, p.likes, p.text) for p in FEED)
    one, other = offered(), offered(mirrored, me=2, own_group="blue")
    swapped = one.observation.user.replace("red", "?").replace("blue", "red").replace("?", "blue")
    assert sorted(other.observation.user.splitlines()) == sorted(swapped.splitlines())


def test_in_chinese() -> None:
    found = offered(language="zh")
    assert found.choices == ("赞red", "赞blue", "转red", "转blue", "无")
    assert found.observation.prefix == "动作："


OK = {"success": True}


def test_what_an_accepted_call_did_is_remembered() -> None:
    assert done_by(Call("like_post", {"post_id": "7"}, OK, True)) == ("like", 7)
    assert done_by(Call("follow", {"followee_id": 3}, OK, True)) == ("follow", 3)
    assert done_by(Call("create_comment", {"post_id": 7, "content": "a"}, OK, True)) is None
    assert done_by(Call("do_nothing", {}, OK, True)) is None
    assert done_by(Call("like_post", {"post_id": 7}, {"success": False, "error": "…"}, True)) is None
    assert done_by(Call("like_post", {"post_id": 7}, OK, False)) is None


def test_a_platform_that_declines_is_no_failure_and_one_that_fails_is() -> None:
    check_result(Call("like_post", {}, {"success": False, "error": "Like record already exists."}, True), 1)
    check_result(Call("no_such_tool", {}, "there is no tool", False), 1)
    check_result(Call("repost", {}, OK, True), 1)
    failed = Call("like_post", {"post_id": 3}, {"success": False, "error": "database is locked"}, True)
    with pytest.raises(ScenarioError, match=r"agent 4, like_post\(\{'post_id': 3\}\): database is locked"):
        check_result(failed, 4)
