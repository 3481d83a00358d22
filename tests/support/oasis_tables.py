"""A database with the columns of camel-oasis 0.2.5 that Coterie reads, for tests without it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

_SCHEMA = """
CREATE TABLE user (user_id INTEGER PRIMARY KEY AUTOINCREMENT, agent_id INTEGER, user_name TEXT);
CREATE TABLE post (
    post_id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER, original_post_id INTEGER, content TEXT DEFAULT '',
    quote_content TEXT, created_at DATETIME, num_likes INTEGER DEFAULT 0
);
CREATE TABLE "like" (like_id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER, post_id INTEGER);
CREATE TABLE comment (comment_id INTEGER PRIMARY KEY AUTOINCREMENT, post_id INTEGER, user_id INTEGER, content TEXT);
CREATE TABLE follow (follow_id INTEGER PRIMARY KEY AUTOINCREMENT, follower_id INTEGER, followee_id INTEGER);
CREATE TABLE trace (
    user_id INTEGER, created_at DATETIME, action TEXT, info TEXT, PRIMARY KEY(user_id, created_at, action, info)
);
"""


class Tables:
    """Users 0 .. n-1 on a platform that does as it is told."""

    def __init__(self, path: Path, users: int) -> None:
        self.db = sqlite3.connect(path)
        self.db.executescript(_SCHEMA)
        self.db.executemany("INSERT INTO user (user_id) VALUES (?)", [(user,) for user in range(users)])
        self._time = 0

    def post(self, author: int) -> int:
        return self._post(author, None, None)

    def repost(self, user: int, post: int) -> int:
        return self._post(user, post, None)

    def quote(self, user: int, post: int) -> int:
        return self._post(user, post, "and so say I")

    def _post(self, user: int, original: int | None, quote: str | None) -> int:
        made = self.db.execute(
            "INSERT INTO post (user_id, original_post_id, quote_content) VALUES (?, ?, ?)", (user, original, quote)
        ).lastrowid
        assert made is not None
        return made

    def shown(self, user: int, posts: Sequence[int]) -> None:
        self.trace(user, "refresh", json.dumps({"posts": [{"post_id": post} for post in posts]}))

    def trace(self, user: int, action: str, info: str) -> None:
        self._time += 1
        self.db.execute("INSERT INTO trace VALUES (?, ?, ?, ?)", (user, self._time, action, info))

    def like(self, user: int, post: int) -> None:
        self.db.execute('INSERT INTO "like" (user_id, post_id) VALUES (?, ?)', (user, post))

    def comment(self, user: int, post: int) -> None:
        self.db.execute("INSERT INTO comment (user_id, post_id) VALUES (?, ?)", (user, post))

    def follow(self, user: int, other: int) -> None:
        self.db.execute("INSERT INTO follow (follower_id, followee_id) VALUES (?, ?)", (user, other))
