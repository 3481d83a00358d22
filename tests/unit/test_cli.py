"""The command line: mistakes cost one line and no time, Ctrl-C costs nothing, and a person's answers are understood.

Environments here are small stand-ins that keep the promises the commands rely on; the end-to-end tests use real ones.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shlex
import signal
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.cli.play import Person, PersonLeftError, results, transcript
from coterie.cli.train import StopSignals, drive
from coterie.config import parse_config
from coterie.errors import BaseModelError, EngineError
from coterie.monitor.console import Observer, PlainConsole
from coterie.monitor.metrics import UpdateRecord
from coterie.monitor.tables import ResultTable
from coterie.runs.directory import RunDirectory
from coterie.runs.sinks import MetricsFile
from coterie.types import AdapterVersion, Episode, Observation, Tier
from tests.support.episodes import episode, make_turn

GOOD = 'name = "demo"\npreset = "cooperative_team"\nupdates = 4\n[scenario]\nid = "signaling"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    settings = {"name": "demo", "preset": "cooperative_team", "updates": 4, "scenario": {"id": "signaling"}}
    return RunDirectory.create(tmp_path / "my run", parse_config(settings))


def invoke(*arguments: object, text: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def coterie(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    code = "import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--set", "rolout.group_size=8"], 2, "unknown key 'rolout' (did you mean 'rollout'?)"),
        (["--set", "rollout.group_sise=8"], 2, "unknown key 'rollout.group_sise' (did you mean 'group_size'?)"),
        (["--set", "rollout.group_size=0"], 2, "rollout.group_size: Input should be greater than or equal to 1, got 0"),
        (["--set", "rollout.group_size"], 2, "write it as key=value"),
        (["--set", "mode=cooperativ"], 2, "mode: "),
        (["--set", "max_models=2"], 2, "3 models, but max_models is 2"),
        (["--seed", "-1"], 2, "seed: "),
        (["--set", "preset=cooperative"], 2, "unknown preset 'cooperative' (did you mean"),
        (["--set", "scenario.id=signalling"], 2, "unknown scenario 'signalling' (did you mean 'signaling'?)"),
        (["--set", "scenario.options.symbol=4"], 2, "unknown key 'symbol'"),
        (["--set", "credit.scheme=groups"], 2, "unknown credit 'groups'"),
        (["--set", "preset=''"], 2, "the config names no models"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(
    tmp_path: Path, config: Path, arguments: list[str], code: int, said: str
) -> None:
    result = invoke("train", config, "--folder", tmp_path / "run", *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_missing_or_broken_config_file(tmp_path: Path) -> None:
    result = invoke("train", tmp_path / "nowhere.toml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot read config" in result.stderr
    (tmp_path / "broken.toml").write_text("a = ")
    result = invoke("train", tmp_path / "broken.toml")
    assert result.exit_code == 2
    assert "not valid TOML" in result.stderr


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    result = invoke("train")
    assert result.exit_code == 2
    assert "coterie train CONFIG" in result.stderr


@pytest.mark.parametrize("extra", [["CONFIG"], ["--set", "a=1"], ["--folder", "x"], ["--seed", "1"]])
def test_resume_takes_no_other_settings(run: RunDirectory, extra: list[str]) -> None:
    result = invoke("train", "--resume", run.path, *extra)
    assert result.exit_code == 2
    assert "the run's own config" in result.stderr


def test_a_folder_with_another_run_is_refused(config: Path, run: RunDirectory) -> None:
    result = invoke("train", config, "--folder", run.path)
    assert result.exit_code == 5
    assert "already holds the run 'demo' (0 of 4 updates done" in result.stderr
    assert f"coterie train --resume '{run.path}'" in result.stderr


def test_a_run_in_use_is_refused(run: RunDirectory) -> None:
    with run.lock():
        result = invoke("train", "--resume", run.path)
    assert result.exit_code == 5
    assert f"in use by process {os.getpid()}" in result.stderr


@pytest.mark.parametrize("verb", ["eval", "play"])
def test_only_trained_runs_can_be_used(run: RunDirectory, tmp_path: Path, verb: str) -> None:
    result = invoke(verb, run.path)
    assert result.exit_code == 5
    assert f"has no checkpoint yet; train it first: coterie train --resume '{run.path}'" in result.stderr
    result = invoke(verb, tmp_path / "nowhere")
    assert result.exit_code == 5
    assert "no such folder" in result.stderr


def test_control_characters_in_a_message_do_not_reach_the_terminal(tmp_path: Path) -> None:
    result = invoke("train", tmp_path / "a\x1b[2J\nb.toml")
    assert "\x1b" not in result.stderr


def test_bugs_keep_their_trace(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> RunDirectory:
        raise ZeroDivisionError

    monkeypatch.setattr(RunDirectory, "open", broken)
    assert isinstance(invoke("eval", run.path).exception, ZeroDivisionError)


# -- quick and light ----------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    """What code that calls the command (`app`, `CliRunner`) prints, where nothing was imported before."""
    code = "import sys; from typer.testing import CliRunner; from coterie.cli.main import app\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bad_config_is_found_before_anything_heavy_is_imported(config: Path) -> None:
    code = (
        f"result = CliRunner().invoke(app, ['train', {str(config)!r}, '--set', 'credit.options.x=1'])\n"
        "assert result.exit_code == 2, result.output\n"
        "heavy = {'torch', 'transformers', 'numpy', 'coterie.environment'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    in_a_new_process(code)


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval"], ["play"], ["models"]])
def test_help_imports_little(arguments: list[str]) -> None:
    """Nearly all the time of `--help` is imports: about 300 modules, most of them Python's own, none heavy."""
    code = (
        f"result = CliRunner().invoke(app, {[*arguments, '--help']!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'Usage: coterie' in result.output, result.output\n"
        "print(*sys.modules)\n"
    )
    imported = in_a_new_process(code).split()
    heavy = {"torch", "transformers", "numpy", "aiohttp", "rich", "coterie.environment", "coterie.training"}
    assert not heavy & set(imported)
    assert len(imported) < 400


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"coterie {version('coterie')}\n")


def test_an_error_in_a_process_has_its_exit_code_and_no_trace(tmp_path: Path) -> None:
    done = coterie("eval", tmp_path)
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


# -- training -----------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    completed: bool
    update: int
    table: ResultTable | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    untrained: str = ""


class Trainer:
    """Trains for the run's updates: a metrics line each, a checkpoint at the end or when asked to stop."""

    def __init__(self, run: RunDirectory, observer: Observer, step: Callable[[Trainer], None] = lambda _: None) -> None:
        self.run, self.observer, self.step = run, observer, step
        self.stopping = False
        self.update = 0
        self.closed = 0

    def request_stop(self) -> None:
        self.stopping = True

    async def aclose(self) -> None:
        self.closed += 1

    async def train(self) -> Ended:
        metrics = MetricsFile(self.run.metrics_path)
        while self.update < self.run.config.updates and not self.stopping:
            self.update += 1
            self.step(self)
            await asyncio.sleep(0)
            record = UpdateRecord(self.update, self.run.config.updates, {}, (), {"total": 0.1})
            metrics.append(record)
            self.observer.update(record)
        self.run.checkpoint_dir(self.update).mkdir(exist_ok=True)
        self.run.complete_checkpoint(self.update)
        done = self.update == self.run.config.updates
        return Ended(
            done, self.update, ResultTable("held-out", ("model", "trained"), (("leader", 0.9),)) if done else None
        )


def train(run: RunDirectory, step: Callable[[Trainer], None] = lambda _: None) -> int:
    """Drive a `Trainer`; its exit code. However it ends, it is closed, once."""
    made: list[Trainer] = []

    def build(run: RunDirectory, observer: Observer) -> Trainer:
        made.append(Trainer(run, observer, step))
        return made[-1]

    try:
        drive(run, build, PlainConsole(sys.stdout))
    except typer.Exit as left:
        return left.exit_code
    finally:
        assert [trainer.closed for trainer in made] == [1]
    return 0


@pytest.fixture
def handlers() -> Iterator[None]:
    """Fails a test that leaves a signal handler behind. A hang-up is not ignored, as it is under nohup."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGHUP, ignored)
    assert after == before


@pytest.mark.usefixtures("handlers")
def test_a_finished_training_shows_the_table_and_what_to_do_next(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(run) == 0
    out = capsys.readouterr().out
    assert "update 4/4" in out
    assert out.index("held-out") < out.index(f"run: {run.path}")
    assert f"coterie eval '{run.path}'" in out
    assert f"coterie play '{run.path}'" in out
    assert "--resume" not in out


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_one_signal_finishes_the_step_and_saves(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    def second_step(trainer: Trainer) -> None:
        if trainer.update == 2:
            os.kill(os.getpid(), number)

    assert train(run, second_step) == code
    assert run.updates_done() == 2
    assert run.checkpoints() == [2]
    out = capsys.readouterr().out
    assert "stopping after this step" in out
    assert f"stopped after update 2 of 4; saved up to update 2 in {run.path}" in out
    assert f"go on: coterie train --resume '{run.path}'" in out


@pytest.mark.usefixtures("handlers")
def test_where_a_closed_terminal_is_to_be_ignored_the_run_goes_on(run: RunDirectory) -> None:
    def second_step(trainer: Trainer) -> None:
        if trainer.update == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert train(run, second_step) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.updates_done() == 4


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_ends_at_once(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    def second_step(trainer: Trainer) -> None:
        if trainer.update == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still going")

    assert train(run, second_step) == 130
    assert run.checkpoints() == []
    out = capsys.readouterr().out
    assert f"aborted; no checkpoint yet in {run.path}" in out
    assert "coterie train --resume" in out


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_while_another_task_runs_says_no_more(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = []

    async def call_a_server() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still going")

    def second_step(trainer: Trainer) -> None:
        if trainer.update == 2:
            os.kill(os.getpid(), signal.SIGINT)
            trainer.stopping = False
            tasks.append(asyncio.get_running_loop().create_task(call_a_server()))

    assert train(run, second_step) == 130
    (task,) = tasks
    assert task.done()
    del task, tasks[:]
    gc.collect()  # asyncio tells of failures nobody looked at when their task goes
    assert caplog.records == []


@pytest.mark.usefixtures("handlers")
def test_a_signal_before_training_interrupts(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    def build(run: RunDirectory, observer: Observer) -> Trainer:
        run.discard_unused()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still loading")

    with pytest.raises(typer.Exit) as left:
        drive(run, build, PlainConsole(sys.stdout))
    assert left.value.exit_code == 130
    assert "nothing was saved" in capsys.readouterr().out


@pytest.mark.usefixtures("handlers")
def test_a_training_that_stops_by_itself_is_no_success(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run, lambda trainer: trainer.request_stop()) == 1
    assert "stopped after update 1 of 4" in capsys.readouterr().out


@pytest.mark.usefixtures("handlers")
def test_an_error_in_training_comes_out_and_closes_the_display(run: RunDirectory) -> None:
    closed = []

    class Display(PlainConsole):
        def close(self) -> None:
            closed.append(True)

    def fail(trainer: Trainer) -> None:
        raise EngineError("out of cache")

    with pytest.raises(EngineError) as raised:
        drive(run, lambda r, observer: Trainer(r, observer, fail), Display(sys.stdout))
    assert closed
    assert raised.value.__notes__ == [f"no checkpoint yet in {run.path}\ngo on: coterie train --resume '{run.path}'"]


def test_signals_are_only_held_while_entered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(print):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


class Environment:
    """What the commands import as `MultiModelEnvironment`; `events` tells what they asked of it."""

    events: list[str] = []  # noqa: RUF012 - shared on purpose, the fixture empties it
    failure: BaseModelError | None = None
    step: Callable[[Trainer], None] = staticmethod(lambda trainer: None)

    def __init__(self, run: RunDirectory, observer: Observer) -> None:
        self.run, self.observer = run, observer

    @classmethod
    def from_config(cls, config: object, *, run_dir: RunDirectory, observer: Observer) -> Trainer:
        cls.events.append("from_config")
        if cls.failure is not None:
            raise cls.failure
        return Trainer(run_dir, observer, cls.step)

    @classmethod
    def resume(cls, run: RunDirectory, observer: Observer) -> Any:
        cls.events.append(f"resume {run.checkpoints()}")
        return cls(run, observer)

    async def train(self) -> Ended:
        return Ended(True, 4)

    def request_stop(self) -> None: ...

    async def aclose(self) -> None:
        self.events.append("closed")

    async def evaluate(self, tasks: int) -> ResultTable:
        assert (self.run.path / "lock").exists()
        return ResultTable("held-out", ("model", "tasks"), (("leader", tasks),))

    async def play(
        self, seat: str | None, ask: Callable[[str, Observation, Sequence[str] | None], str], task_index: int
    ) -> Episode:
        seat = seat or "b"
        colour = ask(
            seat, Observation(user=f"task {task_index}: which?", system="rules", prefix="Answer:"), (" red", " blue")
        )
        words = ask(seat, Observation(user="why?", system="rules"), None)
        turns = {
            "a": [make_turn("a", kind="advice", text="\x1b[31mtake [bold]red", adapter=AdapterVersion("leader", 4))],
            seat: [
                make_turn(seat, text=colour, tier=Tier.HUMAN, adapter=None),
                make_turn(seat, text=words, tier=Tier.HUMAN),
            ],
        }
        return episode(
            "play", scores={"a": 1.0, seat: 0.5}, rewards={"a": 0.5, seat: 0.25}, accuracy={seat: 0.75}, turns=turns,
            metrics={"agreement": 1.0}, withheld={"a"},
        )  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> type[Environment]:
    module = types.ModuleType("coterie.environment")
    module.MultiModelEnvironment = Environment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coterie.environment", module)
    monkeypatch.setattr(Environment, "events", [])
    monkeypatch.setattr(Environment, "failure", None)
    return Environment


@pytest.fixture
def trained(run: RunDirectory) -> RunDirectory:
    run.checkpoint_dir(4).mkdir()
    run.complete_checkpoint(4)
    return run


@pytest.mark.usefixtures("environment")
def test_train_makes_a_run_and_trains_it(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("train", config, "--set", "updates=2", "--seed", "5")
    assert result.exit_code == 0, result.output
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("demo-")
    made = RunDirectory.open(folder)
    assert (made.config.seed, made.config.updates, made.updates_done()) == (5, 2, 2)
    assert f"run: runs/{folder.name}" in result.stdout
    assert not (folder / "lock").exists()
    assert "\x1b" not in result.stdout


def test_a_run_that_cannot_start_leaves_its_folder_free(
    config: Path, tmp_path: Path, environment: type[Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "failure", BaseModelError("no base model 'x'; coterie models list"))
    result = invoke("train", config, "--folder", tmp_path / "run")
    assert result.exit_code == 3
    assert result.stderr == "error: no base model 'x'; coterie models list\n"
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(environment, "failure", None)
    assert invoke("train", config, "--folder", tmp_path / "run").exit_code == 0


def fails_after_a_checkpoint(error: Exception) -> Callable[[Trainer], None]:
    def step(trainer: Trainer) -> None:
        if trainer.update == 3:
            trainer.run.checkpoint_dir(2).mkdir()
            trainer.run.complete_checkpoint(2)
            raise error

    return step


def test_an_error_in_training_says_how_to_go_on(
    config: Path, tmp_path: Path, environment: type[Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "step", staticmethod(fails_after_a_checkpoint(EngineError("out of cache"))))
    folder = tmp_path / "my run"
    result = invoke("train", config, "--folder", folder)
    assert result.exit_code == 6
    assert result.stderr == (
        f"error: out of cache\nsaved up to update 2 in {folder}\ngo on: coterie train --resume '{folder}'\n"
    )
    # what was printed, typed
    again = invoke(*shlex.split(result.stderr.splitlines()[-1].removeprefix("go on: coterie ")))
    assert again.exit_code == 0
    assert environment.events[-2:] == ["resume [2]", "closed"]


def test_a_bug_in_training_says_how_to_go_on_after_its_trace(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        drive(run, lambda r, o: Trainer(r, o, fails_after_a_checkpoint(ZeroDivisionError())), PlainConsole(sys.stdout))
    shown = "".join(traceback.format_exception(raised.value)).splitlines()
    assert shown[-2:] == [f"saved up to update 2 in {run.path}", f"go on: coterie train --resume '{run.path}'"]


def test_resume_goes_on_from_the_checkpoint(trained: RunDirectory, environment: type[Environment]) -> None:
    result = invoke("train", "--resume", trained.path)
    assert result.exit_code == 0, result.output
    assert environment.events == ["resume [4]", "closed"]


def test_resume_before_any_checkpoint_begins_anew(run: RunDirectory, environment: type[Environment]) -> None:
    MetricsFile(run.metrics_path).append(UpdateRecord(1, 4, {}, (), {}))
    result = invoke("train", "--resume", run.path)
    assert result.exit_code == 0, result.output
    assert environment.events == ["from_config"]
    assert "starting from the beginning" in result.stdout
    assert [entry["update"] for entry in MetricsFile.read(run.metrics_path)] == [1, 2, 3, 4]


def test_eval_shows_and_keeps_its_table(trained: RunDirectory, environment: type[Environment]) -> None:
    result = invoke("eval", trained.path, "--tasks", 12)
    assert result.exit_code == 0, result.output
    assert environment.events == ["resume [4]", "closed"]
    assert "leader     12" in result.stdout
    assert '"tasks"' in (trained.path / "results" / "eval.json").read_text()
    assert invoke("eval", trained.path).stdout.count("leader    100") == 1
    assert invoke("eval", trained.path, "--tasks", 0).exit_code == 2
    assert not (trained.path / "lock").exists()


# -- playing ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
def test_a_person_plays_to_the_end(trained: RunDirectory) -> None:
    result = invoke("play", trained.path, "--task", 3, "--seat", "b", text="green\n2\n\nbecause 协同\n")
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "task 3: which?" in out
    assert out.count("rules") == 1  # the same rules are not repeated
    assert "  1) red" in out
    assert "that is not one of the answers; type a number from 1 to 2" in out
    assert "an empty answer does not count" in out
    assert "a (leader@v4), advice (not delivered): [31mtake [bold]red" in out
    assert "b (you), answer: blue" in out
    assert "b (you), answer: because 协同" in out
    assert "outcome (agreement 1.000)" in out
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ["a", "leader@v4", "1.000", "-", "0.500"],
        ["b", "you", "0.500", "0.750", "0.250"],
    ]
    assert "\x1b" not in out


@pytest.mark.parametrize("typed", ["", "2\n", "nonsense\n"])
def test_a_person_may_leave(trained: RunDirectory, environment: type[Environment], typed: str) -> None:
    result = invoke("play", trained.path, text=typed)
    assert result.exit_code == 0
    assert environment.events == ["resume [4]", "closed"]
    assert "goodbye" in result.stdout
    assert result.stderr == ""


@pytest.mark.usefixtures("environment")
def test_ctrl_c_at_the_prompt_leaves_at_once(trained: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(prompt: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the prompt went on")

    monkeypatch.setattr("builtins.input", pressed)
    result = invoke("play", trained.path)
    assert result.exit_code == 130
    assert "interrupted" in result.stdout
    assert not (trained.path / "lock").exists()


def person(*lines: str) -> Person:
    """A person who types these lines and then leaves."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    return Person(read)


SHOWN = Observation(user="?")


@pytest.mark.parametrize(
    ("typed", "choices", "meant"),
    [
        (["2"], (" red", " blue"), " blue"),
        (["blue"], (" red", " blue"), " blue"),
        (["  BLUE "], (" red", " blue"), " blue"),
        (["0", "3", "-1", "²", "blu", "1"], (" red", " blue"), " red"),
        (["a"], ("A", "a"), "a"),  # the exact text wins over the same in other case
        (["2"], ("2", "1"), "2"),  # where answers are numbers, a number is the answer
        (["3", "1"], ("2", "1"), "1"),  # and never its place
        (["合作"], ("合作", "竞争"), "合作"),
        (["\x1b1"], ("a", "b"), "a"),
    ],
)
def test_what_a_person_means(typed: list[str], choices: tuple[str, ...], meant: str) -> None:
    assert person(*typed).ask("a", SHOWN, choices) == meant


def test_numbers_as_answers_are_not_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    person("9").ask("a", SHOWN, (" 7", " 9"))
    out = capsys.readouterr().out
    assert "  - 7\n  - 9\n" in out
    assert "1)" not in out


def test_what_is_shown_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    person("1").ask("a\x07", Observation(user="\x1b[2J[red]hi", system="s\x9b", prefix="p\x1b"), ("\x1b[0mx",))
    out = capsys.readouterr().out
    assert "[2J[red]hi" in out
    assert not {char for char in out if (char != "\n" and ord(char) < 32) or 0x7F <= ord(char) < 0xA0}


def test_bytes_that_are_no_text_are_asked_again() -> None:
    answers = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "fine"])

    def read(prompt: str) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Person(read).ask("a", SHOWN, None) == "fine"


def test_one_who_left_is_not_asked_again() -> None:
    gone = person()
    for _ in range(2):
        with pytest.raises(PersonLeftError):
            gone.ask("a", SHOWN, ("x",))
    assert gone.left


def test_the_transcript_says_who_held_each_seat() -> None:
    turns = {
        "a": [make_turn("a", adapter=AdapterVersion("model_a", 7), text="one"), make_turn("a", text="two\nlines")],
        "b": [make_turn("b", model_id=None, text="three")],
        "c": [make_turn("c", adapter=None, text="four")],
        "d": [],
    }
    played = episode("e", scores=dict.fromkeys("abcd", 0.5), turns=turns)
    assert transcript(played)[1:] == [
        "a (model_a@v7), answer: one",
        "a (model_a@v7), answer: two\nlines",
        "b (a script), answer: three",
        "c (the bare base), answer: four",
    ]
    assert [row[1] for row in results(played).rows] == ["model_a@v7", "a script", "the bare base", "model_d"]
    assert results(played).title == "outcome"
