"""The figures of README and docs, drawn from results.

Transparent background and middle tones, so that they can be read on light and dark pages; text stays text. The same
results give the same bytes under the same matplotlib: ids come from a fixed salt and no date is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#7d8590"
COLOURS = ("#3b8eea", "#e07b39", "#2da46b", "#a371f7", "#d4548b", "#b08800")
MODES = {"competitive": "#e5534b", "mixed": "#3b8eea", "cooperative": "#2da46b"}

_STYLE = {
    "svg.hashsalt": "coterie",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def learning_curve(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean accuracy on training tasks over updates: a line for each model, each seed faint and their mean bold."""
    whole = max(run["updates_per_round"] for run in runs)
    shortest = min(len(run["curve"]["update"]) for run in runs)
    # whole rounds of task types only: types differ in how hard they are
    window = min(shortest, whole * max(1, round(shortest / 6 / whole)))
    pattern = re.compile(r"play/(.+)/accuracy")
    models = sorted({m[1] for run in runs for name in run["curve"] if (m := pattern.fullmatch(name))})
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(6.4, 3.4)
        updates = list(range(window, shortest + 1))
        ends: list[tuple[float, str, str]] = []
        for model, colour in zip(models, COLOURS * len(models), strict=False):
            lines = [_trailing(run["curve"][f"play/{model}/accuracy"][:shortest], window) for run in runs]
            for line in lines:
                axes.plot(updates, line, color=colour, alpha=0.3, linewidth=1)
            mean = [fmean(values) for values in zip(*lines, strict=True)]
            axes.plot(updates, mean, color=colour, linewidth=2.2)
            ends.append((mean[-1], model, colour))
        for height, (_, model, colour) in zip(_apart(sorted(ends), 0.065), sorted(ends), strict=True):
            axes.annotate(
                model, (updates[-1], height), (6, 0), textcoords="offset points",
                color=colour, va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(window, updates[-1] if updates[-1] > window else window + 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("update")
        axes.set_ylabel(f"accuracy, last {window} updates")
        _save(figure, path)


def societies(groups: Sequence[tuple[str, float | None, Sequence[float]]], path: Path) -> None:
    """Probability of cooperating at the end: (mode, cooperation_level, one value a seed), dots and their mean."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(6.4, 3.1)
        at, places, labels, mixed = 0.0, [], [], []
        for number, (mode, level, values) in enumerate(groups):
            at += 0.0 if number == 0 else 1.0 if groups[number - 1][0] == mode else 1.4
            places.append(at)
            labels.append(mode if level is None else f"{level:g}")
            mixed += [at] if level is not None else []
            offsets = [at + 0.16 * (i - (len(values) - 1) / 2) for i in range(len(values))]
            axes.plot([at - 0.32, at + 0.32], [fmean(values)] * 2, color=MODES[mode], linewidth=2)
            axes.plot(offsets, values, "o", color=MODES[mode], markersize=6, alpha=0.75, markeredgewidth=0)
        axes.set_xticks(places, labels)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.8, at + 0.8)
        axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel("probability of cooperating")
        if mixed:
            axes.annotate(
                "mixed, by cooperation_level", (fmean(mixed), 0), (0, -28), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="center", color=INK, annotation_clip=False,
            )  # fmt: skip
        _save(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of axes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(
        path, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": "Coterie"}
    )


def _trailing(values: Sequence[float], window: int) -> list[float]:
    """Mean of each whole window; the first one ends at the window-th value."""
    return [fmean(values[end - window : end]) for end in range(window, len(values) + 1)]


def _apart(ends: Sequence[tuple[float, str, str]], gap: float) -> list[float]:
    """Heights of labels, lowest first: `gap` apart at least, and on the whole where their lines end."""
    heights: list[float] = []
    for value, _, _ in ends:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    moved = fmean(heights) - fmean(value for value, _, _ in ends)
    return [height - moved for height in heights]
