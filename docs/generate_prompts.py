"""Write the example prompts in docs/scenarios/*.md: what the scenario of a config shows a seat, between markers.

    <!-- prompt:configs/games/openspiel-kuhn.toml 2 -->      the second prompt of the game, counted over all seats
    <!-- /prompt -->

    python docs/generate_prompts.py            writes them
    python docs/generate_prompts.py --check    writes nothing; exit 1 when one is out of date

The game is the first held-out task of seed 0, played at a practice table whose seats take the first choice there is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from coterie.config import load_config
from coterie.scenarios.base import build_scenario
from coterie.scenarios.practice import PracticeTable
from coterie.types import Observation, SeatId, Split

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- prompt:(?P<config>\S+) (?P<number>\d+) -->\n).*?(<!-- /prompt -->)", re.DOTALL)


def prompt(config: Path, number: int) -> str:
    """The `number`-th prompt of the config's scenario, from 1, and the choices given with it, as a block of Markdown.

    Raises:
        ValueError: the game has fewer turns.
    """
    parsed = load_config(config)
    scenario = build_scenario(parsed.scenario.id, parsed.scenario.options)
    task = next(iter(scenario.tasks(Split.HELDOUT, 0)))
    asked: list[tuple[Observation, Sequence[str] | None]] = []

    def first(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        asked.append((seen, choices))
        return "…" if choices is None else choices[0]

    table = PracticeTable(task, scenario.seats(task), answer=first, language=parsed.rollout.language)
    asyncio.run(scenario.play(task, table))
    if not 1 <= number <= len(asked):
        raise ValueError(f"{config} has {len(asked)} prompts, so none with the number {number}")
    seen, choices = asked[number - 1]
    parts = {"system": seen.system, "user": seen.user, "assistant": seen.prefix}
    lines = [f"{who:<11}{text}".replace("\n", "\n" + " " * 11) for who, text in parts.items() if text]
    if choices is not None:
        lines.append(f"{'choices':<11}{', '.join(choices)}")
    return "\n".join(["```", *(line.rstrip() for text in lines for line in text.splitlines()), "```"])


def written(page: str, root: Path) -> str:
    """A page with every prompt made anew."""
    return _BLOCK.sub(lambda m: f"{m[1]}{prompt(root / m['config'], int(m['number']))}\n{m[4]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for path in sorted((DOCS / "scenarios").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        new = written(page, DOCS.parent)
        if new != page:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is out of date' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
