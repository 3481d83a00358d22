"""Memory that is freed and wanted again at once.

Every pass makes and frees tensors of some megabytes. glibc gives such memory back to the system and asks for it anew,
page by page and filled with zeros: a tenth of an update of a small model on a processor. Told once, it keeps what it
was given; a process then stays as large as it once was.
"""

from __future__ import annotations

import os
from ctypes import CDLL
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt in malloc.h."""
_LARGEST = 2**25
"""Bytes up to which a piece of memory is taken from what was kept. glibc goes as far by itself: larger pieces might
leave holes that fit nothing."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees. Returns False, and changes nothing, where the C library is not glibc,
    or where the user has set how it allocates."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError, TypeError):
        return False
    return bool(library.mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))
