"""What a person sees while a run goes on.

    the loop -> Observer -> a live table on a terminal | plain lines in a file or pipe | nothing in a library

The loop tells an observer what happens and never asks whether anyone looks: a reader or a terminal that goes away does
not end the run (`lasting`). Names and texts may come from models or
configs: they are shown as text, never as markup, and never with control characters.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from textwrap import wrap
from typing import Protocol, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coterie.models import ModelPerformance
from coterie.monitor.lasting import LastingStream
from coterie.monitor.metrics import UpdateRecord
from coterie.monitor.tables import EMPTY, ResultTable, clean, show
from coterie.types import ModelId

HISTORY = 20
"""Updates a trend looks back."""
FRAME = "!" * 100
"""Above and below a warning in plain text."""

logger = logging.getLogger("coterie.run")


class Observer(Protocol):
    """Who the loop tells what happens. No call may raise for what it is told."""

    def stage(self, text: str) -> None:
        """A long part begins: "loading base", "calibrating", "evaluating"."""
        ...

    def progress(self, text: str, done: int, total: int) -> None:
        """How far a long part is."""
        ...

    def update(self, record: UpdateRecord) -> None:
        """An update is finished."""
        ...

    def note(self, text: str) -> None:
        """A line the user should see: a warning, a saved checkpoint."""
        ...

    def warning(self, text: str) -> None:
        """What must not be missed: the run does not do what a run is for."""
        ...

    def table(self, table: ResultTable) -> None:
        """A final table."""
        ...

    def close(self) -> None:
        """Nothing more comes; may be called twice."""
        ...


class Silent:
    """Shows nothing but warnings, which go to the log; for use as a library."""

    def stage(self, text: str) -> None: ...

    def progress(self, text: str, done: int, total: int) -> None: ...

    def update(self, record: UpdateRecord) -> None: ...

    def note(self, text: str) -> None: ...

    def warning(self, text: str) -> None:
        logger.warning("%s", text)  # seen by who sets up no logging, too

    def table(self, table: ResultTable) -> None: ...

    def close(self) -> None: ...


class PlainConsole:
    """One plain line at a time, no control characters; for files, pipes and dumb terminals.

    Updates and progress are told at most every `interval` seconds; the first and the last update always are.
    """

    def __init__(self, stream: TextIO, interval: float = 3.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = LastingStream(stream)
        self._interval = interval
        self._clock = clock
        self._started = clock()
        self._told: float | None = None
        self._untold: UpdateRecord | None = None
        self._seconds: deque[float] = deque(maxlen=HISTORY)

    def stage(self, text: str) -> None:
        self._catch_up()
        self._line(f"{clean(text, lines=False)} ...")
        self._told = self._clock()

    def progress(self, text: str, done: int, total: int) -> None:
        now = self._clock()
        if self._told is None:
            self._told = now
        if now - self._told >= self._interval:
            self._told = now
            self._line(f"{clean(text, lines=False)}: {done}/{total}")

    def update(self, record: UpdateRecord) -> None:
        self._seconds.append(record.seconds.get("total", 0.0))
        now = self._clock()
        edge = record.update in (1, record.updates)
        if not edge and self._told is not None and now - self._told < self._interval:
            self._untold = record
            return
        self._told = now
        self._tell(record)

    def _tell(self, record: UpdateRecord) -> None:
        self._untold = None
        now = self._clock()
        models = " | ".join(_plain_figures(performance, record) for performance in record.performances)
        left = remaining(record, self._seconds)
        times = f"{duration(now - self._started)} elapsed, {duration(left)} left"
        figures = outcomes(record)
        models += f" | {figures}" if figures else ""
        self._line(f"update {record.update}/{record.updates}  {times}  {made_up(record)}{models}")

    def _catch_up(self) -> None:
        """Tell of the last update before something else begins, however soon after another it came."""
        if self._untold is not None:
            self._tell(self._untold)

    def note(self, text: str) -> None:
        self._line(clean(text))

    def warning(self, text: str) -> None:
        self._catch_up()
        self._line("\n".join([FRAME, *wrap(clean(text), len(FRAME)), FRAME]))

    def table(self, table: ResultTable) -> None:
        self._catch_up()
        self._line("\n" + table.plain())

    def close(self) -> None:
        self._catch_up()

    def _line(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()


class LiveConsole:
    """A table that redraws itself: every model's figures with their trends, and a progress bar below.

    An arrow says where a figure went over the last 20 updates, a dot that it did not change by more than its noise;
    the sparkline is the reward over the same updates.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._started = clock()
        self._unicode = self._console.encoding.lower().startswith("utf")
        self._stage = ""
        self._progress: tuple[str, int, int] | None = None
        self._record: UpdateRecord | None = None
        self._history: dict[ModelId, deque[ModelPerformance]] = {}
        self._seconds: deque[float] = deque(maxlen=HISTORY)
        self._live = Live(console=self._console, get_renderable=self.renderable, refresh_per_second=2, transient=False)

    def stage(self, text: str) -> None:
        self._stage, self._progress = text, None
        self._show()

    def progress(self, text: str, done: int, total: int) -> None:
        self._progress = (text, done, total)
        self._show(redraw=False)

    def update(self, record: UpdateRecord) -> None:
        self._record, self._progress, self._stage = record, None, ""
        self._seconds.append(record.seconds.get("total", 0.0))
        for performance in record.performances:
            self._history.setdefault(performance.model_id, deque(maxlen=HISTORY)).append(performance)
        self._show(redraw=False)

    def note(self, text: str) -> None:
        self._console.print(Text(clean(text)))

    def warning(self, text: str) -> None:
        self._console.print(Panel(Text(clean(text)), title="warning", style="bold red"))

    def table(self, table: ResultTable) -> None:
        self._console.print(table.rich())

    def close(self) -> None:
        self._stage, self._progress = "", None
        if self._live.is_started:
            self._live.stop()

    def renderable(self) -> RenderableType:
        """What is on the screen now."""
        parts: list[RenderableType] = []
        if self._record is not None:
            if warned := made_up(self._record):
                parts.append(Text(warned, style="bold red"))
            parts.append(self._models(self._record))
            figures = outcomes(self._record)
            if figures:
                parts.append(Text(figures, no_wrap=True, overflow="ellipsis"))
        bars = Table.grid(padding=(0, 1))
        if self._record is not None:
            record = self._record
            left = remaining(record, self._seconds)
            times = f"{duration(self._clock() - self._started)} elapsed, {duration(left)} left"
            bars.add_row(*_bar("updates", record.update, record.updates), Text(times))
        if self._progress is not None:
            text, done, total = self._progress
            bars.add_row(*_bar(clean(text, lines=False), done, total), Text(""))
        if bars.rows:
            parts.append(bars)
        if self._stage and self._progress is None:
            elapsed = duration(self._clock() - self._started)
            parts.append(Text(f"{clean(self._stage, lines=False)} ... {elapsed}"))
        return Group(*parts)

    def _show(self, redraw: bool = True) -> None:
        if not self._live.is_started:
            self._live.start(refresh=True)
        elif redraw:
            self._live.refresh()

    def _models(self, record: UpdateRecord) -> Table:
        table = Table(pad_edge=False)
        table.add_column("model", overflow="ellipsis", no_wrap=True)
        for name in ("reward", "accuracy", "entropy", "valid"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"reward, last {HISTORY}", no_wrap=True)
        for model_id, history in self._history.items():
            latest = history[-1]
            judged = f"play/{model_id}/accuracy" in record.metrics
            table.add_row(
                Text(clean(model_id, lines=False)),
                self._figure(latest.reward, [p.reward for p in history]),
                self._figure(latest.accuracy, [p.accuracy for p in history]) if judged else Text(EMPTY),
                self._figure(latest.entropy, [p.entropy for p in history]),
                self._figure(latest.valid_rate, [p.valid_rate for p in history]),
                Text(sparkline([p.reward for p in history]) if self._unicode else ""),
            )
        return table

    def _figure(self, value: float, history: Sequence[float]) -> Text:
        arrow = {1: "↑", -1: "↓", 0: "·"} if self._unicode else {1: "^", -1: "v", 0: "="}
        return Text(f"{show(value)} {arrow[trend(history)]}")


def observer_for(stream: TextIO) -> Observer:
    """A live table when `stream` is a terminal that can redraw, plain lines when it is not."""
    if stream.isatty():
        console = Console(file=cast("TextIO", LastingStream(stream)))
        if not console.is_dumb_terminal:
            return LiveConsole(console)
    return PlainConsole(stream)


def trend(values: Sequence[float]) -> int:
    """1 rising, -1 falling, 0 no clear change: the mean of the newer half against the older half, where a change
    counts past two standard errors. Fewer than six values have no trend."""
    half = len(values) // 2
    if half < 3 or not all(map(math.isfinite, values)):
        return 0
    older, newer = values[:half], values[-half:]
    change = sum(newer) / half - sum(older) / half
    error = math.sqrt((_variance(older) + _variance(newer)) / half)
    if abs(change) <= 2.0 * error or abs(change) < 1e-9:
        return 0
    return 1 if change > 0 else -1


def sparkline(values: Sequence[float]) -> str:
    """One block per value, lowest to highest; a constant line stays low. Values that are not finite are gaps."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = 7.0 / (high - low) if high - low > 1e-12 else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def outcomes(record: UpdateRecord) -> str:
    """The scenario's own figures in a line, at most four; exact ones where there are, else the sampled ones."""
    for kind in ("exact/", "outcome/"):
        found = [(name, value) for name, value in record.metrics.items() if name.startswith(kind)]
        if found:
            return "  ".join(
                f"{clean(name.removeprefix(kind), lines=False)} {show(value)}" for name, value in found[:4]
            )
    return ""


def made_up(record: UpdateRecord) -> str:
    """ "SIMULATED 100%  " where answers of this update were; otherwise nothing."""
    share = record.metrics.get("episodes/simulated_share", 0.0)
    return f"SIMULATED {share:.0%}  " if share else ""


def remaining(record: UpdateRecord, seconds: Sequence[float] | deque[float]) -> float:
    """Seconds until the last update, from the median of the recent ones: the first is slow, and one during which the
    machine slept says nothing."""
    return (median(seconds) if seconds else 0.0) * max(0, record.updates - record.update)


def duration(seconds: float) -> str:
    """ "7 s", "3:05", "1:02:03"."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _plain_figures(p: ModelPerformance, record: UpdateRecord) -> str:
    judged = f"play/{p.model_id}/accuracy" in record.metrics
    accuracy = f" accuracy {show(p.accuracy)}" if judged else ""
    name = clean(p.model_id, lines=False)
    return f"{name} reward {show(p.reward)}{accuracy} entropy {show(p.entropy)} valid {show(p.valid_rate)}"


def _bar(text: str, done: int, total: int) -> tuple[RenderableType, ...]:
    return Text(text), ProgressBar(total=max(total, 1), completed=done, width=30), Text(f"{done}/{total}")
