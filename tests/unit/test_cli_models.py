"""`coterie models`: what a script reads, what a person sees, and how errors come out."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.lm import embedded
from coterie.lm.catalog import CATALOG, EmbeddedModel

SMOL = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def light_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching and converting that cost nothing."""

    def fetch(model: EmbeddedModel, directory: Path, report: embedded.Report) -> Path:
        report("downloading")
        (directory / "model.gguf").write_bytes(b"GGUF")
        return directory / "model.gguf"

    monkeypatch.setattr(embedded, "fetch_gguf", fetch)
    monkeypatch.setattr(embedded, "convert_gguf", lambda gguf, directory: gguf.rename(directory / "model.safetensors"))


def on_a_terminal(*arguments: str) -> str:
    """Run `coterie` with a terminal of 80 columns on all streams and return what it shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    program = "from coterie.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 4096):
                shown += block
        except OSError:  # how Linux says that the other end is closed
            pass
        finally:
            os.close(ours)
        assert process.wait(30) == 0
    return shown.decode()


def test_list_off_a_terminal_is_a_line_of_tab_separated_columns_a_model(cache: Path, light_model: None) -> None:
    for state in ("not fetched", "cached"):
        result = CliRunner().invoke(app, ["models", "list"])
        assert result.exit_code == 0
        rows = [line.split("\t") for line in result.stdout.splitlines()]
        assert rows == [[SMOL, "135M", "93 MB", "273 MB", "Apache-2.0", state, str(cache / "models" / SMOL)]]
        CliRunner().invoke(app, ["models", "pull", SMOL])


def test_list_on_a_terminal_is_a_table_with_whole_names(cache: Path) -> None:
    shown = on_a_terminal("models", "list")
    for part in (*CATALOG, "licence", "Apache-2.0", "│", f"kept in {cache / 'models'}"):
        assert part in shown


def test_pull_reports_on_standard_error_and_prints_the_directory(cache: Path, light_model: None) -> None:
    result = CliRunner().invoke(app, ["models", "pull", SMOL])
    assert result.exit_code == 0
    assert result.stdout == f"{cache / 'models' / SMOL}\n"
    assert result.stderr.splitlines()[0] == "downloading"
    assert result.stderr.splitlines()[-1] == f"{SMOL} is ready"
    again = CliRunner().invoke(app, ["models", "pull", SMOL])
    assert (again.stdout, again.stderr) == (result.stdout, "")


def test_pull_on_a_terminal_ends_with_the_directory() -> None:
    directory = embedded.resolve_base(SMOL, allow_download=False)
    assert str(directory) in on_a_terminal("models", "pull", SMOL).splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "said"),
    [("smollm2", f"did you mean '{SMOL}'?"), ("./nowhere", "no such directory"), ("", "unknown base model ''")],
)
def test_a_wrong_name_is_one_line_and_an_exit_code(cache: Path, name: str, said: str) -> None:
    result = CliRunner().invoke(app, ["models", "pull", name])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_the_command_line_needs_no_torch_to_list_models() -> None:
    program = (
        "import sys; from coterie.cli.main import app; from coterie.lm.embedded import list_models; list_models();"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
