"""`coterie init NAME`: a scenario of one's own to start from, as a package of one file with a test and a config.

The templates beside this module are a game that works; NAME takes the place of its name in all of them. The folder
appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.common import say
from coterie.errors import ConfigError, CoterieError

TEMPLATE = {
    "scenario.py.txt": "{module}.py",
    "test_scenario.py.txt": "test_{module}.py",
    "config.toml.txt": "{name}.toml",
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
}
"""Template -> file of the package."""

_TAKEN = frozenset({
    "Field", "Iterator", "Mapping", "Observation", "Outcome", "ScenarioOptions", "Seat", "Sequence", "Split", "Table",
    "TaskType", "TrainingTask",
})  # fmt: skip
"""Names the template uses for other things."""


class InitError(CoterieError):
    """The folder cannot be made."""

    exit_code = 1


def init(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help='Of the scenario, like "tea-party".', show_default=False),
    ],
    folder: Annotated[Path | None, typer.Option(help="Where to make it.", show_default="./NAME")] = None,
) -> None:
    """Write a scenario package to start from: one file, a test, a config."""
    module, class_name = names(name)
    target = folder or Path(name)
    write(target, name, module, class_name)
    say(f"written: {target}")
    for line in (
        f"cd {target}",
        f"coterie check {module}:{class_name}     # does it keep the contract?",
        "python -m pytest" + " " * max(1, len(module) + len(class_name) + 4) + "# are the rules what they should be?",
        f"coterie train {name}.toml",
    ):
        say(f"  {line}")


def names(name: str) -> tuple[str, str]:
    """Module and class of a scenario of this name: "tea-party" -> ("tea_party", "TeaParty").

    Raises:
        ConfigError: it is no name for a module, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or len(name) > 40:
        raise ConfigError(
            f"{name!r} cannot name a scenario; use up to 40 lower-case letters and digits, with single '-' between, "
            "starting with a letter, like tea-party"
        )
    module = name.replace("-", "_")
    class_name = "".join(part.capitalize() for part in module.split("_"))
    from coterie.scenarios.base import SCENARIOS

    if name in SCENARIOS or module in SCENARIOS:
        raise ConfigError(f"{name!r} is a built-in scenario; choose another name")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or class_name in {*_TAKEN, *dir(builtins)}:
        raise ConfigError(f"{name!r} is a name of Python or of Coterie itself; choose another, like my-{name}")
    if module.startswith("test_") or module == "conftest":
        raise ConfigError(f"{name!r} would be taken for a test; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f"there is a module {module!r} already, which it would hide; choose another name")
    return module, class_name


def write(target: Path, name: str, module: str, class_name: str) -> None:
    """Make the package in `target`, which must not be there yet. Raises `InitError`."""
    if target.exists() or target.is_symlink():
        raise InitError(f"{target} is there already; nothing was written. Give another name, or --folder DIR")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        try:
            for template, file in TEMPLATE.items():
                text = files("coterie.cli").joinpath("template", template).read_text(encoding="utf-8")
                made = filled(text, name, module, class_name)
                (aside / file.format(name=name, module=module)).write_text(made, encoding="utf-8")
            aside.chmod(0o755)
            aside.rename(target.absolute())
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InitError(
            f"cannot write {target}: {error.strerror or error}; choose another place by --folder"
        ) from error


def filled(text: str, name: str, module: str, class_name: str) -> str:
    """A template with the scenario's names in the place of its own."""
    text = re.sub(r'"rendezvous:Rendezvous"', f'"{module}:{class_name}"', text)
    text = re.sub(r"\brendezvous(?=:R|\.py\b| import\b)", module, text)
    text = re.sub(r'(py-modules = \[")rendezvous', rf"\g<1>{module}", text)
    return text.replace("Rendezvous", class_name).replace("rendezvous", name)
