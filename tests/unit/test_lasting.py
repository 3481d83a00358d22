"""A run outlives whoever reads what it says."""

from __future__ import annotations

import errno
import io
import os
import pty
from collections.abc import Callable

import pytest

from coterie.monitor.lasting import LastingStream


class Failing(io.StringIO):
    """A stream without a descriptor that fails with these errors, one a write, then works."""

    def __init__(self, *faults: OSError) -> None:
        super().__init__()
        self.faults = list(faults)

    def write(self, text: str) -> int:
        if self.faults:
            raise self.faults.pop(0)
        return super().write(text)


def test_what_is_written_arrives_and_questions_are_the_streams_own() -> None:
    stream = io.StringIO()
    lasting = LastingStream(stream)
    assert lasting.write("one") == 3
    lasting.flush()
    assert stream.getvalue() == "one"
    assert lasting.isatty() is False
    assert lasting.encoding is stream.encoding


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "gone"), OSError(errno.ENXIO, "gone")])
def test_after_the_reader_is_gone_nothing_more_is_tried(error: OSError) -> None:
    stream = Failing(error)
    lasting = LastingStream(stream)
    assert lasting.write("one") == 3
    assert lasting.write("two") == 3
    lasting.flush()
    assert stream.getvalue() == ""
    assert stream.faults == []


def test_a_full_disk_costs_what_could_not_be_written() -> None:
    stream = Failing(OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full"))
    lasting = LastingStream(stream)
    for text in ("one", "two", "three"):
        assert lasting.write(text) == len(text)
    assert stream.getvalue() == "three"


def test_only_failures_of_the_outside_are_forgiven() -> None:
    class Wrong(io.StringIO):
        def write(self, text: str) -> int:
            raise UnicodeEncodeError("ascii", text, 0, 1, "cannot")

    with pytest.raises(UnicodeEncodeError):
        LastingStream(Wrong()).write("协")


def _pipe() -> tuple[int, Callable[[], None]]:
    reading, writing = os.pipe()
    return writing, lambda: os.close(reading)


def _terminal() -> tuple[int, Callable[[], None]]:
    ours, theirs = pty.openpty()
    return theirs, lambda: os.close(ours)


@pytest.mark.parametrize("made", [_pipe, _terminal])
def test_once_the_reader_is_gone_nobody_elses_write_fails_either(
    made: Callable[[], tuple[int, Callable[[], None]]],
) -> None:
    descriptor, leave = made()
    with open(descriptor, "w") as stream:
        lasting = LastingStream(stream)
        lasting.write("one\n")
        lasting.flush()
        leave()
        lasting.write("two\n")
        lasting.flush()
        stream.write("three\n")  # a print, say
        stream.flush()
