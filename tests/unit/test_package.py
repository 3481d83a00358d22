"""The package as a user imports it: every public name is there, and importing costs nothing."""

from __future__ import annotations

import subprocess
import sys

import coterie


def test_public_names_are_sorted_and_exist() -> None:
    assert coterie.__all__ == sorted(coterie.__all__)
    for name in coterie.__all__:
        assert getattr(coterie, name).__name__ == name
    assert dir(coterie) == coterie.__all__


def test_importing_coterie_imports_no_heavy_library() -> None:
    code = "import sys, coterie, coterie.cli.main; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
