"""Transformers without its chatter, for as long as a `with` block lasts.

Loading and saving print progress bars and advice meant for somebody else. Coterie reports its own progress, so it turns
these off around its own calls and puts back whatever the user had set.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' and huggingface_hub's progress bars, log lines below error, and Python warnings."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # enables the hub's bars too
        (enable_progress_bars if hub_bars else disable_progress_bars)()
