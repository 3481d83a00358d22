"""Checkpointed state of credit schemes: refusing what another scheme saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.errors import RunFolderError


def refuse_state(scheme: str, state: Mapping[str, Any]) -> None:
    """For schemes without memory. Raises `RunFolderError` when `state` holds anything."""
    if state:
        raise RunFolderError(
            f"the checkpoint holds credit state {sorted(state)}, but scheme {scheme!r} has none; "
            f"resume with the credit scheme the run was made with"
        )
