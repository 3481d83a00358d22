"""The settings of a server."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ServeSettings(BaseModel):
    """What a server serves, to whom, and how much of it at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "smollm2-135m-instruct"
    """The served name of the base model."""
    root: str = ""
    """Where its weights are; shown by /v1/models."""
    api_key: str | None = Field(default=None, repr=False)
    """Asked for as "Authorization: Bearer …" on everything but /health, /ping, /version and /metrics; None: open."""
    adapter_dirs: tuple[Path, ...] = ()
    """Adapters may be loaded from these directories and those below them; none: no loading over HTTP."""
    max_adapters: int = Field(default=64, ge=1)
    """Adapters held at once."""
    max_lora_rank: int = Field(default=64, ge=1)
    """Largest rank of an adapter."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together; None: what the engine holds."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one answer; None: as many as fit."""
    max_n: int = Field(default=64, ge=1)
    """Most answers to one prompt."""
    max_prompts: int = Field(default=1024, ge=1)
    """Most prompts in one request to /v1/completions."""
    max_sequences: int = Field(default=256, ge=1)
    """Most sequences generated at once, over all requests; beyond it requests are answered with 503."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most log-probabilities a token may come with."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Of a request."""
    seed: int | None = None
    """Of requests that bring none; None: drawn from the system, so that two servers differ."""
