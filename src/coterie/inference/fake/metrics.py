"""What the fake counts, and its /metrics page under vLLM's names."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from coterie.inference.fake.answers import Answer
from coterie.inference.fake.slots import Slots

_BLOCK = 16
"""Tokens vLLM caches as one."""


class PrefixCache:
    """Which beginnings of prompts were seen, in blocks, under each weights and salt."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.queries = self.hits = 0

    def add(self, weights: str, prompt: Sequence[int], salt: str = "") -> int:
        """Remember a prompt; how many of its tokens were not cached."""
        cached, missed, key = 0, False, f"{weights} {salt}".encode()
        for end in range(_BLOCK, len(prompt) + 1, _BLOCK):
            block = ",".join(map(str, prompt[end - _BLOCK : end]))
            key = hashlib.blake2b(key + block.encode(), digest_size=16).digest()  # of all blocks so far
            missed = missed or key not in self._seen
            cached += 0 if missed else _BLOCK
            self._seen.add(key)
        self.queries += len(prompt)
        self.hits += cached
        return len(prompt) - cached


class Counters:
    """Totals over finished requests."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = 0
        self.finished: Counter[str] = Counter()

    def add(self, answer: Answer) -> None:
        prompt, generated = answer.tokens
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        self.finished.update(m.finish_reason for made in answer.made for m in made)


def page(
    model: str,
    slots: Slots,
    adapters: Iterable[str],
    counters: Counters,
    cache: PrefixCache,
) -> str:
    """The Prometheus page."""
    label = f'{{engine="0",model_name="{model}"}}'
    samples: list[tuple[str, str, str, float]] = [
        ("vllm:num_requests_running", "gauge", label, slots.running),
        ("vllm:num_requests_waiting", "gauge", label, slots.waiting),
        ("vllm:kv_cache_usage_perc", "gauge", label, min(1.0, slots.running / (slots.count or 256))),
        ("vllm:prefix_cache_queries_total", "counter", label, cache.queries),
        ("vllm:prefix_cache_hits_total", "counter", label, cache.hits),
        ("vllm:prompt_tokens_total", "counter", label, counters.prompt_tokens),
        ("vllm:generation_tokens_total", "counter", label, counters.generated_tokens),
    ]
    for reason in ("stop", "length"):
        labels = f'{{engine="0",finished_reason="{reason}",model_name="{model}"}}'
        samples.append(("vllm:request_success_total", "counter", labels, counters.finished[reason]))
    names = ",".join(adapters)
    loras = f'{{max_lora="4",running_lora_adapters="{names}",waiting_lora_adapters=""}}'
    samples.append(("vllm:lora_requests_info", "gauge", loras, time.time()))
    lines = []
    for name, kind, labels, value in samples:
        lines += [f"# TYPE {name.removesuffix('_total')} {kind}", f"{name}{labels} {float(value)}"]
    return "\n".join(lines) + "\n"
