"""What stands between the markers of README and docs: results in, a sentence or a Markdown table out.

A block is a function of (results, words); the words are English or Chinese. A claim that was not measured says so and
names the command that measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from claims_file import ClaimFile, Run

Results = Mapping[str, ClaimFile]
"""Claim -> its runs; a claim that was not measured is absent."""

PLAYERS = ("bare base", "calibrated base", "trained")
TOGETHER = {
    "scenarios/signaling": "success",
    "scenarios/commons": "efficiency",
    "scenarios/kuhn": "nash_conv",
    "scenarios/leduc": "nash_conv",
}
"""What shows whether models learned with one another: results of `scenarios.py` -> which of their exact figures."""


@dataclass(frozen=True, slots=True)
class Words:
    """What blocks say, in one language."""

    missing: str
    machine: str
    tasks: str
    to: str
    """Between the lowest and the highest of several values."""
    comma: str
    seed: str
    several_seeds: str
    all_rose: str
    some_rose: str
    players: tuple[str, str, str]
    """As `PLAYERS`."""
    task_type: str
    gain: str
    points: str
    spread: str
    everything: str
    seed_column: str
    updates: str
    training: str
    success: str
    mode: str
    before: str
    cooperation: str
    mean: str
    learned: tuple[str, str, str, str, str]
    """Head of what was learned together, beside what was not."""
    figures: tuple[str, str, str, str]
    """As `TOGETHER`."""


WORDS = {
    "en": Words(
        missing="*Not measured yet; `python benchmarks/{command}` does it.*",
        machine="Measured on {cores} cores of {cpu} ({system}), Python {python}, PyTorch {torch}, Coterie {coterie}, "
        "{{date}}.",
        tasks="Over {seeds}, each of {updates} updates and {seconds} s of training ({wall} s in all, with loading, "
        "calibration and evaluation): mean accuracy on {heldout} held-out tasks went from {bare} (bare base) and "
        "{calibrated} (the same with calibrated choices) to {trained}. In every run that is at least {over_bare} "
        "points above the bare base and {over_calibrated} above the calibrated one, and {rose}.",
        all_rose="all {kinds} task types rose",
        some_rose="at least {rose} of {kinds} task types rose",
        to="{low} to {high}",
        comma=", ",
        seed="seed {}",
        several_seeds="seeds {}",
        players=PLAYERS,
        task_type="task type",
        gain="gain",
        points="{} points",
        spread="trained, lowest to highest seed",
        everything="all",
        seed_column="seed",
        updates="updates",
        training="training, s",
        success="exact success, {}",
        mode="mode",
        before="before training",
        cooperation="cooperation, {}",
        mean="mean",
        learned=("", "nobody trained", "partners frozen", "trained apart", "trained together"),
        figures=("signalling, success", "commons, efficiency", "Kuhn poker, NashConv", "Leduc hold'em, NashConv"),
    ),
    "zh": Words(
        missing="*尚未测量；运行 `python benchmarks/{command}` 即可。*",
        machine="测量环境：{cpu} 的 {cores} 个核（{system}），Python {python}，PyTorch {torch}，Coterie {coterie}，"
        "{{date}}。",
        tasks="{seeds}，每次 {updates} 步更新、训练 {seconds} 秒（连同加载、校准和评估共 {wall} 秒）：在 {heldout} 个"
        "留出任务上，平均准确率从 {bare}（原始基座）和 {calibrated}（只校准选项）升到 {trained}。每一次都至少比原始"
        "基座高 {over_bare} 个百分点，比校准后的基座高 {over_calibrated} 个百分点；{rose}。",
        all_rose="{kinds} 类任务全部上升",
        some_rose="{kinds} 类任务中至少有 {rose} 类上升",
        to="{low}～{high}",
        comma="、",
        seed="种子 {}",
        several_seeds="种子 {}",
        players=("原始基座", "校准后的基座", "训练后"),
        task_type="任务类型",
        gain="提升",
        points="{} 个百分点",
        spread="训练后，最低～最高的种子",
        everything="全部",
        seed_column="种子",
        updates="更新步数",
        training="训练用时（秒）",
        success="精确成功率，{}",
        mode="模式",
        before="训练前",
        cooperation="合作概率，{}",
        mean="平均",
        learned=("", "无人训练", "伙伴冻结", "分开训练", "一起训练"),
        figures=("信号博弈，成功率", "公地，效率", "库恩扑克，NashConv", "Leduc 扑克，NashConv"),
    ),
}


# -- blocks -------------------------------------------------------------------------------------------------------


def machine_block(results: Results, words: Words) -> str:
    """What all numbers were measured on; a sentence for every machine and state there is."""
    told: dict[str, list[str]] = {}
    for found in results.values():
        for run in found.runs:
            sentence = words.machine.format(**run["machine"])
            told.setdefault(sentence, []).append(run["date"])
    if not told:
        return _missing("claims.py tasks", words)
    return " ".join(sentence.format(date=_span(dates, words)) for sentence, dates in sorted(told.items()))


def tasks_run_block(results: Results, words: Words) -> str:
    """The table a run of the task queue ends with, as the terminal shows it; of the first seed."""
    found = results.get("tasks")
    return f"```\n{final_table(found.runs[0])}\n```" if found else _missing("claims.py tasks", words)


def tasks_summary_block(results: Results, words: Words) -> str:
    found = results.get("tasks")
    if not found:
        return _missing("claims.py tasks", words)
    runs = found.runs
    means = {player: [run["heldout"]["players"][player]["mean"] for run in runs] for player in PLAYERS}
    gains = {
        player: min(after - before for before, after in zip(means[player], means["trained"], strict=True))
        for player in PLAYERS[:2]
    }
    kinds = len({kind for run in runs for kind in _kinds(run)})
    rose = min(sum(_of_kind(r, "trained", k) > _of_kind(r, "bare base", k) for k in _kinds(r)) for r in runs)
    return words.tasks.format(
        seeds=_seeds(runs, words),
        updates=_span([run["updates"] for run in runs], words),
        seconds=_span([round(run["training_seconds"]) for run in runs], words),
        wall=_span([round(run["wall_seconds"]) for run in runs], words),
        heldout=_span([run["heldout"]["tasks"] for run in runs], words),
        bare=_span([_percent(value) for value in means["bare base"]], words),
        calibrated=_span([_percent(value) for value in means["calibrated base"]], words),
        trained=_span([_percent(value) for value in means["trained"]], words),
        over_bare=_floor_points(gains["bare base"]),
        over_calibrated=_floor_points(gains["calibrated base"]),
        rose=(words.all_rose if rose == kinds else words.some_rose).format(rose=rose, kinds=kinds),
    )


def tasks_table_block(results: Results, words: Words) -> str:
    """By task type: mean over models and seeds of held-out accuracy."""
    found = results.get("tasks")
    if not found:
        return _missing("claims.py tasks", words)
    runs = found.runs
    rows = []
    for kind in _kinds(runs[0]):
        by_player = [[_of_kind(run, player, kind) for run in runs] for player in PLAYERS]
        rows.append([kind, *_accuracies(by_player, words)])
    overall = [[run["heldout"]["players"][player]["mean"] for run in runs] for player in PLAYERS]
    rows.append([words.everything, *_accuracies(overall, words)])
    return _markdown([words.task_type, *words.players, words.gain, words.spread], rows)


def signaling_block(results: Results, words: Words) -> str:
    """Exact success of the invented code, seed by seed."""
    found = results.get("signaling")
    if not found:
        return _missing("claims.py signaling", words)
    head = [words.seed_column, words.updates, words.training, *(words.success.format(p) for p in words.players)]
    rows = [
        [str(run["seed"]), str(run["updates"]), f"{run['training_seconds']:.0f}"]
        + [f"{run['heldout']['players'][player]['exact']['success']:.3f}" for player in PLAYERS]
        for run in found.runs
    ]
    return _markdown(head, rows)


def dilemma_block(results: Results, words: Words) -> str:
    """Exact probability of cooperating in the end, by mode and level."""
    found = results.get("prisoners_dilemma")
    if not found:
        return _missing("claims.py matrix", words)
    seeds = sorted({run["seed"] for run in found.runs})
    head = [words.mode, "`cooperation_level`", words.before]
    head += [words.cooperation.format(words.seed.format(seed)) for seed in seeds] + [words.mean]
    rows = []
    for variant, runs in by_variant(found):
        ends = {run["seed"]: cooperation(run) for run in runs}
        before = fmean(cooperation(run, "calibrated base") for run in runs)
        level = runs[0].get("cooperation_level")
        rows.append(
            [f"`{variant.split()[0]}`", "" if level is None else f"{level:g}", f"{before:.2f}"]
            + [f"{ends[seed]:.2f}" if seed in ends else "" for seed in seeds]
            + [f"{fmean(ends.values()):.2f}"]
        )
    return _markdown(head, rows)


def together_block(results: Results, words: Words) -> str:
    """What training together comes to beside frozen partners and beside partners that never met; mean over seeds."""
    rows = []
    for (claim, figure), name in zip(TOGETHER.items(), words.figures, strict=True):
        found = results.get(claim)
        runs = [run for run in found.runs if not run["variant"]] if found else []
        if not runs:
            return _missing(f"scenarios.py {claim.replace('scenarios', 'configs')}.toml", words)
        cells = (
            fmean(run["conditions"][key]["exact"][figure] for run in runs)
            for key in ("calibrated base", "frozen", "apart", "together")
        )
        rows.append([name, *(f"{value:.3f}" for value in cells)])
    return _markdown(words.learned, rows)


BLOCKS: dict[str, Callable[[Results, Words], str]] = {
    "machine": machine_block,
    "tasks-run": tasks_run_block,
    "tasks-summary": tasks_summary_block,
    "tasks-table": tasks_table_block,
    "signaling": signaling_block,
    "dilemma": dilemma_block,
    "together": together_block,
}
"""Name of a marker -> what stands there."""


# -- figures of runs ------------------------------------------------------------------------------------------------


def final_table(run: Run) -> str:
    """What `coterie train` shows at the end of a run."""
    from coterie.evaluation import Evaluation, Measured

    players = run["heldout"]["players"]
    measured = {
        player: Measured(
            {(kind, model): value for kind, cells in p["by_task_type"].items() for model, value in cells.items()},
            p["by_model"],
            p["mean"],
            p["exact"],
            p["outcome"],
        )
        for player, p in players.items()
    }
    return Evaluation(run["heldout"]["tasks"], measured).table().plain()


def cooperation(run: Run, player: str = "trained") -> float:
    """Probability of cooperating, mean of both models."""
    value: float = run["heldout"]["players"][player]["exact"]["cooperation"]
    return value


def by_variant(found: ClaimFile) -> list[tuple[str, list[Run]]]:
    """Runs of the dilemma by variant: competitive, mixed by level, cooperative."""
    groups: dict[str, list[Run]] = {}
    for run in found.runs:
        groups.setdefault(run["variant"], []).append(run)
    order = {"competitive": 0, "mixed": 1, "cooperative": 2}
    return sorted(groups.items(), key=lambda item: (order[item[1][0]["mode"]], item[0]))


def _kinds(run: Run) -> list[str]:
    return sorted(run["heldout"]["players"]["trained"]["by_task_type"])


def _of_kind(run: Run, player: str, kind: str) -> float:
    return fmean(run["heldout"]["players"][player]["by_task_type"][kind].values())


def _accuracies(by_player: Sequence[Sequence[float]], words: Words) -> list[str]:
    bare, calibrated, trained = (fmean(values) for values in by_player)
    gain = f"{round(100 * trained) - round(100 * bare):+d}"
    shown = _span([_percent(value) for value in sorted(by_player[2])], words)
    return [_percent(bare), _percent(calibrated), _percent(trained), words.points.format(gain), shown]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _floor_points(gain: float) -> int:
    """Whole points, rounded down: what is said to be reached is reached."""
    return int(100 * gain // 1)


def _span(values: Sequence[Any], words: Words) -> str:
    """ "40 %" or "38 % to 40 %"."""
    low, high = min(values, key=_size), max(values, key=_size)
    return str(low) if low == high else words.to.format(low=low, high=high)


def _size(value: Any) -> Any:
    return float(value.removesuffix(" %")) if isinstance(value, str) and value.endswith(" %") else value


def _seeds(runs: Sequence[Run], words: Words) -> str:
    pattern = words.seed if len(runs) == 1 else words.several_seeds
    return pattern.format(words.comma.join(str(run["seed"]) for run in runs))


def _missing(command: str, words: Words) -> str:
    return words.missing.format(command=command)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
