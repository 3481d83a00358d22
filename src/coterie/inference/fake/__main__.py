"""``python -m coterie.inference.fake``: a fake server in this process, until it is interrupted.

Prints its url as one line of JSON once it listens. With --commands faults can be given over HTTP, as
`POST /fake/<command>` with keyword arguments in JSON (what `FakeProcess` uses); without it there is no such address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal

from coterie.inference.fake.process import CommandServer
from coterie.inference.fake.server import FakeServer


async def _serve(server: FakeServer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    async with server:
        print(json.dumps({"url": server.url, "pid": os.getpid()}), flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser("python -m coterie.inference.fake", description=__doc__)
    parser.add_argument("--model", default="fake-model", help="served name of the base")
    parser.add_argument("--seed", type=int, default=0, help="of the base's weights")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--latency-s", type=float, default=0.0, help="seconds of every generation")
    parser.add_argument("--per-token-s", type=float, default=0.0, help="more seconds for every generated token")
    parser.add_argument("--per-prompt-token-s", type=float, default=0.0, help="more for every uncached prompt token")
    parser.add_argument("--slots", type=int, default=None, help="generations at once; without it all")
    parser.add_argument("--max-waiting", type=int, default=None, help="refuse with 503 past so many waiting")
    parser.add_argument("--max-model-len", type=int, default=2048, help="context in tokens")
    parser.add_argument("--logprobs-mode", choices=("processed_logprobs", "raw_logprobs"), default="processed_logprobs")
    parser.add_argument("--api-key-env", default=None, help="environment variable with the key that /v1 asks for")
    parser.add_argument("--keep-alive-s", type=float, default=5.0, help="after which idle connections are closed")
    parser.add_argument("--commands", action="store_true", help="take faults over HTTP")
    arguments = vars(parser.parse_args())
    key = arguments.pop("api_key_env")
    kind = CommandServer if arguments.pop("commands") else FakeServer
    asyncio.run(_serve(kind(**arguments, api_key=os.environ[key] if key else None)))


if __name__ == "__main__":
    main()
