"""Fill the pages of docs/scenarios/: example prompts from the code, measured tables from benchmarks/results/scenarios/.

    python docs/generate_scenarios.py            writes them
    python docs/generate_scenarios.py --check    writes nothing; exit 1 when a page is not what code and results say

What stands between two markers, each alone on its line, is replaced:

    <!-- example: configs/signaling.toml -->     what each seat is shown at its first turn of the first training task
    <!-- /example -->                            words after the path: zh, turns=3, seats=a,b
    <!-- table: configs/signaling.toml -->       what was measured; words after the path: metrics=success,score
    <!-- /table -->                              success@quarter is its mean over the last quarter of the training
    <!-- variants: configs/commons.toml -->      the config as shipped and its variants; metrics=… as above
    <!-- /variants -->
    <!-- matches: configs/team-blotto.toml -->   odds of trained teams against the base and with swapped partners
    <!-- /matches -->
    <!-- list -->                                in index.md: every page with its title and first sentence
    <!-- /list -->
    <!-- summary -->                             in index.md: the first figure of every table that was measured
    <!-- /summary -->

An example whose scenario needs a package that is not installed stays as it stands, and `--check` does not look at it.
Those of other packages' environments are written, and checked, where `make test-games` and `make oasis` install them:

    build/venv-games/bin/python docs/generate_scenarios.py
    .venv-oasis/bin/python docs/generate_scenarios.py
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from blocks import WORDS, machine_block  # noqa: E402 - beside the results, not in a package
from claims_file import ClaimFile, Run, digest, read  # noqa: E402
from scenarios import CONDITIONS, FOLDER  # noqa: E402

from coterie.config import RunConfig, load_config  # noqa: E402
from coterie.errors import MissingPackageError  # noqa: E402
from coterie.models import LoRAModel  # noqa: E402
from coterie.modes.base import build_mode  # noqa: E402
from coterie.rollout.matchmaking import assign  # noqa: E402
from coterie.scenarios.base import build_scenario, draw_tasks  # noqa: E402
from coterie.scenarios.practice import Asked, PracticeTable  # noqa: E402
from coterie.types import PlayerCard, Seat, Split  # noqa: E402

QUARTER = "@quarter"
"""After the name of an exact figure: its mean over the last quarter of the training."""
PAGES = ROOT / "docs" / "scenarios"
_MARKER = re.compile(
    r"^<!-- (?:(?P<kind>example|table|variants|matches|list|summary)(?:: (?P<words>.*?))?|/(?P<end>\w+)) -->$",
    re.MULTILINE,
)


# -- examples -------------------------------------------------------------------------------------------------------


def example(config_path: str, *, language: str = "en", turns: int = 1, seats: Sequence[str] = ()) -> str:
    """What seats are shown, as a block of text.

    Raises:
        ValueError: there is no such seat.
        MissingPackageError: the scenario needs a package that is not installed.
    """
    config = load_config(ROOT / config_path)
    scenario = build_scenario(config.scenario.id, config.scenario.options)
    task = next(draw_tasks(scenario, Split.TRAIN, config.seed))
    places = list(scenario.seats(task))
    unknown = sorted(set(seats) - {seat.seat_id for seat in places})
    if unknown:
        raise ValueError(f"there is no seat {unknown[0]!r} in {config_path}; seats: {[s.seat_id for s in places]}")
    mode = build_mode(config.mode, config.custom_mode)
    table = PracticeTable(
        task,
        places,
        seed=config.seed,
        cards=_cards(places, config),
        mode=config.mode,
        language=language,
        hearing=lambda listener, speaker: mode.hears(listener, speaker, task),
    )
    asyncio.run(scenario.play(task, table))
    wanted = set(seats) or {seat.seat_id for seat in places if seat.symmetric_with is None}
    lines: list[str] = []
    asked = dict.fromkeys(wanted, 0)
    for question in table.asked:
        if question.seat in asked and asked[question.seat] < turns:
            asked[question.seat] += 1
            lines += ["", *_question(question, asked[question.seat])] if lines else _question(question, 1)
    return "\n".join(["```text", *lines, "```"])


def _cards(seats: Sequence[Seat], config: RunConfig) -> list[PlayerCard]:
    """Role and team of whoever sits where in the config's first episode."""
    return [holder.card for holder in assign(seats, [LoRAModel(model) for model in config.models]).values()]


def _question(question: Asked, turn: int) -> list[str]:
    lines = [f"--- {question.seat}, turn {turn}: {question.kind} ---"]
    for name, text in (("system", question.observation.system), ("user", question.observation.user)):
        first, *rest = text.splitlines() or [""]
        if text:
            lines += [f"{name}: {first}", *(" " * (len(name) + 2) + line for line in rest)]
    if question.choices is None:
        answer = f"(up to {question.max_tokens} tokens)"
    else:
        answer = "(" + " | ".join(choice.strip() for choice in question.choices) + ")"
    lines.append(
        " ".join(["assistant:", *([question.observation.prefix] if question.observation.prefix else []), answer])
    )
    return [line.rstrip() for line in lines]


# -- tables ---------------------------------------------------------------------------------------------------------


def table(config_path: str, results: Path, *, metrics: Sequence[str] = ()) -> str:
    """What was measured of a config. Raises `ValueError` for results of another state of it, or an unknown metric."""
    runs = _runs(config_path, results)
    if not runs:
        return _missing(config_path)
    columns = [key for key in CONDITIONS if all(key in run["conditions"] for run in runs)]
    names = list(metrics) or _metrics(runs)
    lines = [
        "| metric | " + " | ".join(CONDITIONS[key] for key in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in names:
        cells = [_of_runs(runs, key, name, config_path) for key in columns]
        lines.append(f"| {_shown(name)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _how(runs) + _longer(config_path, runs, columns)])


def variants(config_path: str, results: Path, *, metrics: Sequence[str] = ()) -> str:
    """A line for the base, the config as shipped and each variant. Raises `ValueError` as `table`."""
    shipped = _runs(config_path, results)
    changed = _runs(config_path, results, variants=True)
    if not changed:
        return _missing(config_path, " --variant NAME KEY=VALUE")
    names = list(metrics) or _metrics(changed)
    lines = ["| | " + " | ".join(map(_shown, names)) + " |", "| --- |" + " ---: |" * len(names)]
    rows = {"untrained": [*shipped, *changed]}
    if shipped:
        rows["as shipped"] = shipped
    for run in changed:
        label = f"{run['variant']} (" + ", ".join(f"`{change}`" for change in run["changes"]) + ")"
        rows.setdefault(label, []).append(run)
    for label, of in rows.items():
        key = "calibrated base" if label == "untrained" else "together"
        cells = [_of_runs(of, key, name, config_path) for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _how([*shipped, *changed])])


def matches(config_path: str, results: Path) -> str:
    """Odds of trained teams. Raises `ValueError` for results of another state of the config."""
    runs = _runs(config_path, results)
    if not runs:
        return _missing(config_path)
    lines = ["| match | wins | draws | losses |", "| --- | ---: | ---: | ---: |"]
    for kind in runs[0]["matches"]:
        odds = [match for run in runs for match in run["matches"][kind]]
        cells = [_cell([match[name] for match in odds]) for name in ("wins", "draws", "losses")]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Of the team named first, mean over seeds and both teams (lowest to highest)."])


def _runs(config_path: str, results: Path, *, variants: bool = False) -> list[Run]:
    """Runs of the config as it is shipped, or under other modes. Raises `ValueError`: they are of another state."""
    config = ROOT / config_path
    found = read(results / f"{config.stem}.json")
    if found is None:
        return []
    if found.digest != digest(config):
        raise ValueError(
            f"{config.stem}.json was measured with another state of {config_path}; "
            f"measure it again: python benchmarks/scenarios.py {config_path}"
        )
    return [run for run in found.runs if bool(run["variant"]) == variants]


def _missing(config_path: str, more: str = "") -> str:
    return f"*Not measured yet; `python benchmarks/scenarios.py {config_path}{more}` does it.*"


def _metrics(runs: Sequence[Run]) -> list[str]:
    trained = runs[0]["conditions"]["together"]
    return list(trained["exact"]) or [*trained["outcome"], "score"]


def _shown(name: str) -> str:
    return name.replace(QUARTER, ", mean of the last quarter")


def _of_runs(runs: Sequence[Run], key: str, name: str, config_path: str) -> str:
    """A cell: the figure under this condition; empty where there is none because nothing was being trained.

    Raises:
        ValueError: there is no such figure, or these results were made before it was kept.
    """
    if not name.endswith(QUARTER):
        return _cell([_value(run["conditions"][key], name, config_path) for run in runs])
    if key != "together":
        return ""
    figure = name.removesuffix(QUARTER)
    kept = [run.get("last_quarter", {}) for run in runs]
    if any(figure not in found for found in kept):
        raise ValueError(
            f"{config_path}: no run kept {figure!r} while training; set evaluation.every, and "
            f"measure it again: python benchmarks/scenarios.py {config_path}"
        )
    return _cell([found[figure] for found in kept])


def _value(figures: Mapping[str, Any], name: str, config_path: str) -> float:
    for part in ("exact", "outcome", "by_model"):
        if name in figures[part]:
            return float(figures[part][name])
    if name == "score":  # of no figure of the scenario's own: the mean over models
        return float(figures["mean"])
    known = [*figures["exact"], *figures["outcome"], "score"]
    raise ValueError(f"{config_path}: there is no figure {name!r}; there are {', '.join(dict.fromkeys(known))}")


def _cell(values: Sequence[float]) -> str:
    low, mean, high = (f"{value:.3f}" for value in (min(values), fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _how(runs: Sequence[Run]) -> str:
    seeds = ", ".join(dict.fromkeys(str(run["seed"]) for run in runs))
    updates, seconds = ([run[key] for run in runs] for key in ("updates", "training_seconds"))
    machine = machine_block({"scenario": ClaimFile("", "", "", tuple(runs))}, WORDS["en"])
    return (
        f"Mean over {'seeds' if ',' in seeds else 'seed'} {seeds} (lowest to highest), on {runs[0]['tasks']} "
        f"held-out {'task' if runs[0]['tasks'] == 1 else 'tasks'}; {_span(updates, '.0f')} updates together took "
        f"{_span(seconds, '.0f')} s of training. {machine}"
    )


def _longer(config_path: str, runs: Sequence[Run], columns: Sequence[str]) -> str:
    """Where runs ended at a target: that those beside them may not have."""
    planned = load_config(ROOT / config_path).updates
    if not {"frozen", "apart"} & set(columns) or all(run["updates"] >= planned for run in runs):
        return ""
    return (
        f" Training together ends once `evaluation.until` is reached; what was trained alone may never reach it, and "
        f"then does all {planned} updates."
    )


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


# -- pages ------------------------------------------------------------------------------------------------------------


def listed(pages: Path) -> str:
    """A line for every page: its title and what it is, from its first paragraph."""
    lines = []
    for path in sorted(pages.glob("*.md")):
        if path.name != "index.md":
            title, summary = _opening(path)
            lines.append(f"- [{title}]({path.name}) (`{path.stem}`): {summary}")
    return "\n".join(lines)


def summary(pages: Path, results: Path) -> str:
    """A line for the first figure of every table of the pages, as far as it was measured."""
    lines = ["| config | figure | untrained | trained | seeds |", "| --- | --- | ---: | ---: | ---: |"]
    for path in sorted(pages.glob("*.md")):
        for marker in _MARKER.finditer(path.read_text(encoding="utf-8")):
            if marker["kind"] != "table":
                continue
            config, *rest = (marker["words"] or "").split()
            runs = _runs(config, results)
            if runs:
                named = next((word for word in rest if word.startswith("metrics=")), "")
                name = named.removeprefix("metrics=").split(",")[0] or _metrics(runs)[0]
                before, after = (
                    _cell([_value(run["conditions"][key], name, config) for run in runs])
                    for key in ("calibrated base", "together")
                )
                link = f"[{Path(config).stem}]({path.name}#measured)"
                lines.append(f"| {link} | {name} | {before} | {after} | {len(runs)} |")
    return "\n".join(lines) if len(lines) > 2 else "*Nothing was measured yet.*"


def _opening(path: Path) -> tuple[str, str]:
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    if not title.startswith("# ") or not paragraph or paragraph.startswith(("#", "<!--")):
        raise ValueError(f"{path.name} must begin with '# Title' and a paragraph")
    first = re.match(r".*?[.!?](?=\s|$)", paragraph)
    return title[2:], first[0] if first else paragraph


def filled(text: str, *, pages: Path, results: Path) -> str:
    """`text` with everything between its markers made anew, but for examples that need a package which is not there.

    Raises:
        ValueError: says which marker is wrong.
    """
    parts: list[str] = []
    at = 0
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        line = text.count("\n", 0, marker.start()) + 1
        if marker["end"] is not None:
            if opened is None or opened["kind"] != marker["end"]:
                raise ValueError(f"line {line}: {marker[0]} ends nothing that was begun")
            begun = text.count("\n", 0, opened.start()) + 1
            try:
                made = f"\n{_made(opened['kind'], opened['words'] or '', begun, pages, results)}\n"
            except MissingPackageError:
                made = text[at : marker.start()]
            parts += [made, marker[0]]
            opened = None
        elif opened is not None:
            raise ValueError(f"line {line}: {opened[0]} before it has no end")
        else:
            parts += [text[at : marker.start()], marker[0]]
            opened = marker
        at = marker.end()
    if opened is not None:
        raise ValueError(f"{opened[0]} has no end")
    return "".join([*parts, text[at:]])


def _made(kind: str, words: str, line: int, pages: Path, results: Path) -> str:
    if kind == "list":
        return listed(pages)
    if kind == "summary":
        return summary(pages, results)
    config, *rest = words.split() or [""]
    if not (ROOT / config).is_file():
        raise ValueError(f"line {line}: {kind} of {config!r}, which is no config of the repository")
    options: dict[str, Any] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if kind == "example" and word in ("en", "zh"):
            options["language"] = word
        elif kind == "example" and key == "turns" and value.isdecimal():
            options["turns"] = int(value)
        elif equals and (kind, key) in (("example", "seats"), ("table", "metrics"), ("variants", "metrics")):
            options[key] = value.split(",")
        else:
            raise ValueError(f"line {line}: {kind} knows no {word!r}")
    if kind == "example":
        return example(config, **options)
    if kind == "matches":
        return matches(config, results)
    return (variants if kind == "variants" else table)(config, results, **options)


def main(arguments: Sequence[str] | None = None, pages: Path = PAGES, results: Path = FOLDER) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    options = parser.parse_args(arguments)
    wrong = False
    for path in sorted(pages.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        try:
            new = filled(text, pages=pages, results=results)
        except ValueError as error:
            print(f"{path.name}, {error}", file=sys.stderr)
            wrong = True
            continue
        if new == text:
            continue
        if options.check:
            print(f"{path.name} is out of date; run: python docs/generate_scenarios.py", file=sys.stderr)
            wrong = True
        else:
            path.write_text(new, encoding="utf-8")
            print(f"written: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
