"""Servers: whether each is well, what it serves, and whether what it answers can be trained on.

A server is asked for one token where one is allowed: the answer must come with ids and with log-probability 0, which
shows that its log-probabilities are of the distribution it samples from. That adapters can be changed is tried by
unloading one that does not exist.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import aiohttp

from coterie.doctor.findings import Finding, Level
from coterie.errors import EngineError
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.trust import check_reply
from coterie.inference.wire import FaultKind, ServerFault, ServerSpec, WireRequest

NO_ADAPTER = "coterie-doctor-has-no-such-adapter"
SHORT_CONTEXT = 512
"""Tokens below which tasks with advice no longer fit."""

_PROBE_IDS = (5, 7)
_LOCAL = ("127.0.0.1", "localhost", "[::1]", "0.0.0.0")
_START = (
    "python -m vllm.entrypoints.openai.api_server --model MODEL --enable-lora --logprobs-mode processed_logprobs, or: "
    "coterie serve MODEL"
)


async def check_servers(servers: Sequence[ServerSpec], *, adapters: int = 0, timeout_s: float = 10.0) -> list[Finding]:
    """Findings about every server, in their order.

    Args:
        adapters: adapter versions in use at once by the config; 0: not known.
        timeout_s: of each question; a server that computes slowly needs more.
    """
    control, transport = HttpControl(timeout_s=timeout_s), HttpTransport(connect_timeout_s=min(5.0, timeout_s))
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session:
            looks = [_Look(server, control, transport, session, adapters, timeout_s) for server in servers]
            found = await asyncio.gather(*(look.all() for look in looks))
    finally:
        await control.close()
        await transport.close()
    return [finding for one in found for finding in one]


class _Look:
    """One server, looked at from all sides."""

    def __init__(
        self,
        server: ServerSpec,
        control: HttpControl,
        transport: HttpTransport,
        session: aiohttp.ClientSession,
        adapters: int,
        timeout_s: float,
    ) -> None:
        self._server, self._control, self._transport, self._session = server, control, transport, session
        self._adapters, self._timeout_s = adapters, timeout_s
        self._findings: list[Finding] = []

    async def all(self) -> list[Finding]:
        """Everything; stops at what makes the rest pointless."""
        self._key()
        if not await self._health():
            return self._findings
        models = await self._models()
        if models:
            await self._logprobs(models[0])
        metrics = await self._get("/metrics")
        self._build(metrics)
        await self._changing_adapters(metrics)
        return self._findings

    def _say(self, check: str, level: Level, message: str, mend: str = "", **facts: Any) -> None:
        area = f"server {self._server.name}"
        self._findings.append(Finding(area, check, level, message, mend, {"url": self._server.url, **facts}))

    def _key(self) -> None:
        remote = not self._server.name.startswith(_LOCAL)
        if self._server.api_key and remote and self._server.url.startswith("http:"):
            mend = "put TLS in front of it (https), or reach it through a tunnel"
            self._say("key", Level.WARNING, "the key goes over the network unencrypted", mend)

    async def _health(self) -> bool:
        try:
            await self._control.health(self._server)
        except ServerFault as fault:
            mend = {
                FaultKind.CONNECTION: f"start it ({_START}), or correct the url",
                FaultKind.TIMEOUT: "it is there and does not answer: look at its log, restart it",
                FaultKind.UNAUTHORIZED: "give its key by --api-key-env, or api_key_env in the config",
            }.get(fault.kind, "look at its log")
            self._say("health", Level.PROBLEM, str(fault), mend, kind=str(fault.kind))
            return False
        version = await self._get("/version")
        found = re.search(r'"version"\s*:\s*"([^"]+)"', version)
        said = f"well, version {found.group(1)}" if found else "well"
        self._say("health", Level.OK, said, version=found and found.group(1))
        return True

    async def _models(self) -> list[str]:
        try:
            names = await self._control.models(self._server)
        except ServerFault as fault:
            mend = (
                "give its key by --api-key-env, or api_key_env in the config"
                if fault.kind is FaultKind.UNAUTHORIZED
                else "check that the url points at an OpenAI-compatible API"
            )
            self._say("models", Level.PROBLEM, str(fault), mend)
            return []
        if not names:
            self._say("models", Level.PROBLEM, "it serves no model", "start it with a model")
            return []
        listed = await self._get("/v1/models")
        length = re.search(r'"max_model_len"\s*:\s*(\d+)', listed)
        facts: dict[str, Any] = {"models": list(names), "max_model_len": length and int(length.group(1))}
        more = f" and {len(names) - 1} adapters" if len(names) > 1 else ""
        self._say("models", Level.OK, f"serves {names[0]}{more}", **facts)
        if length is not None:
            tokens = int(length.group(1))
            if tokens < SHORT_CONTEXT:
                mend = "start it with a larger --max-model-len"
                text = f"prompt and answer may take {tokens} tokens, too few for most tasks"
                self._say("context", Level.WARNING, text, mend, max_model_len=tokens)
            else:
                text = f"prompt and answer may take {tokens} tokens"
                self._say("context", Level.OK, text, max_model_len=tokens)
        return list(names)

    def _build(self, metrics: str) -> None:
        """vLLM's CPU build gives itself away by the memory it is told to take for its cache. It has four traps."""
        line = next((line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{")), "")
        settings = dict(re.findall(r'[{,](\w+)="([^"]*)"', line))
        if not settings.get("kv_cache_memory_bytes", "None").isdecimal():
            return
        text = (
            "if it is vLLM's CPU build, a request with a seed whose prompt it computes in parts kills it, and so does "
            "prompt_logprobs under an adapter beside another request (Coterie asks for none); and once all its "
            "--max-loras slots are taken, it answers the base's requests beside others with the adapter in the last one"
        )
        mend = (
            "start it with --no-enable-chunked-prefill (coterie serve --backend vllm --vllm-arg …), and --max-loras "
            "above the number of adapters loaded at once"
        )
        self._say("cpu_build", Level.NOTE, text, mend)
        block = settings.get("block_size", "")
        if block.isdecimal() and int(block) >= 64:
            text = f"prompts shorter than {block} tokens are never cached, and computed again each time"
            self._say("block_size", Level.NOTE, text, "start it with --block-size 32", block_size=int(block))

    async def _logprobs(self, model: str) -> None:
        for token in _PROBE_IDS:
            request = WireRequest(model, prompt_ids=_PROBE_IDS, max_tokens=1, seed=0, allowed=(token,))
            try:
                reply = await self._transport.call(self._server, request, self._timeout_s)
                check_reply(reply, request, self._server.name)
            except ServerFault as fault:
                if fault.kind is FaultKind.TIMEOUT:
                    mend = "wait until it has warmed up, or give --timeout more seconds"
                else:
                    mend = f"use a server that knows token ids and allowed_token_ids: {_START}"
                self._say("logprobs", Level.PROBLEM, f"one token could not be generated: {fault}", mend)
                return
            except EngineError as error:
                self._say("logprobs", Level.PROBLEM, str(error), f"start it so: {_START}")
                return
            if not reply.logprobs or abs(reply.logprobs[0]) > 1e-3:
                text = (
                    "its log-probabilities are not of the distribution it samples from: nothing can be trained on them"
                )
                mend = "start vLLM with --logprobs-mode processed_logprobs"
                self._say("logprobs", Level.PROBLEM, text, mend, logprob=reply.logprobs and reply.logprobs[0])
                return
        took = f"{reply.latency_s * 1000:.0f} ms for one token"
        self._say(
            "logprobs", Level.OK, f"ids and log-probabilities as training needs them; {took}", latency_s=reply.latency_s
        )

    async def _changing_adapters(self, metrics: str) -> None:
        try:
            await self._control.unload_adapter(self._server, NO_ADAPTER)
        except ServerFault as fault:
            mend = (
                "for training against it, start vLLM with --enable-lora and the environment variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and one API server; coterie serve with --adapter-dir"
            )
            self._say("adapters", Level.WARNING, f"adapters cannot be changed while it runs: {fault}", mend)
            return
        slots = re.search(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', metrics, re.MULTILINE)
        if slots is None or int(slots.group(1)) == 0:
            self._say("adapters", Level.OK, "adapters can be loaded and unloaded while it runs")
            return
        count = int(slots.group(1))
        if self._adapters > count:
            text = f"{count} adapters are active at once, the config uses up to {self._adapters}: they will take turns"
            self._say("adapters", Level.WARNING, text, f"start vLLM with --max-loras {self._adapters}", max_loras=count)
        else:
            text = f"adapters can be loaded and unloaded while it runs, {count} active at once"
            self._say("adapters", Level.OK, text, max_loras=count)

    async def _get(self, path: str) -> str:
        """The text at a path of the server's root; empty where there is none."""
        headers = {"Authorization": f"Bearer {self._server.api_key}"} if self._server.api_key else {}
        try:
            async with self._session.get(self._server.root + path, headers=headers, allow_redirects=False) as answer:
                return await answer.text() if answer.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
            return ""
