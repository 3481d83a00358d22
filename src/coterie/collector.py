"""Python's cyclic collector, kept from walking again and again what is alive.

The collector visits every container it knows whenever enough new ones were made, and an update makes millions: turns,
tasks, futures. What was there before the run (the model's modules, the libraries) does not become garbage while it
lasts, so it is set aside. What is new is nearly all freed by reference counting, once its episode is over; until then a
visit finds nothing, and with ten thousand episodes at once visits took a third of the loop's time. So the threshold
follows what visits find: it doubles while most of what they see is alive, and halves when it is not. Garbage is thus
at most about as much as was alive at once.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

_YOUNG, _MIDDLE, _OLD = 100_000, 5, 50
"""New containers until the youngest are visited, to begin with; visits until the next older generation is."""
_MUCH = 0.25
"""Of the containers that were new at a visit: from this share on, garbage is worth looking for."""


class RareCollections:
    """Within: what exists now is not visited, what comes later seldom. Afterwards all is as it was.

    What the threshold came to is kept for the next time.
    """

    def __init__(self) -> None:
        self._young = _YOUNG
        self._before = gc.get_threshold()
        self._frozen = 0

    def __enter__(self) -> None:
        self._before, self._frozen = gc.get_threshold(), gc.get_freeze_count()
        gc.freeze()
        gc.set_threshold(self._young, _MIDDLE, _OLD)
        gc.callbacks.append(self._follow)

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self._follow)
        gc.set_threshold(*self._before)
        if not self._frozen:  # whoever froze before us keeps what they froze
            gc.unfreeze()

    def _follow(self, phase: str, info: Mapping[str, Any]) -> None:
        """Called by the collector around each visit."""
        if phase == "stop" and info["generation"] == 0:
            much = info["collected"] >= _MUCH * self._young
            self._young = max(_YOUNG, self._young // 2) if much else 2 * self._young
            gc.set_threshold(self._young, _MIDDLE, _OLD)
