"""Scripts that stand outside the package, as modules: what `benchmarks/` and `docs/` hold is tested too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: str) -> ModuleType:
    """The module of a script of the repository ("benchmarks/claims.py"), with its folder importable as when it runs."""
    script = ROOT / path
    if str(script.parent) not in sys.path:
        sys.path.append(str(script.parent))
    module = importlib.import_module(script.stem)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == script, f"{script.stem} is shadowed by {module.__file__}"
    return module
