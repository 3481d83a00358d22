"""Plays that do not end are stopped, whatever they do instead; plays that end are left alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.rollout.limits import Clock, Watch
from coterie.types import Outcome

LIMIT_S = 0.2
DONE = Outcome({"one": 1.0})


def drive(play: Callable[[], Coroutine[Any, Any, Any]], limit_s: float = LIMIT_S, clock: Clock | None = None) -> Any:
    watch = Watch(limit_s)

    async def main() -> Any:
        with watch.watching():
            return await asyncio.create_task(watch.drive(play(), clock or Clock()))

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_what_a_play_returns_and_raises_comes_out() -> None:
    async def good() -> Outcome:
        assert await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0.01, 2)) == [1, 2]
        return DONE

    async def bad() -> Outcome:
        await asyncio.sleep(0)
        raise KeyError("piece")

    assert drive(good) is DONE
    with pytest.raises(KeyError, match="piece"):
        drive(bad)


def test_a_play_may_use_time_limits_of_its_own() -> None:
    async def play() -> Outcome:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        return DONE

    assert drive(play) is DONE


def test_one_that_waits_for_ever_is_cancelled_and_cleans_up() -> None:
    cleaned = []

    async def play() -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.001)
            cleaned.append(True)
        return DONE

    began = time.monotonic()
    with pytest.raises(ScenarioError, match=r"more than 0.2 s without asking for a turn \(rollout.episode_timeout_s\)"):
        drive(play)
    assert cleaned == [True]
    assert time.monotonic() - began > LIMIT_S


def test_one_that_will_not_be_cancelled_is_left_behind() -> None:
    async def play() -> Outcome:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with pytest.raises(ScenarioError, match="without asking for a turn"):
        drive(play)


def test_an_answer_after_its_time_does_not_count() -> None:
    async def play() -> Outcome:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return DONE
        raise AssertionError

    with pytest.raises(ScenarioError, match="without asking for a turn"):
        drive(play)


def test_one_that_never_awaits_is_interrupted() -> None:
    count = 0

    async def play() -> Outcome:
        nonlocal count
        while True:
            try:
                count += 1
            except Exception:  # noqa: BLE001 - that is what is tried here
                count = 0

    with pytest.raises(ScenarioError, match=r"more than 0\.2 s without awaiting anything"):
        drive(play)
    assert count > 1000
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_somebody_elses_alarm_is_left_alone() -> None:
    def mine(number: int, frame: object) -> None: ...

    async def play() -> Outcome:
        assert signal.getsignal(signal.SIGALRM) is mine
        return DONE

    signal.signal(signal.SIGALRM, mine)
    try:
        assert drive(play) is DONE
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_time_spent_on_turns_does_not_count() -> None:
    clock = Clock()

    async def play() -> Outcome:
        for _ in range(3):
            clock.stop()
            await asyncio.sleep(LIMIT_S)
            clock.go_on()
        return DONE

    assert drive(play, clock=clock) is DONE


def test_time_others_take_the_event_loop_for_does_not_count() -> None:
    async def play() -> Outcome:
        await asyncio.sleep(LIMIT_S / 4)
        return DONE

    watch = Watch(LIMIT_S)

    async def main() -> Outcome:
        with watch.watching():
            task = asyncio.create_task(watch.drive(play(), Clock()))
            await asyncio.sleep(0)
            time.sleep(3 * LIMIT_S)  # an engine that computes
            asyncio.get_running_loop().call_soon(watch._look)
            return await task

    assert asyncio.run(main()) is DONE


def test_time_that_plays_take_from_one_another_before_they_ask_does_not_count() -> None:
    async def play() -> Outcome:
        clock = clocks[asyncio.current_task()]

        async def turn() -> None:
            clock.stop()
            await asyncio.sleep(2 * LIMIT_S)
            clock.go_on()

        time.sleep(LIMIT_S / 4)  # a slow rule, in each of twelve episodes
        await asyncio.gather(turn())
        return DONE

    watch = Watch(LIMIT_S)
    clocks: dict[asyncio.Task[Any] | None, Clock] = {}

    async def one(clock: Clock) -> Outcome:
        clocks[asyncio.current_task()] = clock
        return await watch.drive(play(), clock)

    async def main() -> list[Outcome]:
        with watch.watching():
            return await asyncio.gather(*(one(Clock()) for _ in range(12)))

    assert asyncio.run(main()) == [DONE] * 12


SUSPENDED = """
import asyncio, os, signal, sys
from coterie.rollout.limits import Clock, Watch
from coterie.types import Outcome

where, limit_s = sys.argv[1], float(sys.argv[2])
clock = Clock()

def suspend(point):
    if point == where:
        os.kill(os.getpid(), signal.SIGSTOP)

async def turn():
    suspend("before it asks")
    clock.stop()
    suspend("while it asks")
    await asyncio.sleep(limit_s / 2)
    clock.go_on()
    suspend("after the answer")

async def play():
    suspend("while it computes")
    await asyncio.gather(turn())
    await asyncio.sleep(limit_s / 4)
    return Outcome({"one": 1.0})

async def main():
    watch = Watch(limit_s)
    with watch.watching():
        print((await watch.drive(play(), clock)).scores)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be suspended here")
@pytest.mark.parametrize("where", ["while it computes", "before it asks", "while it asks", "after the answer"])
def test_time_for_which_the_process_was_suspended_does_not_count(where: str) -> None:
    command = [sys.executable, "-c", SUSPENDED, where, str(LIMIT_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(3 * LIMIT_S)
        process.send_signal(signal.SIGCONT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (said.strip(), errors) == ("{'one': 1.0}", "")


def test_the_clock_stands_while_any_seat_is_asked_and_starts_anew_after_a_turn() -> None:
    clock = Clock()
    clock.look()
    clock.stop()
    clock.look()
    clock.stop()
    clock.go_on()
    clock.look()
    assert clock.looks == 1
    clock.go_on()
    clock.look()
    assert clock.looks == 2
    clock.start()
    assert clock.looks == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(3), r"play called exit\(3\)"),
        (asyncio.CancelledError(), "play was cancelled by something it awaited"),
    ],
)
def test_what_would_end_the_process_or_the_run_ends_the_play(error: BaseException, message: str) -> None:
    async def play() -> Outcome:
        raise error

    with pytest.raises(ScenarioError, match=message):
        drive(play)


def test_a_run_that_is_cancelled_cancels_its_plays() -> None:
    left: list[str] = []

    async def play() -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            left.append("left")
        return DONE

    async def main() -> None:
        watch = Watch(60.0)
        task = asyncio.create_task(watch.drive(play(), Clock()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert left == ["left"]


def test_the_one_who_awaits_a_stopped_play_is_not_cancelled() -> None:
    async def play() -> Outcome:
        await asyncio.Event().wait()
        return DONE

    async def guarded(watch: Watch) -> str:
        try:
            await watch.drive(play(), Clock())
        except ScenarioError:
            await asyncio.sleep(0.01)  # would raise were the task still being cancelled
            task = asyncio.current_task()
            assert task is not None
            return f"went on, {task.cancelling()} cancellations"
        raise AssertionError

    async def main() -> str:
        watch = Watch(0.05)
        with watch.watching():
            return await asyncio.create_task(guarded(watch))

    assert asyncio.run(main()) == "went on, 0 cancellations"


def test_a_play_that_is_no_coroutine_is_named() -> None:
    with pytest.raises(ScenarioError, match="write it as `async def play`"):
        drive(lambda: DONE)  # type: ignore[arg-type, return-value]
