"""Foreign code runs with random states of its own and without a network, and what goes wrong there says what to do."""

from __future__ import annotations

import random
import socket
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.foreign import (
    GameOptions,
    Sandbox,
    attribute,
    distinct,
    game_seed,
    game_tasks,
    load,
    scored,
)
from coterie.types import Split
from tests.support.tables import make_task


def draws(sandbox: Sandbox, count: int) -> list[float]:
    """Numbers from both global generators, one call of foreign code each."""
    drawn = []
    for _ in range(count):
        with sandbox.running("a game"):
            drawn += [random.random(), float(np.random.random())]
    return drawn


def seeds_and_breaks() -> None:
    random.seed(99)
    np.random.seed(99)
    raise ValueError("broken")


def wants_words() -> None:
    try:
        socket.getaddrinfo("words.example", 443)
    except OSError:
        raise LookupError("no words") from None


# -- random states ----------------------------------------------------------------------------------------------------


def test_interleaved_episodes_draw_what_each_would_alone() -> None:
    alone = [draws(Sandbox(seed), 3) for seed in (1, 2)]
    first, second = Sandbox(1), Sandbox(2)
    together: list[list[float]] = [[], []]
    for _ in range(3):
        together[0] += draws(first, 1)
        together[1] += draws(second, 1)
    assert together == alone
    assert alone[0] != alone[1]


def test_the_global_generators_go_on_as_if_nothing_had_been() -> None:
    kept = random.getstate(), np.random.get_state()
    random.seed(7)
    np.random.seed(7)
    try:
        expected = [random.random(), np.random.random()]
        random.seed(7)
        np.random.seed(7)
        with pytest.raises(ScenarioError), Sandbox(3).running("a game"):
            seeds_and_breaks()
        assert [random.random(), np.random.random()] == expected
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def test_seeds_of_any_size_will_do() -> None:
    assert draws(Sandbox(-1), 1) != draws(Sandbox(2**70), 1)


# -- network ----------------------------------------------------------------------------------------------------------


def test_there_is_no_network_inside_and_it_is_there_again_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with Sandbox(0).running("a game"):
            with pytest.raises(OSError, match="no network here"):
                socket.create_connection(address, timeout=1)
            with socket.socket() as plain, pytest.raises(OSError, match="no network here"):
                plain.connect(address)
            with socket.socket() as plain, pytest.raises(OSError, match="no network here"):
                plain.connect_ex(address)
        socket.create_connection(address, timeout=5).close()
    assert "connect" not in vars(socket.socket), "nothing of it stays behind"


def test_other_threads_keep_their_network() -> None:
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(0).running("a game"):

        def connect() -> None:
            socket.create_connection(server.getsockname(), timeout=5).close()
            reached.append(True)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join(10)
    assert reached == [True]


def test_sandboxes_may_be_nested() -> None:
    outer, inner = Sandbox(1), Sandbox(2)
    with outer.running("outer"):
        before = random.random()
        with inner.running("inner"):
            random.random()
        after = random.random()
        with pytest.raises(OSError, match="no network"):
            socket.getaddrinfo("localhost", 80)
    rng = random.Random(1)
    assert [before, after] == [rng.random(), rng.random()]
    assert socket.getaddrinfo("127.0.0.1", 80)


def test_what_fails_for_want_of_a_network_says_so() -> None:
    sandbox = Sandbox(0)
    message = r"a game: LookupError: no words \(it wanted to reach words\.example"
    with pytest.raises(ScenarioError, match=message), sandbox.running("a game"):
        wants_words()


def test_errors_say_where_and_what_and_ours_pass() -> None:
    with pytest.raises(ScenarioError, match=r"^chess: KeyError: 'e9'$") as caught, Sandbox(0).running("chess"):
        raise KeyError("e9")
    assert isinstance(caught.value.__cause__, KeyError)
    ours = ConfigError("as it is")
    with pytest.raises(ConfigError) as passed, Sandbox(0).running("chess"):
        raise ours
    assert passed.value is ours
    with pytest.raises(KeyboardInterrupt), Sandbox(0).running("chess"):
        raise KeyboardInterrupt


# -- importing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("fetching", "wanting", "printing", "broken", "own"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(
        ConfigError, match=r"scenario 'chess' needs the package no_such_game; pip install 'coterie\[chess\]'"
    ):
        load("no_such_game", extra="chess", scenario="chess")
    with pytest.raises(ConfigError, match=r"needs the package no_such_game; pip install"):
        load("no_such_game.sub", extra="chess", scenario="chess")


def test_other_import_errors_say_what_they_are(folder: Path) -> None:
    (folder / "wanting.py").write_text("import no_such_dependency")
    with pytest.raises(ConfigError, match="wanting needs 'no_such_dependency', which is not installed"):
        load("wanting", extra="chess", scenario="chess")
    (folder / "broken.py").write_text("raise RuntimeError('too old')")
    with pytest.raises(ConfigError, match=r"cannot import broken: .*too old; pip install -U 'coterie\[chess\]'"):
        load("broken", extra="chess", scenario="chess")
    with pytest.raises(ConfigError, match=r"email has no module 'email.nothing'; check its name"):
        load("email.nothing", extra="chess", scenario="chess")


def test_importing_is_quiet_and_offline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "printing.py").write_text("print('welcome')\nimport random\nrandom.seed(1)")
    before = random.getstate()
    assert load("printing", extra="chess", scenario="chess") is sys.modules["printing"]
    assert random.getstate() == before
    assert capsys.readouterr().out == ""
    (folder / "fetching.py").write_text("import socket\nsocket.create_connection(('words.example', 443))")
    with pytest.raises(ConfigError, match=r"it wanted to reach words\.example"):
        load("fetching", extra="chess", scenario="chess")


def test_a_function_of_the_users_is_found_or_the_mistake_is(folder: Path) -> None:
    (folder / "own.py").write_text("def tell(): return 1")
    assert attribute("render", "own:tell")() == 1
    for name, message in [
        ("own", 'write it as "module:attr"'),
        ("own:", 'write it as "module:attr"'),
        ("own:show", "module 'own' has no 'show'"),
        ("owned:tell", "cannot import 'owned'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            attribute("render", name)


# -- tasks and scores -------------------------------------------------------------------------------------------------


def test_training_and_held_out_starts_differ() -> None:
    options = GameOptions(max_turns=5, cooperation_level=0.25, reward_pool=2.0)
    sides = {split: list(islice(game_tasks("g", "chess", 2, options, split, 0), 200)) for split in Split}
    seeds = {split: {task.content["game_seed"] for task in tasks} for split, tasks in sides.items()}
    assert not seeds[Split.TRAIN] & seeds[Split.HELDOUT]
    assert min(map(len, seeds.values())) == 200
    task = sides[Split.HELDOUT][0]
    assert (task.max_steps, task.required_models, task.cooperation_level, task.reward_pool) == (5, 2, 0.25, 2.0)
    assert game_seed(task, "chess") == task.content["game_seed"]
    again = next(iter(game_tasks("g", "chess", 2, options, Split.HELDOUT, 0)))
    other = next(iter(game_tasks("g", "chess", 2, options, Split.HELDOUT, 1)))
    assert again == task != other


def test_a_users_task_may_be_empty_and_not_of_another_game() -> None:
    assert game_seed(make_task(), "chess") == game_seed(make_task(), "go")
    assert game_seed(make_task(), "chess") != game_seed(make_task(task_id="u"), "chess")
    for content in ({"game": "go", "game_seed": 1}, {"game": "chess"}, {"game": "chess", "game_seed": True}):
        with pytest.raises(ScenarioError, match="task 't': content must be"):
            game_seed(make_task(content=content), "chess")


def test_scores_are_where_rewards_lie_in_their_range() -> None:
    assert scored({"a": -1.0, "b": 0.0, "c": 1.0}, (-1, 1)) == {"a": 0.0, "b": 0.5, "c": 1.0}
    assert scored({"a": 3.0}, (1, 5)) == {"a": 0.5}
    for reward in (1.1, -1.1, float("nan"), float("inf")):
        with pytest.raises(
            ScenarioError, match=r"'a' a reward of .*outside reward_range \[-1, 1\]; set scenario.options"
        ):
            scored({"a": reward}, (-1, 1))


@pytest.mark.parametrize("reward_range", [(1, 1), (2, 1), (0, float("inf"))])
def test_an_impossible_range_is_refused(reward_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="give the least and the greatest reward"):
        GameOptions(reward_range=reward_range)


def test_choices_must_be_told_apart() -> None:
    assert distinct(["a", "b"])
    assert not any(map(distinct, (["a", "a"], ["a", ""], ["a", " b"])))
