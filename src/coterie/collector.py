"""Python's cyclic collector, kept from walking the model again and again.

The collector visits every container it knows whenever enough new ones were made, and an update makes millions: turns,
tasks, futures. What was there before the run (the model's modules, the libraries) does not become garbage while it
lasts, so it is set aside, and what is new is looked at less often. Reference counting frees nearly everything at once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG, _MIDDLE, _OLD = 100_000, 20, 50
"""New containers until the youngest are visited; visits until the next older generation is."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within: what exists now is not visited, what comes later seldom. Afterwards all is as it was."""
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # whoever froze before us keeps what they froze
            gc.unfreeze()
