"""The in-process engine: coroutines ask, one loop answers all of them together.

    generate() -> a Run waits at a cache node -> the event loop falls quiet -> passes compute every distinct waiting
    node once -> each run samples its token -> finished runs resolve, the others wait at their next node

A step starts only when no coroutine can add another request, so what is batched together, and with it every
floating-point result, is the same in every run of the same seed. Torch runs inside the event loop: an in-process
engine has nothing to wait for, and a thread would make the batching depend on timing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from coterie.errors import EngineError, RequestError
from coterie.inference.base import check_request
from coterie.inference.local.cache import Node, PrefixCache
from coterie.inference.local.choices import TrieNode, build_trie
from coterie.inference.local.kept import Kept
from coterie.inference.local.run import Run
from coterie.inference.local.sampler import (
    GREEDY,
    Distribution,
    bias_row,
    distributions,
    draw,
    scaled_logprobs,
    uniform,
)
from coterie.inference.local.scheduler import Pass, attention_rows, buckets, plan_pass, sights
from coterie.lm.activations import PassActivations
from coterie.lm.attention import CachePlan
from coterie.lm.base import BaseModel
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier

_FORBIDDEN = -1e30
_QUIET_ROUNDS = 3
"""Turns of the event loop without a new request after which a step starts."""


class LocalEngine:
    """Engine over a `BaseModel` and its adapter bank."""

    tier = Tier.LOCAL

    def __init__(
        self,
        base: BaseModel,
        *,
        cache_tokens: int = 16384,
        tokens_per_pass: int = 1024,
        kept_versions: int = 0,
        kept_bytes: int = 0,
    ) -> None:
        """`cache_tokens`: slots of key/value cache. `tokens_per_pass`: new tokens of one forward pass.
        `kept_bytes`: of activations that may be kept for the learner.
        `kept_versions`: published versions behind the current one that can still be asked for; with any, the current
        one is a copy too, so that turns may be generated while the learner changes the weights."""
        self.base = base
        self.cache = PrefixCache(base.layers, base.kv_heads, base.head_dim, cache_tokens, base.dtype, base.device)
        self.kept = Kept(self.cache, kept_bytes, base.kernels, self._again)
        self.tokens_per_pass = tokens_per_pass
        self._kept_versions = kept_versions
        self.tokens_computed = 0
        """Tokens that went through the model since the engine was made."""
        self.requests_served = 0
        self._runs: list[Run] = []
        self._stepping = False
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    # -- the Engine protocol ------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`."""
        check_request(request)
        if request.distribution:
            return await self._exact(request)
        return await self._enqueue(request)

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """Move the model's current adapter to `version`. Cached keys of older versions are forgotten."""
        if adapter_dir is not None:
            raise EngineError("the in-process engine shares the learner's weights; publish with adapter_dir=None")
        bank = self.base.bank
        bank.publish(version)
        if self._kept_versions:
            kept = bank.kept(version.model_id)
            if version not in kept:
                bank.keep(version)
                for old in kept[: max(0, len(kept) - self._kept_versions)]:
                    bank.drop(old)
        self.cache.clear()
        for run in self._runs:  # what was computed for those on their way is gone with the rest
            run.node = self.cache.node(run.request.adapter, (*run.request.prompt_ids, *run.tokens))

    async def close(self) -> None:
        for run in self._runs:
            run.future.cancel()
        self._runs.clear()
        self.cache.clear()

    # -- requests -----------------------------------------------------------------------------------------------

    def _enqueue(self, request: GenerateRequest) -> asyncio.Future[Generation]:
        self._check(request)
        trie = build_trie(request.choices, self._stop_id(request)) if request.choices is not None else None
        return self._wait(Run(request, self.cache.node(request.adapter, request.prompt_ids), trie))

    def _wait(self, run: Run) -> asyncio.Future[Generation]:
        self._runs.append(run)
        if not self._stepping:
            self._stepping = True
            self._wait_until_quiet(len(self._runs), _QUIET_ROUNDS)
        return run.future

    def _stop_id(self, request: GenerateRequest) -> int | None:
        stops = request.stop_ids or self.base.chat.stop_ids
        return stops[0] if stops else None

    def _check(self, request: GenerateRequest) -> None:
        longest = max(map(len, request.choices)) if request.choices else request.max_tokens
        length = len(request.prompt_ids) + longest
        limit = min(self.base.context, self.cache.slots)
        if length > limit:
            what, more = "key/value cache", "raise engine.cache_tokens"
            if self.base.context <= self.cache.slots:
                what, more = "base model's context", "choose a base with a longer one"
            raise RequestError(
                f"prompt and answer need {length} tokens, but the {what} holds {limit}; "
                f"shorten the texts of the task or its answer, or {more}"
            )
        if request.adapter is not None and not self.base.bank.holds(request.adapter):
            raise EngineError(f"adapter {request.adapter.name} was never published to this engine, or is gone")

    async def _exact(self, request: GenerateRequest) -> Generation:
        """Exact probability of every choice, by walking all branches of the trie."""
        assert request.choices is not None
        self._check(request)
        root = build_trie(request.choices, self._stop_id(request))
        probs = [0.0] * len(request.choices)
        stack: list[tuple[TrieNode, tuple[int, ...], float]] = [(root, (), 1.0)]
        while stack:
            trie, path, mass = stack.pop()
            while len(trie.allowed) == 1:
                path = (*path, trie.allowed[0])
                trie = trie.children[trie.allowed[0]]
            if trie.final:
                assert trie.choice is not None
                probs[trie.choice] += mass
                continue
            at = GenerateRequest(
                prompt_ids=request.prompt_ids + path,
                adapter=request.adapter,
                seed=0,
                temperature=request.temperature or 1.0,
                choices=tuple((token,) for token in trie.allowed),
                bias=request.bias,
            )
            run = Run(at, self.cache.node(at.adapter, at.prompt_ids), build_trie(at.choices or (), None))
            await self._wait(run)
            assert run.distribution is not None
            for token, p in zip(run.distribution.allowed, run.distribution.probs, strict=True):
                stack.append((trie.children[token], (*path, token), mass * p))
        return Generation(
            prompt_ids=request.prompt_ids, token_ids=(), logprobs=(), allowed=(), entropy=(),
            adapter=request.adapter, tier=self.tier, finish_reason="choice", choice_probs=tuple(probs),
        )  # fmt: skip

    # -- stepping -----------------------------------------------------------------------------------------------

    def _wait_until_quiet(self, known: int, rounds: int) -> None:
        loop = asyncio.get_running_loop()
        if len(self._runs) != known:
            rounds = _QUIET_ROUNDS
        if rounds > 0:
            loop.call_soon(self._wait_until_quiet, len(self._runs), rounds - 1)
            return
        try:
            self._step()
        except Exception as error:  # noqa: BLE001 - every waiting coroutine must learn of it
            failed = self._abandon()
            for run in failed:
                if not run.future.done():
                    run.future.set_exception(error)
        except BaseException:  # Ctrl-C: whoever asked goes with the event loop
            self._abandon()
            self._stepping = False
            raise
        if self._runs:
            self._wait_until_quiet(len(self._runs), _QUIET_ROUNDS)
        else:
            self._stepping = False

    def _abandon(self) -> list[Run]:
        """Forget all runs and the cache: a broken pass has taken slots that it never filled."""
        runs, self._runs = self._runs, []
        self.cache.clear()
        return runs

    def _step(self) -> None:
        """Bring every waiting run forward by one token (several where tokens are forced)."""
        self._runs = [run for run in self._runs if not run.future.done()]
        for run in self._runs:
            run.skip_forced()
        self._settle()
        done = self._compute()
        self._sample(done)
        self._settle()

    def _compute(self) -> list[Run]:
        """Compute hidden states for as many runs, in order of arrival, as the cache holds; return those runs."""
        waiting: dict[int, tuple[AdapterVersion | None, Node]] = {}
        for run in self._runs:
            if run.node.hidden is None:
                waiting.setdefault(id(run.node), (run.request.adapter, run.node))
        todo = list(waiting.values())
        served = 0
        while served < len(todo):
            work = plan_pass(todo[served:], self.tokens_per_pass, self._place)
            if _fresh(work) > self.cache.free:
                if served:
                    break
                # give room to the runs that came first; the others are computed again when their turn comes
                self._keep_only(self._fitting(todo))
                work = plan_pass(todo, min(self.tokens_per_pass, self.cache.free), self._place)
                if _fresh(work) > self.cache.free:
                    self._keep_only([todo[0][1]])
                    work = plan_pass(todo[:1], self.cache.free, self._place)
            record = self.kept.begin()
            self._forward(work, record)
            self.kept.end(record, work.nodes)
            served += work.served
        return [run for run in self._runs if run.node.hidden is not None]

    def _place(self, version: AdapterVersion | None) -> int:
        """Adapters in the order they lie in memory: those of equally many tokens are then applied together."""
        return -1 if version is None else self.base.bank.get(version).row

    def _keep_only(self, nodes: list[Node]) -> None:
        self.cache.keep_only(nodes, [run.node for run in self._runs])

    def _fitting(self, todo: list[tuple[AdapterVersion | None, Node]]) -> list[Node]:
        """The first waiting nodes whose paths together leave room for one another."""
        kept: set[int] = set()
        nodes: list[Node] = []
        for _, node in todo:
            path = {id(step) for step in node.path()} - kept
            if nodes and len(kept) + len(path) > self.cache.slots:
                break
            kept |= path
            nodes.append(node)
        return nodes

    def _again(self, work: Pass) -> PassActivations | None:
        """Activations of nodes that have none, their parents computed before them; None: the cache has no room."""
        if _fresh(work) > self.cache.free:
            return None
        made = PassActivations()
        self._forward(work, made)
        return made

    @torch.no_grad()
    def _forward(self, work: Pass, record: PassActivations | None = None) -> None:
        device = self.base.device
        self.cache.take(node for node in work.nodes if node.slot < 0)
        rows = attention_rows(work.nodes)
        listed = sights(rows, len(work.nodes)) if self.base.kernels is not None else None
        made, order = buckets(rows, len(work.nodes), device) if listed is None else ((), None)
        slots = torch.tensor([node.slot for node in work.nodes], device=device)
        plan = CachePlan(self.cache.keys, self.cache.values, slots, made, order, listed)
        segments = [(self.base.bank.get(v), start, end) for v, start, end in work.segments if v is not None]
        hidden = self.base.hidden(
            torch.tensor([node.token for node in work.nodes], device=device),
            torch.tensor([node.depth for node in work.nodes], device=device),
            plan,
            segments,
            record,
        )
        wanted = hidden.index_select(0, torch.tensor(work.wanted, dtype=torch.int64, device=device))
        for index, state in zip(work.wanted, wanted.unbind(), strict=True):
            work.nodes[index].hidden = state
        self.tokens_computed += len(work.nodes)

    # -- sampling -----------------------------------------------------------------------------------------------

    def _sample(self, runs: list[Run]) -> None:
        choosing = [run for run in runs if run.trie is not None]
        free = [run for run in runs if run.trie is None]
        for run, at in zip(choosing, self._distributions_at(choosing), strict=True):
            request = run.request
            run.distribution = at
            token, logprob = at.sample(uniform(request.seed, len(run.tokens))) if request.temperature else at.greedy()
            run.advance(token, logprob, at.entropy, at.allowed)
        if free:
            self._sample_free(free)

    @torch.no_grad()
    def _distributions_at(self, runs: Sequence[Run]) -> list[Distribution]:
        """What each run chooses from: one product for all that choose among the same tokens in the same way."""
        keys: list[tuple[tuple[int, ...], float, tuple[float, ...] | None]] = []
        missing: dict[Any, dict[int, Node]] = {}
        for run in runs:
            assert run.trie is not None
            row = bias_row(run.trie.allowed, run.request.bias)
            key = (run.trie.allowed, run.request.temperature, None if row is None else tuple(row))
            keys.append(key)
            if key not in run.node.memo:
                missing.setdefault(key, {})[id(run.node)] = run.node
        for key, nodes in missing.items():
            allowed, temperature, bias = key
            rows = self._rows.get(allowed)
            if rows is None:
                rows = self._rows[allowed] = torch.tensor(allowed, device=self.base.device)
            hidden = torch.stack([node.hidden for node in nodes.values() if node.hidden is not None])
            logprobs = scaled_logprobs(self.base.logits(hidden, rows), bias and list(bias), temperature)
            for node, found in zip(nodes.values(), distributions(logprobs, allowed), strict=True):
                node.memo[key] = found
        return [cast(Distribution, run.node.memo[key]) for run, key in zip(runs, keys, strict=True)]

    @torch.no_grad()
    def _sample_free(self, runs: list[Run]) -> None:
        groups: dict[tuple[int, float, int], list[Run]] = {}
        for run in runs:
            groups.setdefault((id(run.node), run.request.temperature, id(run.request.bias)), []).append(run)
        heads = [members[0] for members in groups.values()]
        hidden = torch.stack([run.node.hidden for run in heads if run.node.hidden is not None])
        logits = self.base.rough_logits(hidden)
        if self.base.kernels is not None:  # without them they are written over
            self.kept.take_logits(logits, [run.node for run in heads])
        if any(run.request.bias for run in heads):
            logits = logits.to(torch.float32, copy=True)
            for run, row in zip(heads, logits, strict=True):
                for token, value in (run.request.bias or {}).items():
                    # a finite floor forbids as well as -inf does, and keeps 0 * z out of NaN
                    row[token] += max(value, _FORBIDDEN)
        members = [run for group in groups.values() for run in group]
        rows = [number for number, group in enumerate(groups.values()) for _ in group]
        drawn = draw(
            logits,
            rows,
            [uniform(run.request.seed, len(run.tokens)) if run.request.temperature else GREEDY for run in members],
            [run.request.temperature or 1.0 for run in heads],
        )
        for run, number, token, logprob in zip(members, rows, drawn.tokens, drawn.logprobs, strict=True):
            run.advance(token, logprob, drawn.entropies[number], None)

    def _settle(self) -> None:
        """Resolve the runs that are finished."""
        rest = []
        for run in self._runs:
            reason = run.reason(self.base.chat.stop_ids)
            if reason is None:
                rest.append(run)
            elif not run.future.done():
                self.requests_served += 1
                run.future.set_result(run.generation(self.tier, reason))
        self._runs = rest


def _fresh(work: Pass) -> int:
    """Slots a pass needs."""
    return sum(node.slot < 0 for node in work.nodes)
