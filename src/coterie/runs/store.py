"""Calls and episodes of a run in one SQLite file, for looking closely at what was said.

    runs       one row for each process that wrote          updates    episodes played, kept, left out and failed
    episodes   one row per kept episode                     calls      one row per turn of a kept episode
    failures   one row for every failed episode

Metrics cover all episodes of an update; this file holds a sample of them, chosen evenly over the tasks and the same
way every time, and all failures. Texts come from models and tasks: they only ever reach SQLite as bound parameters.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from coterie.errors import RunFolderError
from coterie.runs.sinks import json_text
from coterie.types import Episode, FailedEpisode, Turn

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY, started TEXT NOT NULL, coterie TEXT NOT NULL, first_update INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS updates (
    update_no INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs, played INTEGER NOT NULL,
    kept INTEGER NOT NULL, left_out INTEGER NOT NULL, failed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    update_no INTEGER NOT NULL, episode_id TEXT NOT NULL, group_id TEXT NOT NULL,
    task_id TEXT NOT NULL, task_type TEXT NOT NULL, task TEXT NOT NULL,
    outcome TEXT NOT NULL, rewards TEXT NOT NULL, withheld TEXT NOT NULL,
    PRIMARY KEY (update_no, episode_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    update_no INTEGER NOT NULL, episode_id TEXT NOT NULL, seat_id TEXT NOT NULL, turn INTEGER NOT NULL,
    model_id TEXT, adapter TEXT, tier TEXT NOT NULL, server TEXT NOT NULL, kind TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, text TEXT NOT NULL,
    valid INTEGER NOT NULL, choice INTEGER, logprob REAL NOT NULL, entropy REAL,
    PRIMARY KEY (update_no, episode_id, seat_id, turn)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS calls_by_model ON calls (model_id, update_no);
CREATE TABLE IF NOT EXISTS failures (
    update_no INTEGER NOT NULL, episode_id TEXT NOT NULL, task_id TEXT NOT NULL, task TEXT NOT NULL,
    error TEXT NOT NULL);
"""

_TABLES = ("updates", "episodes", "calls", "failures")


class Store:
    """The database of a run; made when it is not there. Use it as a context manager, or `close` it.

    Raises:
        RunFolderError: the file is not a database of a run, is of a newer Coterie, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run: int | None = None
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        except sqlite3.Error as error:
            raise RunFolderError(f"cannot open database {path}: {error}") from error
        self._db.row_factory = sqlite3.Row
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            raise RunFolderError(f"{path} is not a database of a run: {error}; move it away to go on") from error
        except RunFolderError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA_VERSION:
            raise RunFolderError(
                f"database {self.path} has schema {found}, this Coterie knows up to {SCHEMA_VERSION}; upgrade Coterie"
            )
        if found == 0 and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise RunFolderError(f"{self.path} is a database of something else; move it away to go on")
        self._db.execute("PRAGMA journal_mode = WAL")  # readers never wait for the run
        self._db.execute("PRAGMA synchronous = NORMAL")
        if found == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def record(self, update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], keep: int) -> None:
        """Write one update in one transaction: at most `keep` of `episodes`, all of `failed`, and the counts.

        Raises:
            RunFolderError: the update is there already (`delete_after` forgets it), or the disk refuses.
        """
        kept = choose(episodes, keep)
        with self._transaction(f"cannot write update {update}"):
            run = self._register(update) if self._run is None else self._run
            self._insert("updates", [(update, run, len(episodes), len(kept), len(episodes) - len(kept), len(failed))])
            self._insert("episodes", [_episode_row(update, episode) for episode in kept])
            self._insert("calls", [row for episode in kept for row in _call_rows(update, episode)])
            self._insert("failures", [_failure_row(update, failure) for failure in failed])
        self._run = run

    def _register(self, update: int) -> int | None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = (now, version("coterie"), update)
        return self._db.execute("INSERT INTO runs (started, coterie, first_update) VALUES (?, ?, ?)", row).lastrowid

    @contextmanager
    def _transaction(self, problem: str) -> Iterator[None]:
        """All of it or nothing; an error of SQLite's becomes a `RunFolderError` that opens with `problem`."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise RunFolderError(f"{problem} in {self.path}: {error}") from error

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    def delete_after(self, update: int) -> None:
        """Forget every update past `update`; they are done again on resume."""
        with self._transaction(f"cannot forget updates after {update}"):
            for table in _TABLES:
                self._db.execute(f"DELETE FROM {table} WHERE update_no > ?", (update,))

    def updates(self) -> list[dict[str, Any]]:
        """{"update", "run", "played", "kept", "left_out", "failed"} of every update, ascending."""
        return self._select("updates", {}, "update_no", None)

    def episodes(self, update: int | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Kept episodes as mappings, oldest update first; task, outcome, rewards and withheld are JSON values."""
        rows = self._select("episodes", {"update_no": update}, "update_no, episode_id", limit)
        for row in rows:
            for name in ("task", "outcome", "rewards", "withheld"):
                row[name] = json.loads(row[name])
        return rows

    def calls(
        self,
        update: int | None = None,
        episode_id: str | None = None,
        model_id: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """Turns of kept episodes as mappings, oldest update first; each filter is optional."""
        filters = {"update_no": update, "episode_id": episode_id, "model_id": model_id}
        rows = self._select("calls", filters, "update_no, episode_id, seat_id, turn", limit)
        for row in rows:
            row["valid"] = bool(row["valid"])
        return rows

    def failures(self, update: int | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Failed episodes: {"update", "episode_id", "task_id", "task", "error"}."""
        rows = self._select("failures", {"update_no": update}, "update_no, rowid", limit)
        for row in rows:
            row["task"] = json.loads(row["task"])
        return rows

    def _select(self, table: str, equal: Mapping[str, Any], order: str, limit: int | None) -> list[dict[str, Any]]:
        """Table and column names are this file's own; only values come from outside, and those are bound."""
        wanted = {column: value for column, value in equal.items() if value is not None}
        where = " AND ".join(f"{column} = ?" for column in wanted) or "1"
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY {order} LIMIT ?"
        with closing(self._db.execute(query, (*wanted.values(), -1 if limit is None else limit))) as cursor:
            rows = [dict(row) for row in cursor]
        for row in rows:
            row["update"] = row.pop("update_no")
        return rows

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def choose(episodes: Sequence[Episode], keep: int) -> list[Episode]:
    """At most `keep` episodes, spread evenly over groups, and the same ones in whatever order they come.

    Every group gives one episode, then a second, and so on; when not every group can give one more, those that do
    are spaced evenly over the groups.
    """
    groups: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda e: (e.group, e.episode_id)):
        groups.setdefault(episode.group, []).append(episode)
    chosen: list[Episode] = []
    waiting = list(groups.values())
    for turn in range(max(map(len, waiting), default=0)):
        waiting = [group for group in waiting if len(group) > turn]
        room = keep - len(chosen)
        if room < len(waiting):
            waiting = [waiting[at * len(waiting) // room] for at in range(room)]
        chosen += [group[turn] for group in waiting]
        if len(chosen) >= keep:
            break
    return chosen


def _episode_row(update: int, episode: Episode) -> tuple[Any, ...]:
    return (
        update,
        _text(episode.episode_id),
        _text(episode.group),
        _text(episode.task.task_id),
        episode.task.task_type.value,
        json_text(_plain(episode.task)),
        json_text(_plain(episode.outcome)),
        json_text(_plain(episode.rewards)),
        json_text(sorted(episode.withheld)),
    )


def _call_rows(update: int, episode: Episode) -> Iterable[tuple[Any, ...]]:
    for seat_id, trajectory in episode.trajectories.items():
        for number, turn in enumerate(trajectory.turns):
            yield (update, _text(episode.episode_id), _text(seat_id), number, *_call(turn))


def _call(turn: Turn) -> tuple[Any, ...]:
    return (
        turn.model_id,
        turn.adapter.name if turn.adapter else None,
        turn.tier.value,
        _text(turn.server),
        _text(turn.kind),
        len(turn.prompt_ids),
        len(turn.token_ids),
        turn.latency_s,
        _text(turn.text),
        turn.valid,
        turn.choice,
        sum(turn.logprobs),
        sum(turn.entropy) / len(turn.entropy) if turn.entropy else None,
    )


def _failure_row(update: int, failure: FailedEpisode) -> tuple[Any, ...]:
    task = failure.task
    return (update, _text(failure.episode_id), _text(task.task_id), json_text(_plain(task)), _text(failure.error))


def _text(text: str) -> str:
    """UTF-8 can hold no lone surrogate; half a character from a model becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    """JSON values of task data; what JSON has no form for is kept as its repr."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=repr)
    return repr(value)
