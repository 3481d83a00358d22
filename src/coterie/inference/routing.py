"""What is known of each server, and which one a call goes to.

A `Member` is one server as the pool sees it: places in use and how many there are (`Limit`), how long calls take,
whether it may be called at all (`Breaker`, pause, retirement), and which adapters it holds. A policy picks among
members that may take a call now; it changes nothing.

    expected time of a call there = latency, measured * (1 + in use / limit)

The load-aware policies (least_loaded, power_of_two, prefix) leave a slow server's free place empty while the calls that
wait would be done sooner by faster servers, also when those are full: with two unequal servers the best rule is a
threshold on the queue (Lin & Kumar 1984, "Optimal control of a queueing system with two heterogeneous servers"). It is
what keeps the last calls of a batch from being the slow server's. random and round_robin look at nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.inference.breaker import Breaker, BreakerState
from coterie.inference.limit import Limit
from coterie.inference.wire import ServerSpec

POLICIES = ("power_of_two", "least_loaded", "round_robin", "random", "prefix")
LOAD_AWARE = ("power_of_two", "least_loaded", "prefix")

FORGET_S = 30.0
"""A server's latency, while nobody measures it, drifts to that of the best within some such times."""
LOAD_BOUND = 1.25
"""Of prefix: a server takes at most this many times its share of the calls under way."""


class Latency:
    """Mean seconds of a call of weight 1: seconds over weight, of all calls at first, then weighing the latest a
    tenth. Both are averaged before they are divided, for a small call that had to wait says little of speed."""

    def __init__(self) -> None:
        self._count = 0
        self._seconds = 0.0
        self._weight = 0.0

    @property
    def mean(self) -> float | None:
        """None: no call was answered yet."""
        return self._seconds / self._weight if self._count else None

    def add(self, seconds: float, weight: float) -> None:
        """One answered call."""
        self._count = min(self._count + 1, 10)
        self._seconds += (seconds - self._seconds) / self._count
        self._weight += (weight - self._weight) / self._count


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server at one moment, for logs, metrics and people."""

    name: str
    healthy: bool
    """Whether it takes calls, if need be after a pause it asked for."""
    in_flight: int
    """Calls it has been given and not yet answered."""
    waiting: int
    """Calls that it says wait in its own queue, when last asked."""
    failures: int
    """Failed calls in a row."""
    breaker: str
    """closed, open, half_open."""
    retired_because: str
    """Empty: it is not retired."""
    adapters: tuple[str, ...]
    """Known to be loaded there."""
    mean_latency_s: float | None
    """Of an answered call per weight, moving; None: none was answered yet."""
    limit: int = 0
    """Calls it is given at once, as learnt."""


@dataclass(slots=True, eq=False)
class Member:
    """One server of the pool. Times are on the pool's clock, in seconds."""

    spec: ServerSpec
    limit: Limit
    breaker: Breaker = field(default_factory=Breaker)
    latency: Latency = field(default_factory=Latency)
    in_flight: int = 0
    trial: bool = False
    """Whether the one call a half-open breaker allows is under way."""
    held: set[str] = field(default_factory=set)
    """Names known to be served there."""
    asked: bool = False
    """Whether the server itself has said what it serves; if not, it may serve more than is known."""
    paused_until: float = 0.0
    pause_s: float = 0.0
    """Length of the last pause, for the next one."""
    retired: str | None = None
    why: str = ""
    """Latest fault that spoke against it."""
    draining: bool = False
    last_answer: float = -math.inf
    busy_since: float = 0.0
    """When it was last given a call while it had none."""
    unwell_since: float | None = None
    """First of the latest looks that found it unwell."""
    waiting: int = 0
    foreign: int = 0
    """Calls of others it was serving when last asked."""
    cache_usage: float = 0.0
    alarms: set[asyncio.Timeout] = field(default_factory=set)
    """Of the calls under way there."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def closed(self) -> bool:
        """Whether it belongs to the pool and calls go through."""
        return self.retired is None and not self.draining and self.breaker.state is BreakerState.CLOSED

    def serves(self, now: float) -> bool:
        """Whether it may be given calls now, were there a free place."""
        return (
            self.retired is None
            and not self.draining
            and self.breaker.state is not BreakerState.OPEN
            and self.paused_until <= now
        )

    def places(self, learnt: bool) -> int:
        """Free places; `learnt` says whether the learnt limit holds or only the configured one."""
        if self.breaker.state is BreakerState.HALF_OPEN:
            # calls from before the pause may still be there
            return 0 if self.trial else max(0, min(1, self.limit.most - self.in_flight))
        return (self.limit.value if learnt else self.limit.most) - self.in_flight

    def seconds(self, now: float, best: float) -> float:
        """Expected seconds of a call of weight 1. One that owes answers and gives none looks slower by the second;
        one that was not asked for long looks more and more like the `best`."""
        mean = self.latency.mean
        if mean is None:
            mean = best
        silent_since = max(self.last_answer, self.busy_since)
        if self.in_flight:
            # the mean lags behind a queue that has just grown
            queued = (self.in_flight + self.foreign + 1) * (self.limit.pace or 0.0)
            return max(mean, queued, now - silent_since)
        age = max(0.0, now - self.last_answer) if math.isfinite(self.last_answer) else 0.0
        return best + (mean - best) * math.exp(-age / FORGET_S)

    def state(self) -> ServerState:
        """A snapshot."""
        return ServerState(
            name=self.name,
            healthy=self.closed,
            in_flight=self.in_flight,
            waiting=self.waiting,
            failures=self.breaker.failures,
            breaker=str(self.breaker.state),
            retired_because=self.retired or "",
            adapters=tuple(sorted(self.held)),
            mean_latency_s=self.latency.mean,
            limit=self.limit.value,
        )

    def looked_at(self, metrics: Mapping[str, float]) -> None:
        """Take in what the server says of its own load (vLLM's metric names)."""
        self.waiting = int(metrics.get("vllm:num_requests_waiting", 0.0))
        running = int(metrics.get("vllm:num_requests_running", 0.0))
        there = running + self.waiting
        self.foreign = max(0, there - self.in_flight)
        self.cache_usage = metrics.get("vllm:kv_cache_usage_perc", 0.0)
        if self.in_flight and there:
            ours = min(1.0, self.in_flight / there)
            self.limit.queued(ours * running, ours * self.waiting)


class Router:
    """Applies a policy. `rng` is the only source of chance."""

    def __init__(self, policy: str, rng: random.Random) -> None:
        self.policy = policy
        self.load_aware = policy in LOAD_AWARE
        self._rng = rng
        self._turn = 0

    def choose(self, able: Sequence[Member], waiting: int, prefix: int | None, now: float) -> Member | None:
        """The member the next call goes to; None: it had better wait.

        Args:
            able: members that could serve this call, full ones included.
            waiting: calls that wait, this one included.
            prefix: of the call's prompt, for the prefix policy.
            now: on the pool's clock.
        """
        free = [m for m in able if m.places(self.load_aware) > 0]
        if not free:
            return None
        if self.policy == "random":
            return self._rng.choice(free)
        if self.policy == "round_robin":
            self._turn += 1
            return free[self._turn % len(free)]
        if len(able) == 1:
            return free[0]
        best = min((m.latency.mean for m in able if m.latency.mean is not None), default=0.0)
        seconds = {m.name: m.seconds(now, best) for m in able}
        free = _worth(able, seconds, waiting)
        if not free:
            return None
        if self.policy == "prefix" and prefix is not None:
            sticky = _sticky(prefix, free, able, seconds)
            if sticky is not None:
                return sticky
        elif self.policy == "power_of_two" and len(free) > 2:
            free = self._rng.sample(free, 2)
        # ties are common while nothing is known: the draw keeps the first server from getting them all
        return min(free, key=lambda m: (*_load(m, seconds[m.name]), self._rng.random()))


def _load(member: Member, seconds: float) -> tuple[float, float, int, float]:
    """What a call would meet: expected seconds first, then calls under way, then what the server said of itself."""
    used = (member.in_flight + member.foreign) / member.limit.value
    return (seconds * (1 + used), used, member.waiting, member.cache_usage)


def _worth(able: Sequence[Member], seconds: Mapping[str, float], waiting: int) -> list[Member]:
    """Members with a free place where a call is done sooner than after all that wait have gone to faster ones."""
    found: list[Member] = []
    rate = 0.0
    """Calls a second of the members faster than the one looked at."""
    best = seconds[min(able, key=lambda m: seconds[m.name]).name]
    for member in sorted(able, key=lambda m: seconds[m.name]):
        own = seconds[member.name]
        # while a faster one is free, being twice as slow is no reason yet to leave this one out: means are noisy
        patience = 2.0 if found else 1.0
        if own > best and rate > 0 and own > patience * (waiting / rate + best):
            break  # and so for all that are slower still
        if member.places(learnt=True) > 0:
            found.append(member)
        rate += member.limit.value / own if own > 0 else 0.0
    return found


def _sticky(prefix: int, free: Sequence[Member], able: Sequence[Member], seconds: Mapping[str, float]) -> Member | None:
    """The first of the prefix's own order of servers that is not past its share (rendezvous hashing, Thaler &
    Ravishankar 1998, with the load bound of Mirrokni et al. 2018)."""
    speed = {m.name: m.limit.value / max(seconds[m.name], 1e-9) for m in able}
    total = 1 + sum(m.in_flight for m in able)
    room = [m for m in free if m.in_flight + 1 <= math.ceil(LOAD_BOUND * total * speed[m.name] / sum(speed.values()))]
    return max(room, key=lambda m: affinity(prefix, m.name), default=None)


def affinity(prefix: int, server_name: str) -> bytes:
    """How much a prefix likes a server; the same in every process."""
    return hashlib.blake2b(f"{prefix}\0{server_name}".encode(), digest_size=8).digest()
