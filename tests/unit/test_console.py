"""What a person sees: no control character from a model, no line too many, no dead run for a dead pipe."""

from __future__ import annotations

import io
import json
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from coterie.models import ModelPerformance
from coterie.monitor.console import (
    HISTORY,
    LiveConsole,
    Observer,
    PlainConsole,
    Silent,
    duration,
    observer_for,
    remaining,
    sparkline,
    trend,
)
from coterie.monitor.metrics import UpdateRecord
from coterie.monitor.tables import ResultTable, clean

EVIL = "\x1b[2J[bold red]x[/]\x07\x9b31m\u202e"


def record(update: int, updates: int = 40, *names: str, accuracy: bool = True, total: float = 2.0) -> UpdateRecord:
    names = names or ("leader",)
    performances = tuple(
        ModelPerformance(
            update=update,
            model_id=name,
            accuracy=0.8125,
            efficiency=1.0,
            score=0.5,
            reward=update / 100,
            cooperation_score=None,
            valid_rate=1.0,
            entropy=1.5 - update / 100,
            episodes=8,
        )
        for name in names
    )
    metrics = {f"play/{name}/accuracy": 0.8125 for name in names} if accuracy else {}
    return UpdateRecord(update, updates, metrics, performances, {"total": total})


def test_a_warning_cannot_be_missed(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    PlainConsole(stream).warning(f"nothing is trained{EVIL} " + "because torch is missing " * 8)
    first, *lines, last = stream.getvalue().splitlines()
    assert first == last == "!" * 100
    assert len(lines) == 3
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("nothing is trained")
    assert not any(unicodedata.category(c) == "Cc" for c in "".join(lines))

    shown = io.StringIO()
    live = LiveConsole(Console(file=shown, width=60, force_terminal=True))
    live.warning("nothing is trained")
    live.close()
    assert "nothing is trained" in shown.getvalue()
    assert "\x1b[1;31m" in shown.getvalue()  # bold and red

    Silent().warning("nothing is trained")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", "nothing is trained")]


def test_made_up_updates_are_marked_in_every_line() -> None:
    stream = io.StringIO()
    simulated = replace(record(1), metrics={"episodes/simulated_share": 0.25})
    plain = PlainConsole(stream)
    plain.update(record(1))
    plain.update(simulated)
    honest, marked = stream.getvalue().splitlines()
    assert "SIMULATED" not in honest
    assert "SIMULATED 25%" in marked
    shown = io.StringIO()
    live = LiveConsole(Console(file=shown, width=90))
    live.update(simulated)
    Console(file=shown, width=90).print(live.renderable())
    live.close()
    assert "SIMULATED 25%" in shown.getvalue()


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def controls(text: str) -> set[str]:
    return {char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cs")}


# -- plain --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(out: io.StringIO, clock: Clock) -> PlainConsole:
    return PlainConsole(out, interval=3.0, clock=clock)


def test_an_update_is_one_line_with_every_model(plain: PlainConsole, out: io.StringIO, clock: Clock) -> None:
    clock.now += 65
    plain.update(record(1, 40, "leader", "follower"))
    assert out.getvalue() == (
        "update 1/40  1:05 elapsed, 1:18 left  "
        "leader reward 0.010 accuracy 0.812 entropy 1.490 valid 1.000 | "
        "follower reward 0.010 accuracy 0.812 entropy 1.490 valid 1.000\n"
    )


def test_what_is_left_follows_from_all_recent_updates_told_or_not(
    plain: PlainConsole, out: io.StringIO, clock: Clock
) -> None:
    for number, seconds in ((1, 9.0), (2, 1.0), (3, 1.0), (4, 500.0)):
        made = record(number, 40, "leader")
        clock.now += 1.0 if number < 4 else 500.0
        plain.update(replace(made, seconds={**made.seconds, "total": seconds}))
    assert [line.split(" left")[0].split(", ")[1] for line in out.getvalue().splitlines()] == ["5:51", "3:00"]


def test_accuracy_is_left_out_where_there_is_no_right_answer(plain: PlainConsole, out: io.StringIO) -> None:
    plain.update(record(1, accuracy=False))
    assert "accuracy" not in out.getvalue()
    assert "reward 0.010" in out.getvalue()


def test_updates_come_every_few_seconds_but_first_and_last_always(
    plain: PlainConsole, out: io.StringIO, clock: Clock
) -> None:
    for update in range(1, 41):
        plain.update(record(update))
        clock.now += 1.0
    shown = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert shown == [*range(1, 41, 3)]
    plain.update(record(2, 3))
    plain.update(record(3, 3))
    assert out.getvalue().splitlines()[-1].startswith("update 3/3")


def test_a_run_that_ends_early_still_shows_its_last_update(plain: PlainConsole, out: io.StringIO) -> None:
    for update in (1, 2, 3):
        plain.update(record(update))
    plain.close()
    plain.close()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/40", "3/40"]
    plain.update(record(4))
    plain.stage("evaluating")
    assert out.getvalue().splitlines()[-2].startswith("update 4/40")


def test_the_scenarios_own_figures_follow(plain: PlainConsole, out: io.StringIO, live: LiveConsole) -> None:
    base = record(1)
    sampled = {**base.metrics, "outcome/success": 0.25}
    exact = {**sampled, "exact/success": 0.3125, **{f"exact/n{at}": 0.0 for at in range(9)}}
    plain.update(replace(base, metrics=sampled))
    plain.update(replace(base, metrics=exact))
    first, second = out.getvalue().splitlines()
    assert first.endswith(" | success 0.250")
    assert second.endswith(" | success 0.312  n0 0.000  n1 0.000  n2 0.000")
    live.update(replace(base, metrics=exact))
    assert "success 0.312  n0" in screen(live)


def test_progress_tells_only_of_long_parts(plain: PlainConsole, out: io.StringIO, clock: Clock) -> None:
    for done in range(1, 6):
        plain.progress("evaluating", done, 100)
    assert out.getvalue() == ""
    for done in range(6, 13):
        clock.now += 1.0
        plain.progress("evaluating", done, 100)
    assert out.getvalue() == "evaluating: 8/100\nevaluating: 11/100\n"


def test_stages_notes_and_tables_are_never_dropped(plain: PlainConsole, out: io.StringIO) -> None:
    plain.stage("loading base")
    plain.note("saved checkpoint 10")
    plain.table(ResultTable("end", ("model", "accuracy"), (("leader", 0.5),)))
    plain.close()
    plain.close()
    assert out.getvalue().splitlines() == [
        "loading base ...",
        "saved checkpoint 10",
        "",
        "end",
        "model   accuracy",
        "------  --------",
        "leader     0.500",
    ]


def test_plain_lines_hold_no_control_characters(plain: PlainConsole, out: io.StringIO, clock: Clock) -> None:
    plain.stage(EVIL)
    plain.note(EVIL + "\nsecond line")
    plain.update(record(1, 40, EVIL))
    clock.now += 10
    plain.progress(EVIL, 1, 2)
    plain.table(ResultTable(EVIL, (EVIL, "b"), ((EVIL, 1.0),)))
    assert controls(out.getvalue()) == set()
    assert "\u202e" not in out.getvalue()
    assert out.getvalue().count("[bold red]x[/]") == 7  # markup is text


def test_a_stream_that_cannot_say_it_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    PlainConsole(stream).note("协同")
    assert raw.getvalue() == b"\\u534f\\u540c\n"


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Closed()
    console = PlainConsole(stream)
    console.note("one")
    console.update(record(1))
    assert stream.writes == 1


# -- live ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def live() -> Iterator[LiveConsole]:
    console = Console(file=Terminal(), force_terminal=True, width=110, height=40, color_system=None)
    observer = LiveConsole(console, clock=Clock())
    yield observer
    observer.close()


def screen(live: LiveConsole) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    with console.capture() as capture:
        console.print(live.renderable())
    return capture.get()


def test_the_live_table_has_every_model_and_where_it_goes(live: LiveConsole) -> None:
    for update in range(1, 31):
        live.update(record(update, 40, "leader", "follower"))
    shown = screen(live)
    [line] = [line for line in shown.splitlines() if "leader" in line]
    assert "0.300 ↑" in line  # reward
    assert "0.812 ·" in line  # accuracy stays
    assert "1.200 ↓" in line  # entropy
    assert sparkline([float(at) for at in range(HISTORY)]) in line
    assert "follower" in shown
    assert "30/40" in shown
    assert "20 s left" in shown  # 10 more at the 2 s they take


def test_stage_and_progress_are_shown_and_go_away(live: LiveConsole) -> None:
    live.stage("loading base")
    assert "loading base ..." in screen(live)
    live.progress("calibrating", 3, 24)
    assert "calibrating" in screen(live)
    assert "3/24" in screen(live)
    live.update(record(1))
    assert "calibrating" not in screen(live)
    live.stage("evaluating")
    assert "evaluating ..." in screen(live)
    live.close()
    assert "evaluating" not in screen(live)


def test_live_text_is_text() -> None:
    stream = Terminal()
    live = LiveConsole(Console(file=stream, force_terminal=True, width=110, height=40, color_system=None))
    live.note(EVIL)
    live.table(ResultTable(EVIL, ("a",), ((EVIL,),)))
    written = stream.getvalue()
    live.stage(EVIL)
    live.update(record(1, 40, EVIL))
    live.progress(EVIL, 1, 2)
    shown = screen(live)
    live.close()
    assert written.count("[bold red]x[/]") == 3
    for text in (written, shown):
        assert controls(text) == set()
        assert "\u202e" not in text
    assert shown.count("[bold red]x[/]") == 2


def test_an_ascii_terminal_gets_ascii_marks() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    live = LiveConsole(Console(file=stream, force_terminal=True, width=110, color_system=None))
    for update in range(1, 31):
        live.update(record(update))
    live.close()
    stream.seek(0)
    shown = stream.read()
    assert "0.300 ^" in shown
    assert "1.200 v" in shown
    assert "0.812 =" in shown


def test_closing_gives_the_cursor_back() -> None:
    stream = Terminal()
    live = LiveConsole(Console(file=stream, force_terminal=True, width=80, height=20))
    live.stage("loading")
    live.close()
    live.close()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


# -- which one ----------------------------------------------------------------------------------------------------


def test_the_stream_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not bring control characters into a file
    assert isinstance(observer_for(io.StringIO()), PlainConsole)
    assert isinstance(observer_for(Terminal()), LiveConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(observer_for(Terminal()), PlainConsole)


def test_silent_is_an_observer_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    observer: Observer = Silent()
    observer.stage("a")
    observer.progress("a", 1, 2)
    observer.update(record(1))
    observer.note("a")
    observer.table(ResultTable("a", (), ()))
    observer.close()
    assert capsys.readouterr() == ("", "")


# -- small parts --------------------------------------------------------------------------------------------------


def test_trend_needs_a_change_larger_than_its_noise() -> None:
    assert trend([0.1 * at for at in range(10)]) == 1
    assert trend([-0.1 * at for at in range(10)]) == -1
    assert trend([0.5] * 20) == 0
    assert trend([0.0, 1.0] * 10) == 0
    assert trend([0.0, 0.0, 9.0, 9.0]) == 0  # too few
    assert trend([0.0] * 5 + [math.nan] + [1.0] * 5) == 0


def test_sparkline_spans_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([0.0, math.nan, 1.0]) == "▁ █"
    assert sparkline([]) == ""
    assert sparkline([math.inf]) == " "


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1:00"), (3599.7, "1:00:00"), (3723, "1:02:03"), (-1, "0 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_remaining_is_the_recent_median_times_what_is_left() -> None:
    assert remaining(record(10, 40), [1.0, 3.0]) == 60.0
    assert remaining(record(10, 40), [2.0, 1.0, 460.0]) == 60.0
    assert remaining(record(40, 40), [1.0]) == 0.0
    assert remaining(record(1, 40), []) == 0.0


# -- tables -------------------------------------------------------------------------------------------------------

TABLE = ResultTable("held-out", ("model", "bare", "trained"), (("leader", 0.5, 1), ("跟随者|x", None, 0.98765)))


def test_plain_table_lines_up_with_wide_characters() -> None:
    assert TABLE.plain().splitlines() == [
        "held-out",
        "model      bare  trained",
        "--------  -----  -------",
        "leader    0.500        1",
        "跟随者|x      -    0.988",
    ]


def test_a_table_is_json_values() -> None:
    found = json.loads(json.dumps(TABLE.as_dict()))
    assert ResultTable(found["title"], tuple(found["columns"]), tuple(tuple(row) for row in found["rows"])) == TABLE


def test_rich_table_shows_markup_as_text() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    with console.capture() as capture:
        console.print(ResultTable("[red]t[/]", ("[b]c", "n"), (("[/] oops", 0.25),)).rich())
    for text in ("[red]t[/]", "[b]c", "[/] oops", "0.250"):
        assert text in capture.get()


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="row 2 has 1 cells for 2 columns"):
        ResultTable("t", ("a", "b"), ((1, 2), (1,)))


@given(st.lists(st.tuples(st.text(max_size=12), st.floats() | st.none()), max_size=5), st.text(max_size=12))
def test_any_text_makes_an_aligned_table(rows: list[tuple[str, float | None]], title: str) -> None:
    lines = ResultTable(title, ("name", "value"), tuple(rows)).plain().split("\n")
    body = lines[1:] if title else lines
    assert len(body) == len(rows) + 2
    width = cell_len(body[1])
    assert all(cell_len(line) <= width for line in body)
    assert controls("\n".join(lines)) == set()


@given(st.text())
def test_clean_is_idempotent_and_keeps_what_is_plain(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert controls(once) == set()
    assert "\n" not in clean(text, lines=False)


def test_clean_keeps_words() -> None:
    assert clean("a\tb\r\n协同 é 🙂") == "a    b\n协同 é 🙂"
    assert clean("\x1b[31mred\x1b[0m") == "[31mred[0m"
