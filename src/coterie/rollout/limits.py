"""An episode ends: how long a scenario may go on by itself, and how it is stopped when it does not end.

A scenario is foreign code. What it does between two turns is its own time; the time its turns take is not:

    own time = since its start or its latest turn, without what it spent waiting for a seat to answer

Turns are bounded by `task.max_steps`, so a bound on own time bounds an episode however slow the engine is. It is
measured in looks, eight within the limit, and not by a clock: a process that was suspended, or an event loop that other
plays or an engine took up, looks late and once, so that time in which a play could not go on does not count against it.
`drive` takes a play from one suspension to the next by hand and knows, at any moment, whether the scenario's code is
running. Past the limit, a play that

  - waits for something that never comes is cancelled as a task is, its ``finally`` clauses run, and one that refuses
    to go is left behind;
  - runs without ever waiting is interrupted by an alarm of the operating system, which raises inside it. Only POSIX has
    that, only the main thread gets it, and it is left alone where somebody else listens for SIGALRM. A bare ``except:``
    in such a loop, and compiled code that does not come back to the interpreter, cannot be stopped from inside the
    process; a second Ctrl-C ends the run.

Tasks and threads a scenario started on its own are not ours to stop; a table that is closed refuses their turns.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from coterie.errors import ScenarioError
from coterie.types import Outcome

_LOOKS = 8
"""Times within the limit that plays are looked at; one is stopped at most a look too late."""


class Clock:
    """Own time of one episode, in looks."""

    __slots__ = ("_waiting", "looks")

    def __init__(self) -> None:
        self.looks = 0
        """So far, since the episode's start or its latest turn."""
        self._waiting = 0

    def start(self) -> None:
        """Count from now on."""
        self.looks = 0

    def stop(self) -> None:
        """Stand still while a seat is asked; several may be asked at once, and `go_on` is called for each."""
        self._waiting += 1

    def go_on(self) -> None:
        self._waiting -= 1

    def look(self) -> None:
        """Count one more, unless it stands still."""
        if not self._waiting:
            self.looks += 1


class _StopError(BaseException):
    """Raised inside a play that runs without waiting; no ``except Exception`` of a scenario holds it."""


class _Play:
    """One play on its way, as something to await."""

    __slots__ = ("clock", "coro", "limit_s", "over", "set_running", "task")

    def __init__(
        self,
        coro: Coroutine[Any, Any, Outcome],
        clock: Clock,
        limit_s: float,
        set_running: Callable[[_Play | None], None],
    ) -> None:
        self.coro = coro
        self.clock = clock
        self.limit_s = limit_s
        self.set_running = set_running
        self.task = asyncio.current_task()
        self.over = 0
        """How often it was told to end."""

    def __await__(self) -> Generator[Any, None, Outcome]:
        thrown: BaseException | None = None
        cancelled = False
        self.clock.start()
        while True:
            self.set_running(self)
            try:
                yielded = self.coro.send(None) if thrown is None else self.coro.throw(thrown)
            except StopIteration as stop:
                if self.over:
                    raise self._overdue() from None
                outcome: Outcome = stop.value
                return outcome
            except SystemExit as error:
                raise ScenarioError(f"play called exit({error.code!r}); return an Outcome or raise an error") from error
            except asyncio.CancelledError:
                if self.over:
                    raise self._overdue() from None
                if cancelled:
                    raise
                raise ScenarioError("play was cancelled by something it awaited, not by the run") from None
            except Exception:
                if self.over:
                    raise self._overdue() from None
                raise
            finally:
                self.set_running(None)
            if self.over > 1 and isinstance(thrown, asyncio.CancelledError):
                self._abandon()
                raise self._overdue()
            try:
                thrown = None
                yield yielded
            except BaseException as error:  # noqa: BLE001 - it is handed on to the play
                thrown = error
                cancelled = cancelled or isinstance(error, asyncio.CancelledError)

    def look(self) -> None:
        """Tell it to end if it is overdue: once, and again when it has still not gone as much later."""
        self.clock.look()
        if self.task is not None and self.clock.looks > _LOOKS:
            self.clock.start()
            self.over += 1
            self.task.cancel()

    def _overdue(self) -> ScenarioError:
        if self.task is not None:
            while self.over and self.task.uncancel():  # what was cancelled was the play, not who awaits it
                self.over -= 1
        return ScenarioError(
            f"play went on for more than {self.limit_s:g} s without asking for a turn (rollout.episode_timeout_s); "
            "it awaits something that does not come"
        )

    def _abandon(self) -> None:
        """Leave a play behind that will not be cancelled."""
        try:
            self.coro.close()
        except RuntimeError:  # it awaits even in the face of GeneratorExit
            return


class Watch:
    """Looks after the plays of one runner."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: own time of an episode at most."""
        self.limit_s = limit_s
        self._plays: set[_Play] = set()
        self._running: _Play | None = None
        self._ran: float | None = None
        """Looks for which the running play has kept control; None before the first."""
        self._cpu_s = 0.0
        """This thread's processor time at that look."""
        self._watching = 0
        self._timer: asyncio.TimerHandle | None = None
        self._alarmed = False

    async def drive(self, coro: Coroutine[Any, Any, Outcome], clock: Clock) -> Outcome:
        """What the play returns. Raises what it raises, and `ScenarioError` when it was stopped."""
        if not inspect.iscoroutine(coro):
            raise ScenarioError(f"play gave {coro!r} instead of a coroutine; write it as `async def play`")
        play = _Play(coro, clock, self.limit_s, self._set_running)
        self._plays.add(play)
        try:
            return await play
        except _StopError:
            raise ScenarioError(
                f"play ran for more than {self.limit_s:g} s without awaiting anything (rollout.episode_timeout_s); "
                "look for a loop that does not end"
            ) from None
        finally:
            self._plays.discard(play)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, in a running event loop, overdue plays are stopped."""
        self._watching += 1
        if self._watching == 1:
            self._look_later()
            self._set_alarm()
        try:
            yield
        finally:
            self._watching -= 1
            if not self._watching:
                if self._timer is not None:
                    self._timer.cancel()
                self._clear_alarm()

    def _set_running(self, play: _Play | None) -> None:
        self._running = play
        self._ran = None

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.limit_s / _LOOKS, self._look)

    def _look(self) -> None:
        for play in list(self._plays):
            play.look()
        self._look_later()

    def _set_alarm(self) -> None:
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            return
        signal.signal(signal.SIGALRM, self._on_alarm)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, self.limit_s / _LOOKS, self.limit_s / _LOOKS)
        self._alarmed = True

    def _clear_alarm(self) -> None:
        if sys.platform != "win32" and self._alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._alarmed = False

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._running is None:
            return
        cpu_s = time.thread_time()
        if self._ran is None:
            self._ran = 0.0
        else:  # several alarms during one long call into compiled code come as one
            self._ran += max(1.0, (cpu_s - self._cpu_s) / self.limit_s * _LOOKS)
        self._cpu_s = cpu_s
        if self._ran >= _LOOKS:
            raise _StopError
