"""One OASIS simulation: a platform on a database of its own, and users that act as they are told.

    async with Simulation(users, settings, seed) as simulation:
        posts = await simulation.feeds()                       a round: what each user is shown,
        calls = await simulation.act({0: act, 1: act})         and what each does, through OasisEnv.step

Differences from plain OASIS, all by subclassing:

- answers come back when they are there instead of being looked for every 0.1 s;
- time is the round's number, and what the recommender draws depends on the seed, the round and the user, so that the
  same seed gives the same simulation (OASIS uses the clock and the global generator);
- a platform that fails ends the simulation with the cause; OASIS would wait for its answer for ever;
- the database is a temporary one of SQLite's own, which is gone afterwards, even where the process is killed.

Importing this module imports OASIS: use `coterie.scenarios.oasis.loading.load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol, Self

from oasis import ActionType, AgentGraph, LLMAction, ManualAction, Platform, UserInfo, make
from oasis.clock.clock import Clock
from oasis.social_agent.agent_action import SocialAction
from oasis.social_agent.agent_environment import SocialEnvironment
from oasis.social_platform.channel import Channel
from oasis.social_platform.typing import DefaultPlatformType

from coterie.errors import ScenarioError
from coterie.scenarios.oasis.actions import Act, Call, Post, check_result

_EPOCH: Final = datetime(2025, 1, 1)

_TEMPORARY: Final = ""
"""As a path, to SQLite: a database of this connection's own, in memory, and in a nameless file where it grows large.
(OASIS writes one called ":memory:" out when it ends.)"""


@dataclass(frozen=True, slots=True)
class PlatformSettings:
    """Of the platform."""

    recommender: Literal["reddit", "random"] = "reddit"
    recommended: int = 10
    """Posts the recommender keeps for each user."""
    shown: int = 3
    """Posts of those a user is shown, drawn at random."""
    following: int = 0
    """Posts of followed users shown besides (recommender random only)."""
    minutes: float = 30.0
    """A round lasts, on the platform's clock; the reddit recommender lets posts age by it."""


class User(Protocol):
    """What OasisEnv needs of an agent, and a simulation to know what it did."""

    social_agent_id: int
    user_info: Any
    channel: Any
    env: Any
    calls: list[Call]
    """What it did in the latest round."""
    look: Callable[[Any], Awaitable[list[Post]]] | None
    """How it is shown its feed; given by its simulation."""

    async def perform_action_by_data(self, func_name: Any, *args: Any, **kwargs: Any) -> Any: ...

    async def perform_action_by_llm(self) -> Any: ...


class ToldUser:
    """A user that does what it is told. Decisions are taken elsewhere, so it is no ChatAgent and costs nothing."""

    def __init__(self, agent_id: int, name: str, bio: str) -> None:
        self.social_agent_id = agent_id
        self.user_info = user_info(name, bio)
        self.channel: Any = None
        self.env = SocialEnvironment(SocialAction(agent_id, None))
        self.calls: list[Call] = []
        self.look: Callable[[Any], Awaitable[list[Post]]] | None = None

    async def perform_action_by_data(self, func_name: Any, *args: Any, **kwargs: Any) -> Any:
        """Do one action of `ActionType`, with its arguments by name."""
        name = ActionType(func_name).value
        result = await getattr(self.env.action, name)(*args, **kwargs)
        self.calls.append(Call(name, kwargs, result, True))
        return result

    async def perform_action_by_llm(self) -> Any:
        """Raises `ScenarioError`: it has no model."""
        raise ScenarioError(f"OASIS, agent {self.social_agent_id}: it is told what to do and has no model to ask")


def user_info(name: str, bio: str) -> UserInfo:
    """A profile with nothing but a name and a line about it."""
    return UserInfo(user_name=name, name=name, description=bio, profile=None, recsys_type="reddit")


class Simulation:
    """See the module."""

    def __init__(self, users: Sequence[User], settings: PlatformSettings, seed: int) -> None:
        """
        Args:
            users: their agent ids are 0, 1, …, in order.
            seed: of everything the platform draws.

        Raises:
            ScenarioError: the users are numbered otherwise.
        """
        ids = [user.social_agent_id for user in users]
        if ids != list(range(len(users))):
            raise ScenarioError(f"OASIS' users must be numbered 0, 1, 2, …; these are {ids}")
        self.users = list(users)
        self.settings = settings
        self._seed = seed
        self._env: Any = None
        self._texts: dict[int, str] = {}

    async def __aenter__(self) -> Self:
        """Start the platform and sign the users up. Raises `ScenarioError` when it does not take them."""
        channel = _Channel()
        settings = self.settings
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the path
            self._clock = _Clock(settings.minutes)
            self._platform = _Platform(
                self._seed, _TEMPORARY, channel=channel, sandbox_clock=self._clock, start_time=_EPOCH,
                allow_self_rating=False, recsys_type=settings.recommender, refresh_rec_post_count=settings.shown,
                max_rec_post_len=settings.recommended, following_post_count=settings.following,
            )  # fmt: skip
        self._platform.db.execute("PRAGMA journal_mode = MEMORY")  # it commits after every command
        graph = AgentGraph()
        for user in self.users:
            user.look = self.look
            graph.add_agent(user)
        self._env = make(agent_graph=graph, platform=self._platform, database_path=_TEMPORARY)
        try:
            await self._env.reset()
            (found,) = self.db.execute("SELECT count(*) FROM user").fetchone()
            if found != len(self.users):
                raise ScenarioError(f"OASIS signed up {found} of {len(self.users)} users")
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    @property
    def db(self) -> sqlite3.Connection:
        """The platform's database."""
        connection: sqlite3.Connection = self._platform.db
        return connection

    async def publish(self, agent: int, text: str) -> None:
        """Have a user post, outside of any round. Raises `ScenarioError` when the platform refuses."""
        result = await self.users[agent].env.action.create_post(text)
        if not result["success"]:
            raise ScenarioError(f"OASIS, agent {agent}, create_post: {result.get('error', result)}")

    async def feeds(self) -> list[list[Post]]:
        """Recommend anew, and show every user its feed."""
        await self._platform.update_rec_table()
        self._platform.recommended = True
        return [await self.look(user) for user in self.users]

    async def look(self, user: User) -> list[Post]:
        """Show one user its feed."""
        seen = await user.env.action.refresh()
        if "error" in seen:
            raise ScenarioError(f"OASIS, agent {user.social_agent_id}, refresh: {seen['error']}")
        return self._originals(post["post_id"] for post in seen.get("posts", ()))

    async def act(self, acts: Mapping[int, Act]) -> dict[int, tuple[Call, ...]]:
        """One round in which every user named does one thing, in this order.

        Raises:
            ScenarioError: the platform failed.
        """
        return await self._step({
            self.users[agent]: ManualAction(action_type=ActionType(act.tool), action_args=dict(act.args))
            for agent, act in acts.items()
        })  # fmt: skip

    async def ask(self, agents: Sequence[int]) -> dict[int, tuple[Call, ...]]:
        """One round in which these users, which have models, look at their feeds and act, each by itself."""
        return await self._step({self.users[agent]: LLMAction() for agent in agents})

    async def _step(self, actions: Mapping[Any, Any]) -> dict[int, tuple[Call, ...]]:
        for user in self.users:
            user.calls.clear()
        step, before = self._clock.time_step, self._env.platform_type
        await self._env.step(dict(actions))
        if before is DefaultPlatformType.REDDIT:  # OasisEnv moves the clock for the other kind only
            self._clock.time_step = step + 1
        for user in self.users:
            for call in user.calls:
                check_result(call, user.social_agent_id)
        return {user.social_agent_id: tuple(user.calls) for user in actions}

    def _originals(self, ids: Iterator[int]) -> list[Post]:
        """The posts with these ids; for a repost, the post it repeats."""
        found = []
        for post in ids:
            row = self.db.execute(
                "SELECT o.post_id, o.user_id, o.num_likes, coalesce(o.quote_content, o.content) FROM post AS p "
                "JOIN post AS o ON o.post_id = CASE WHEN p.original_post_id IS NULL OR p.quote_content IS NOT NULL "
                "THEN p.post_id ELSE p.original_post_id END WHERE p.post_id = ?",
                (post,),
            ).fetchone()
            found.append(Post(*row))
        return found

    async def _stop(self) -> None:
        """Stop the platform and close its database, which deletes it."""
        task = self._env.platform_task if self._env is not None and "platform_task" in vars(self._env) else None
        if task is not None and not task.done():
            await self._env.close()
            return
        self._platform.db.close()
        if task is not None and not task.cancelled():
            task.exception()  # raised where it was waited for; asked for, so that asyncio does not complain


class _Channel(Channel):  # type: ignore[misc]  # camel-oasis is an extra, so unknown to the type checker
    """Hands an answer to whoever waits for it, at once."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._failure: BaseException | None = None

    async def write_to_receive_queue(self, action_info: Any) -> str:
        message_id = str(uuid.uuid4())
        if self._failure is not None:
            raise _stopped(self._failure)
        self._waiting[message_id] = asyncio.get_running_loop().create_future()
        await self.receive_queue.put((message_id, action_info))
        return message_id

    async def send_to(self, message: Any) -> None:
        waiting = self._waiting[message[0]]
        if not waiting.done():  # whoever asked may have been cancelled
            waiting.set_result(message)

    async def read_from_send_queue(self, message_id: str) -> Any:
        try:
            return await self._waiting[message_id]
        finally:
            del self._waiting[message_id]

    def fail(self, cause: BaseException) -> None:
        """No answer will come any more."""
        self._failure = cause
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_stopped(cause))


def _stopped(cause: BaseException) -> ScenarioError:
    error = ScenarioError(f"the OASIS platform stopped: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


class _Clock(Clock):  # type: ignore[misc]  # see _Channel
    """Time by rounds. Every look at it moves it by a microsecond, because a user's traces are told apart by time."""

    def __init__(self, minutes: float) -> None:
        super().__init__(1)
        self._minutes = minutes
        self._looks = 0

    def time_transfer(self, now_time: datetime, start_time: datetime) -> datetime:
        self._looks += 1
        passed: datetime = start_time + timedelta(minutes=self._minutes * self.time_step, microseconds=self._looks)
        return passed


class _Platform(Platform):  # type: ignore[misc]  # see _Channel
    """Draws by its seed, the round and the user alone, and says when it fails."""

    def __init__(self, seed: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seed = seed
        self.recommended = False
        """Whether feeds were shown since the last round, so that OasisEnv.step need not recommend once more: looking at
        feeds changes nothing of what is recommended, and it is the costliest part of a round."""

    async def running(self) -> None:
        try:
            await super().running()
        except BaseException as cause:
            self.channel.fail(cause)
            raise

    async def update_rec_table(self) -> None:
        if self.recommended:
            self.recommended = False
            return
        await _drawing(f"{self._seed}:{self.sandbox_clock.time_step}", super().update_rec_table)

    async def refresh(self, agent_id: int) -> Any:
        return await _drawing(f"{self._seed}:{self.sandbox_clock.time_step}:{agent_id}", super().refresh, agent_id)


async def _drawing(seed: str, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run what draws from the global generator with this seed; the generator is left as it was. The work must not wait
    for anything, or others would draw meanwhile: OASIS' does not."""
    before = random.getstate()
    random.seed(seed)
    try:
        return await work(*args)
    finally:
        random.setstate(before)
