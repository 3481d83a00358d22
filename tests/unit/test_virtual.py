"""The clock other tests rely on: real sockets and threads, and waits that cost nothing."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.virtual import now, run_hasty


def test_long_waits_are_exact_and_short() -> None:
    async def scene() -> float:
        began = now()
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(7200))
        return now() - began

    began = time.monotonic()
    assert run_hasty(scene()) == pytest.approx(7200, abs=1e-3)
    assert time.monotonic() - began < 3600  # far from either


def test_work_takes_no_time_so_a_deadline_spares_whoever_still_gets_answers() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while word := await reader.readline():
            time.sleep(0.002)  # a slow machine
            writer.write(word)
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            async with asyncio.timeout(0.1):
                for number in range(100):
                    writer.write(b"%d\n" % number)
                    assert await reader.readline() == b"%d\n" % number
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5.0):
                    await reader.readline()  # nobody writes
            writer.close()
            await writer.wait_closed()

    run_hasty(scene())


def test_threads_are_waited_for() -> None:
    async def scene() -> None:
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(lambda: time.sleep(0.2) or "done") == "done"
        assert now() < 30

    run_hasty(scene())
