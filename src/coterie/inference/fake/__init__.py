"""A fake vLLM server: small, exact, and broken on command. For our tests and for yours.

    async with FakeServer(seed=1, slots=8, latency_s=0.01) as server:
        client = VLLMClient(server.url, "fake-model")
        server.fail(503, times=2, retry_after=1)          # hang, drop, garble, sleep, slow, evict, serve_stale, kill, …
        await client.generate("hello")
        assert server.calls == 3

It speaks vLLM's API (completions, chat, streaming, log-probabilities, token ids, adapters, health, metrics) with
vLLM's error codes and words. Its model is a real distribution over a small vocabulary that anyone can recompute
(`FakeServer.policy`, `distribution`, `token_logprobs`), which depends on the seed, the prompt ids and the content of
the adapter's files: so log-probabilities are exact, the same request gives the same answer, an untrained adapter
answers as the base does, and a swapped, stale or missing adapter is seen in the numbers.

In a process of its own, for measurements and for what only a real process can do:

    async with FakeProcess(slots=8) as server:            # or: python -m coterie.inference.fake --slots 8
        await server.command("fail", status=500, times=1)
        server.kill()                                     # SIGKILL
        await server.revive()

Traps of real servers that it has too: /health says 200 while a sleeping server hangs; an in-place reload answers
from a stale cache, unless a request brings a cache_salt of its own; an adapter whose directory was deleted kills the
engine at its next use; with `cpu_build`, prompt_logprobs under an adapter kill it when another request is under way; a
restarted server has lost its adapters; unknown options that would change answers are refused, not ignored.
"""

from coterie.inference.fake.generation import LogprobsMode
from coterie.inference.fake.policy import FakePolicy, adapter_weights, distribution, token_logprobs, write_adapter
from coterie.inference.fake.process import FakeProcess
from coterie.inference.fake.server import FakeServer
from coterie.inference.fake.tokens import ByteTokenizer, FakeTokenizer, HubTokenizer

__all__ = [
    "ByteTokenizer",
    "FakePolicy",
    "FakeProcess",
    "FakeServer",
    "FakeTokenizer",
    "HubTokenizer",
    "LogprobsMode",
    "adapter_weights",
    "distribution",
    "token_logprobs",
    "write_adapter",
]
