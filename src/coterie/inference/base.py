"""The seam between the loop and whatever generates text: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from coterie.errors import RequestError
from coterie.types import AdapterVersion, GenerateRequest, Generation, Observation, Tier


class Engine(Protocol):
    """Generates turns under adapter versions that were published to it."""

    @property
    def tier(self) -> Tier:
        """Where its turns come from; of several tiers, where the next call starts."""
        ...

    async def generate(self, request: GenerateRequest) -> Generation:
        """Generate once.

        Raises:
            RequestError: this request cannot be served and others can: prompt and answer longer than the model's
                context or than the cache, an empty prompt, choices that are no set of different answers.
            EngineError: the adapter version was never published here, or the engine is broken.
        """
        ...

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """Make an adapter version available. `adapter_dir` holds it in PEFT format; None where engine and learner
        share their weights, and publishing only moves the version number. Publishing a version again is allowed and
        forgets what was cached under it, so that what follows does not depend on what was asked before."""
        ...

    async def close(self) -> None: ...


def check_request(request: GenerateRequest) -> None:
    """What no engine can serve. Raises `RequestError`."""
    if not request.prompt_ids:
        raise RequestError("prompt_ids is empty")
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens {request.max_tokens} must be at least 1")
    if request.distribution and request.choices is None:
        raise RequestError("distribution=True needs choices")


class ChatFormat(Protocol):
    """How observations become prompt ids and ids become text, for one base model."""

    stop_ids: tuple[int, ...]

    def render(self, observation: Observation) -> tuple[int, ...]:
        """Prompt ids under the chat template, assistant turn opened, `observation.prefix` appended."""
        ...

    def encode_choices(self, observation: Observation, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each choice as a continuation of the rendered prompt."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        ...
