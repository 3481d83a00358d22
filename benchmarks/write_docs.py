"""Write the measured parts of README and docs: benchmarks/results/*.json in, text between markers and figures out.

    <!-- claims:signaling -->
    whatever stands here is replaced (`blocks.py` says by what)
    <!-- /claims -->

Numbers stand nowhere else. A file whose name ends in .zh-CN.md gets Chinese text. `--check` writes nothing and fails
when a text block is not what the results say, when a figure is missing, or when results are of another state of their
config; figures are not compared, because drawing differs between versions of matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks import BLOCKS, TOGETHER, WORDS, Results, Words, by_variant, cooperation
from claims_file import CONFIGS, RESULTS, ROOT, ClaimFile, digest, read

FIGURES = {"tasks": "learning-curve.svg", "prisoners_dilemma": "one-switch.svg"}
"""Claim -> its figure in docs/figures."""

_MARKER = re.compile(r"<!-- (?:claims:(?P<name>[\w-]*)|(?P<end>/claims)) -->")


def replaced(text: str, results: Results, words: Words) -> str:
    """`text` with every block between markers made anew.

    Raises:
        ValueError: an unknown name (the known ones are listed), a block that is not closed, or a lone end.
    """
    parts: list[str] = []
    at, opened = 0, None
    for marker in _MARKER.finditer(text):
        line = text.count("\n", 0, marker.start()) + 1
        if marker["end"]:
            if opened is None:
                raise ValueError(f"line {line}: <!-- /claims --> ends a block that was not begun")
            parts += ["\n", BLOCKS[opened](results, words), "\n", marker[0]]
            opened = None
        else:
            if opened is not None:
                raise ValueError(f"line {line}: the block {opened!r} before it has no <!-- /claims -->")
            opened = marker["name"]
            if opened not in BLOCKS:
                raise ValueError(f"line {line}: unknown block {opened!r}; there are {', '.join(sorted(BLOCKS))}")
            parts += [text[at : marker.start()], marker[0]]
        at = marker.end()
    if opened is not None:
        raise ValueError(f"the block {opened!r} has no <!-- /claims -->")
    return "".join([*parts, text[at:]])


@dataclass(frozen=True, slots=True)
class Place:
    """Where documents and results are; another one for tests."""

    root: Path = ROOT
    results: Path = RESULTS

    def load(self) -> dict[str, ClaimFile]:
        """The claims that were measured. Raises `ValueError` for a damaged file."""
        found = {claim: read(self.results / f"{claim}.json") for claim in (*CONFIGS, *TOGETHER)}
        return {claim: file for claim, file in found.items() if file is not None and file.runs}

    def documents(self) -> list[Path]:
        """Every file that may hold markers."""
        return [*sorted(self.root.glob("README*.md")), *sorted((self.root / "docs").glob("*.md"))]

    def changes(self) -> dict[Path, str]:
        """The documents that are not what the results say, and what they should be. Raises `ValueError`."""
        results, changed = self.load(), {}
        for path in self.documents():
            text = path.read_text(encoding="utf-8")
            try:
                new = replaced(text, results, WORDS["zh" if path.name.endswith(".zh-CN.md") else "en"])
            except ValueError as error:
                raise ValueError(f"{path}, {error}") from error
            if new != text:
                changed[path] = new
        return changed

    def stale(self) -> list[str]:
        """Results that are not of the config as it is now, a line each."""
        return [
            f"{claim}.json was measured with another state of {file.config}; measure it again"
            for claim, file in self.load().items()
            if not (self.root / file.config).is_file() or digest(self.root / file.config) != file.digest
        ]

    def missing_figures(self) -> list[str]:
        """Figures that results exist for and that were not drawn, a line each."""
        names = [FIGURES[claim] for claim in self.load() if claim in FIGURES]
        return [f"docs/figures/{n} is missing" for n in names if not (self.root / "docs" / "figures" / n).is_file()]

    def check(self) -> list[str]:
        """All that is wrong, a line each."""
        texts = [f"{path.relative_to(self.root)} is not what the results say" for path in self.changes()]
        return [*texts, *self.missing_figures(), *self.stale()]

    def write(self) -> list[Path]:
        """Write every text and figure; returns the texts that changed."""
        changed = self.changes()
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
        for claim, found in self.load().items():
            if claim in FIGURES:
                draw(claim, found, self.root / "docs" / "figures" / FIGURES[claim])
        return list(changed)


def draw(claim: str, found: ClaimFile, path: Path) -> None:
    """Write a claim's figure; needs matplotlib."""
    import figures

    path.parent.mkdir(parents=True, exist_ok=True)
    if claim == "tasks":
        figures.learning_curve(found.runs, path)
        return
    groups = [
        (runs[0]["mode"], runs[0].get("cooperation_level"), [cooperation(run) for run in runs])
        for _, runs in by_variant(found)
    ]
    figures.societies(groups, path)


def main(arguments: Sequence[str] | None = None, place: Place | None = None) -> int:
    """Returns the exit code: 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when anything would change")
    options = parser.parse_args(arguments)
    place = place or Place()
    try:
        if not options.check:
            for path in place.write():
                print(f"written: {path.relative_to(place.root)}")
        problems = place.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and options.check:
        print("mend it by: python benchmarks/write_docs.py", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
