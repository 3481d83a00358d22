from __future__ import annotations

from coterie.prompts.loader import text


def test_values_that_are_equal_but_written_differently_keep_their_text() -> None:
    one = text("en", "tasks", "reasoning", numbers=[1, 2])
    assert text("en", "tasks", "reasoning", numbers=[1.0, 2]) != one
    assert text("en", "tasks", "reasoning", numbers=(1, 2)) == one
