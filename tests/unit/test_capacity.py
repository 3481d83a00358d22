"""How much memory there is: of the machine, of a container, and where the system does not tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.capacity import free_memory, whole_memory

MEMINFO = "MemTotal:       8000 kB\nMemFree:  10 kB\nMemAvailable:    3000 kB\n"
STAT = "anon 1400000\nfile 2100000\nactive_file 100000\ninactive_file 2000000\n"


def system(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / ("proc/meminfo" if name == "meminfo" else f"sys/fs/cgroup/memory.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "whole", "free"),
    [
        ({"meminfo": MEMINFO}, 8_192_000, 3_072_000),
        ({"meminfo": MEMINFO, "max": "max\n", "current": "9\n"}, 8_192_000, 3_072_000),
        ({"meminfo": MEMINFO, "max": "4000000\n", "current": "3500000\n"}, 4_000_000, 500_000),
        ({"meminfo": MEMINFO, "max": "4000000\n", "current": "4100000\n"}, 4_000_000, 0),
        ({"meminfo": MEMINFO, "max": "9000000\n", "current": "1000000\n"}, 8_192_000, 3_072_000),
        # files that were read give way
        ({"meminfo": MEMINFO, "max": "4000000\n", "current": "3500000\n", "stat": STAT}, 4_000_000, 2_500_000),
    ],
)
def test_the_smaller_of_machine_and_container(tmp_path: Path, files: dict[str, str], whole: int, free: int) -> None:
    root = system(tmp_path, **files)
    assert (whole_memory(root), free_memory(root)) == (whole, free)


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_what_the_system_does_not_tell(tmp_path: Path, text: str) -> None:
    assert free_memory(system(tmp_path, meminfo=text)) is None
    assert free_memory(tmp_path / "nowhere") is None


def test_this_machine() -> None:
    whole, free = whole_memory(), free_memory()
    assert whole is not None
    assert whole > 2**28
    assert free is None or free <= whole
