"""Measure a scenario: what its config's training comes to, beside what could be mistaken for it.

    python benchmarks/scenarios.py configs/kuhn.toml
    python docs/generate_scenarios.py                     writes the table into docs/scenarios/

For every seed the shipped config is trained as it is, and then the same held-out tasks are played, and the exact
figures computed, by

    bare base, calibrated base    nobody was trained
    trained together              what the config is for
    with a frozen partner         each group of learners was trained alone, while all others stayed the base
    trained apart                 those that were trained alone, put together
    partners of another seed      trained together, but not with one another: the first group from this seed, the
                                  next from the next seed, and so on

A group is a team in a team battle, and otherwise one model. Where a scenario of two teams has exact odds, the trained
teams also play the matches of team_matches.py. A --variant is the config with some settings changed, of which all
models are trained together:

    python benchmarks/scenarios.py configs/commons.toml --variant competitive mode=competitive

Each step is a process of its own and leaves its outcome in runs/scenarios/, so that a series that was interrupted goes
on where it stopped. What it all came to is one small file in benchmarks/results/scenarios/, with a digest of the
config it is of.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from claims import RunFailedError, Variant, machine, train, training_seconds
from claims_file import RESULTS, ROOT, ClaimFile, digest, read, write
from keeping import ended_by_sigterm
from scenario_steps import Figures

FOLDER = RESULTS / "scenarios"
WORK = ROOT / "runs" / "scenarios"
STEPS = Path(__file__).with_name("scenario_steps.py")
CONDITIONS = {
    "bare base": "bare base",
    "calibrated base": "calibrated base",
    "together": "trained together",
    "frozen": "with a frozen partner",
    "apart": "trained apart",
    "others": "partners of another seed",
}
"""Key in a results file -> what a table calls it."""


@dataclass(frozen=True, slots=True)
class Series:
    """One config, measured for several seeds in one folder."""

    config: Path
    work: Path
    changes: tuple[str, ...]
    wanted: tuple[str, ...]
    """Of "frozen", "apart" and "others"; the rest comes with training. Or "variants" and nothing else."""

    def folder(self, seed: int, *words: str) -> Path:
        """Of the run that trained these models, the others being the base; of all, when none is named."""
        return self.work / "-".join([f"seed{seed}", *words])

    def groups(self) -> list[tuple[str, ...]]:
        """Models that learn together when the others do not."""
        found: dict[str, list[str]] = {}
        for model, team in self.teams().items():
            found.setdefault(f"team {team}" if team else model, []).append(model)
        return [tuple(members) for members in found.values()]

    def teams(self) -> dict[str, str | None]:
        """Model -> its team; None where there is no team battle."""
        settings = self._settings()
        battle = settings.mode == "team_battle"
        return {model.model_id: model.team_id if battle else None for model in settings.models}

    def _settings(self) -> Any:
        from coterie.config import load_config

        return load_config(self.config, self.changes)

    def has_matches(self) -> bool:
        """Whether there are teams whose odds against one another can be computed."""
        from coterie.scenarios.base import ExactlyMeasured, build_scenario

        settings = self._settings()
        if settings.mode != "team_battle":
            return False
        return isinstance(build_scenario(settings.scenario.id, settings.scenario.options), ExactlyMeasured)

    def train_together(self, seed: int, variant: Variant = Variant("")) -> dict[str, Any]:  # noqa: B008 - frozen
        """The command a user would type. Raises `RunFailedError`."""
        folder = self.folder(seed, *variant.name.split())
        done = folder / "results" / "heldout.json"
        wall = folder / "wall_seconds.json"
        if not wall.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            seconds = train(self.config, folder, seed, [*self.changes, *variant.changes])
            if not done.is_file():
                raise RunFailedError(f"{self.config} evaluates nothing; set evaluation.tasks to 1 or more")
            wall.write_text(json.dumps(seconds))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {
            "variant": variant.name,
            **(variant.facts or {}),
            "seed": seed,
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "wall_seconds": round(json.loads(wall.read_text()), 1),
            "updates": len(records),
            "training_seconds": training_seconds(records),
            "last_quarter": last_quarter(records),
            "machine": machine(info["versions"]),
            "heldout": json.loads(done.read_text(encoding="utf-8")),
        }

    def train_alone(self, seed: int, learners: Sequence[str]) -> Figures:
        """These models learn, the others stay the base."""
        spec = {"do": "alone", "learners": list(learners), "folder": str(self.folder(seed, *learners))}
        found: Figures = self._worker(seed, f"alone-{'-'.join(learners)}", spec)
        return found

    def put_together(self, seed: int, name: str, origin: Mapping[str, Path]) -> Figures:
        """Models from the runs in these folders, measured with one another."""
        spec = {"do": "together", "origin": {model: str(folder) for model, folder in origin.items()}}
        found: Figures = self._worker(seed, name, spec)
        return found

    def matches(self, seed: int) -> Any:
        """What `team_matches.measure` finds of the teams that were trained together."""
        return self._worker(seed, "matches", {"do": "matches", "folder": str(self.folder(seed))})

    def _worker(self, seed: int, name: str, spec: Mapping[str, Any]) -> Any:
        """Do a step in a process of its own, unless its outcome is there already. Raises `RunFailedError`."""
        out = self.work / f"seed{seed}-{name}.json"
        if not out.is_file():
            whole = {**spec, "config": str(self.config), "changes": [*self.changes, f"seed={seed}"], "out": str(out)}
            path = self.work / f"seed{seed}-{name}.spec.json"
            path.write_text(json.dumps(whole))
            code = subprocess.run([sys.executable, str(STEPS), str(path)], check=False).returncode
            if code or not out.is_file():
                raise RunFailedError(f"step {name!r} of seed {seed} ended with exit code {code}; see above")
        return json.loads(out.read_text(encoding="utf-8"))


def measure(series: Series, seeds: Sequence[int], results: Path, variants: Sequence[Variant] = ()) -> ClaimFile:
    """All conditions of all seeds, then the variants, kept as soon as there are any. Raises `RunFailedError`."""
    path = results / f"{series.config.stem}.json"
    known = digest(series.config, series.changes)
    shown = str(series.config.relative_to(ROOT)) if series.config.is_relative_to(ROOT) else series.config.name
    found = read(path) or ClaimFile(series.config.stem, shown, known)
    if found.digest != known:
        print(f"{path} is of another state of {shown}: its {len(found.runs)} seeds are replaced", flush=True)
        found = ClaimFile(series.config.stem, shown, known)
    together: dict[int, dict[str, Any]] = {}
    for seed in seeds if "variants" not in series.wanted else ():
        print(f"== {series.config.stem}, seed {seed}: together", flush=True)
        together[seed] = series.train_together(seed)
    groups = series.groups()
    for at, (seed, run) in enumerate(together.items()):
        players = run["heldout"]["players"]
        conditions: dict[str, Figures] = {
            "bare base": players["bare base"],
            "calibrated base": players["calibrated base"],
            "together": players["trained"],
        }
        if len(groups) > 1 and {"frozen", "apart"} & set(series.wanted):
            alone = {}
            for learners in groups:
                print(f"== {series.config.stem}, seed {seed}: {', '.join(learners)} alone", flush=True)
                alone[learners] = series.train_alone(seed, learners)
            if "frozen" in series.wanted:
                conditions["frozen"] = mean_of_learners(alone, series.teams())
            if "apart" in series.wanted:
                origin = {model: series.folder(seed, *learners) for learners in groups for model in learners}
                conditions["apart"] = series.put_together(seed, "apart", origin)
        if len(groups) > 1 and len(seeds) > 1 and "others" in series.wanted:
            print(f"== {series.config.stem}, seed {seed}: partners of other seeds", flush=True)
            turns = {learners: seeds[(at + number) % len(seeds)] for number, learners in enumerate(groups)}
            origin = {model: series.folder(turns[learners]) for learners in groups for model in learners}
            name = "others-" + "-".join(map(str, turns.values()))
            conditions["others"] = series.put_together(seed, name, origin)
        matches = {"matches": series.matches(seed)} if series.has_matches() else {}
        found = found.merged(entry(run, conditions) | matches)
        write(path, found)
        print(f"== kept in {path}", flush=True)
    for variant in variants:
        for seed in seeds:
            print(f"== {series.config.stem}, seed {seed}: {variant.name}", flush=True)
            run = series.train_together(seed, variant)
            players = run["heldout"]["players"]
            found = found.merged(
                entry(run, {"calibrated base": players["calibrated base"], "together": players["trained"]})
            )
            write(path, found)
    return found


def entry(run: Mapping[str, Any], conditions: Mapping[str, Figures]) -> dict[str, Any]:
    """What of a training, and of what was measured around it, goes into the results file."""
    return {
        **{key: value for key, value in run.items() if key != "heldout"},
        "tasks": run["heldout"]["tasks"],
        "conditions": {key: kept(figures) for key, figures in conditions.items()},
    }


def last_quarter(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exact figures while training, each its mean over the last quarter of the updates: a policy that circles around
    an equilibrium may be near it at the end by chance."""
    begun = 0.75 * records[-1]["update"]
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record["metrics"].items():
            if record["update"] > begun and name.startswith("exact/"):
                found.setdefault(name.removeprefix("exact/"), []).append(value)
    return {name: round(fmean(values), 6) for name, values in found.items()}


def mean_of_learners(alone: Mapping[tuple[str, ...], Figures], teams: Mapping[str, str | None]) -> Figures:
    """Of several runs in each of which others learned. What begins with the name of a model, or of its team, is taken
    from the run in which it learned, and of everything else the mean; `teams`: model -> its team, if it has one."""
    runs = list(alone.values())

    def figure(part: str, name: str) -> float:
        own = [
            run for learners, run in alone.items()
            if any(name.startswith(f"{word}_") for model in learners for word in (model, teams[model]) if word)
        ]  # fmt: skip
        return fmean(run[part][name] for run in own or runs)

    by_model = {model: figures["by_model"][model] for learners, figures in alone.items() for model in learners}
    return {
        "mean": fmean(by_model.values()),
        "by_model": by_model,
        **{part: {name: figure(part, name) for name in runs[0][part]} for part in ("exact", "outcome")},
    }


def kept(figures: Figures) -> dict[str, Any]:
    """What of a condition goes into the results file."""
    return {
        "mean": round(figures["mean"], 6),
        **{
            part: {name: round(value, 6) for name, value in figures[part].items()}
            for part in ("by_model", "exact", "outcome")
        },
    }


# -- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", type=Path, nargs="?", help="a config of the repository")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    made.add_argument(
        "--only", nargs="+", choices=("together", "frozen", "apart", "others", "variants"), metavar="WHAT",
        default=["together", "frozen", "apart", "others"],
        help="of together (always), frozen, apart, others; default: all of them; variants: the --variant alone",
    )  # fmt: skip
    made.add_argument(
        "--variant", nargs="+", action="append", default=[], dest="variants", metavar=("NAME", "KEY=VALUE"),
        help="measure this change of the config too; may be given several times",
    )  # fmt: skip
    made.add_argument("--again", action="store_true", help="forget the outcomes of earlier steps")
    made.add_argument(
        "--results", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results/scenarios"
    )
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "scenarios", metavar="DIR",
                      help="default: runs/scenarios")  # fmt: skip
    made.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
        help="change the config of every run; the pages do not take such results, so give --results too",
    )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    if options.config is None or not options.config.is_file():
        print(f"error: give the config to measure; {options.config} is no file", file=sys.stderr)
        return 2
    if options.changes and options.results == FOLDER:
        print("error: --set needs --results DIR: benchmarks/results is for configs as shipped", file=sys.stderr)
        return 2
    variants = [Variant(name, tuple(changes), {"changes": changes}) for name, *changes in options.variants]
    wrong = next((v.name for v in variants if not v.changes or not v.name.replace(" ", "").isidentifier()), None)
    if wrong is not None:
        print(f"error: --variant {wrong}: give a name of words, then at least one KEY=VALUE", file=sys.stderr)
        return 2
    if "variants" in options.only and not variants:
        print("error: --only variants: give --variant too, or there is nothing to measure", file=sys.stderr)
        return 2
    config = options.config.resolve()
    # steps of another state of the config are not those of this one
    folder = options.work / f"{config.stem}-{digest(config, options.changes)}"
    if options.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    series = Series(config, folder.resolve(), tuple(options.changes), tuple(options.only))
    started = time.monotonic()
    try:
        with ended_by_sigterm():
            measure(series, options.seeds, options.results, variants)
    except (RunFailedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    print(f"== {time.monotonic() - started:.0f} s; write the table by: python docs/generate_scenarios.py", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
