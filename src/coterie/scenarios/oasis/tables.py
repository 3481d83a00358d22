"""What happened on the platform, read from its tables.

    trace (refresh) -> who was shown which post; a repost shows the post it repeats
    like, comment, post (reposts), follow -> who reacted

Nobody counts at its own posts: not as a viewer, nor by likes, comments or reposts. A follow counts where both ends are
users, because the platform lets anybody follow an id that does not exist. Every figure is divided by what is possible,
mostly the number of other agents, so it is in [0, 1].
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from coterie.errors import ScenarioError

FIGURES: Final = ("reach", "views", "likes", "reposts", "comments", "followers")


@dataclass(frozen=True, slots=True)
class PostFigures:
    """One original post (a quote is its author's own)."""

    post_id: int
    author: int
    viewers: frozenset[int]
    """Other users it was shown to, itself or as a repost."""
    views: int
    """Times it was shown to others."""
    likers: frozenset[int]
    reposters: frozenset[int]
    commenters: frozenset[int]


@dataclass(frozen=True, slots=True)
class Standing:
    """Everything that has happened so far."""

    posts: tuple[PostFigures, ...]
    followers: Mapping[int, frozenset[int]]
    """Agent -> the other users that follow it."""

    def figures(self, agents: Collection[int], population: int) -> dict[str, float]:
        """`FIGURES` of some agents among `population` users, in [0, 1].

        Means per post, 0 without a post; followers: mean per agent; views: their posts' share of everything that was
        shown to others, 0 when nothing was.
        """
        others = max(1, population - 1)
        posts = [post for post in self.posts if post.author in agents]
        shown = sum(post.views for post in self.posts)

        def per_post(what: str) -> float:
            return fmean(len(getattr(post, what)) for post in posts) / others if posts else 0.0

        return {
            "reach": per_post("viewers"),
            "views": sum(post.views for post in posts) / shown if shown else 0.0,
            "likes": per_post("likers"),
            "reposts": per_post("reposters"),
            "comments": per_post("commenters"),
            "followers": fmean(len(self.followers.get(agent, ())) for agent in agents) / others if agents else 0.0,
        }

    def count(self, agents: Collection[int]) -> int:
        """How many posts these agents made."""
        return sum(post.author in agents for post in self.posts)


@dataclass(slots=True)
class Ledger:
    """Reads one platform's tables again and again; what was shown is read once."""

    _shown: list[tuple[int, int]] = field(default_factory=list)
    """(user, id of the post or repost), in order."""
    _last: int = 0

    def read(self, db: sqlite3.Connection) -> Standing:
        """The standing now. Raises `ScenarioError` for tables that are not OASIS'."""
        try:
            return self._read(db)
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise ScenarioError(
                f"the platform's tables cannot be read ({type(error).__name__}: {error}); "
                "they are expected as camel-oasis 0.2.5 makes them"
            ) from error

    def _read(self, db: sqlite3.Connection) -> Standing:
        for row, user, info in db.execute(
            "SELECT rowid, user_id, info FROM trace WHERE action = 'refresh' AND rowid > ? ORDER BY rowid",
            (self._last,),
        ):
            self._last = row
            self._shown += [(user, int(post["post_id"])) for post in json.loads(info)["posts"]]
        authors: dict[int, int] = {}
        root: dict[int, int] = {}
        reposters: dict[int, set[int]] = {}
        rows = db.execute("SELECT post_id, user_id, original_post_id, quote_content FROM post ORDER BY post_id")
        for post, user, original, quote in rows:
            if original is None or quote is not None:
                authors[post], root[post] = user, post
            else:
                root[post] = original
                reposters.setdefault(original, set()).add(user)
        viewers: dict[int, set[int]] = {}
        views: dict[int, int] = {}
        for user, shown in self._shown:
            post = root[shown]
            if user != authors[post]:
                viewers.setdefault(post, set()).add(user)
                views[post] = views.get(post, 0) + 1
        likers = _who(db, 'SELECT post_id, user_id FROM "like"')
        commenters = _who(db, "SELECT post_id, user_id FROM comment")
        followers = _who(
            db,
            "SELECT followee_id, follower_id FROM follow JOIN user AS a ON a.user_id = follower_id "
            "JOIN user AS b ON b.user_id = followee_id WHERE follower_id != followee_id",
        )

        def others(found: Mapping[int, Collection[int]], post: int) -> frozenset[int]:
            return frozenset(found.get(post, ())) - {authors[post]}

        return Standing(
            tuple(
                PostFigures(
                    post,
                    author,
                    frozenset(viewers.get(post, ())),
                    views.get(post, 0),
                    others(likers, post),
                    others(reposters, post),
                    others(commenters, post),
                )
                for post, author in authors.items()
            ),
            {agent: frozenset(found) for agent, found in followers.items()},
        )


def _who(db: sqlite3.Connection, query: str) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for target, user in db.execute(query):
        found.setdefault(target, set()).add(user)
    return found
