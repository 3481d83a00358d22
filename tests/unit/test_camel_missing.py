"""Without camel-ai, or with one that cannot be imported, its module says what to install; nothing else needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = """
import sys
from coterie.errors import ConfigError
{before}
try:
    import coterie.inference.camel
except ConfigError as error:
    print(error)
else:
    print("imported")
"""


def told(folder: Path, before: str = "") -> str:
    """What importing the module says, with `folder` first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", IMPORT.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    return done.stdout.strip()


def test_a_missing_extra_names_what_to_install(tmp_path: Path) -> None:
    said = told(tmp_path, "sys.modules['camel'] = sys.modules['openai'] = None")
    assert "pip install 'coterie[camel]'" in said


@pytest.mark.parametrize("module", ["mcp.server.fastmcp", "mcp"])
def test_mcp_2_is_told_apart_from_a_missing_extra(tmp_path: Path, module: str) -> None:
    (tmp_path / "openai.py").touch()
    (tmp_path / "camel").mkdir()
    (tmp_path / "camel" / "__init__.py").write_text(f"raise ImportError('cannot import FastMCP', name={module!r})")
    said = told(tmp_path)
    assert "pip install 'mcp<2'" in said
    assert "coterie[camel]" not in said


def test_everything_else_is_imported_without_camel() -> None:
    program = (
        "import sys; sys.modules['camel'] = sys.modules['openai'] = None;"
        "import coterie.inference.agent_calls, coterie.inference.counting, coterie.inference.client, coterie.doctor"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
