"""Write docs/performance.md from what `bench.py`, `pool.py` and `client_cost.py` measured.

Every number on the page comes from the results, the verdicts too. What was measured on another kind of processor has a
file of its own, `benchmarks/results/bench-NAME.json`, and a page of its own, `docs/performance-NAME.md`. `--check`
writes nothing and fails when a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_envs import ROOT
from performance_page import Page

RESULTS = ROOT / "benchmarks" / "results" / "bench.json"
PAGE = ROOT / "docs" / "performance.md"


def all_results(folder: Path) -> list[Path]:
    """Results of bench.py, the repository's first ones first."""
    return sorted(folder.glob(f"{RESULTS.stem}*.json"), key=lambda path: (path.stem != RESULTS.stem, path.stem))


def page_of(results: Path) -> Path:
    """Where results are told: those of the repository in docs/, any others beside them."""
    if results.resolve().parent == RESULTS.parent:
        return PAGE.with_stem(results.stem.replace(RESULTS.stem, PAGE.stem, 1))
    return results.with_suffix(".md")


def write(results: Path, output: Path, *, check: bool) -> bool:
    """Write, or check, one page; says what is wrong, and returns whether nothing is."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"error: {results}: {error.strerror}; measure first: make bench", file=sys.stderr)
        return False
    except ValueError as error:
        print(f"error: {results} is damaged ({error}); delete it and measure again", file=sys.stderr)
        return False
    quick = [name for name, data in found.items() if data["quick"]]
    if quick and output.parent == PAGE.parent:
        print(f"error: {', '.join(quick)} were measured with --quick; such numbers mean nothing", file=sys.stderr)
        return False
    folder = results.parent
    others = [page_of(path).name for path in all_results(folder) if path != results]
    text = Page(found, folder if output.stem == PAGE.stem else None, others).text()
    if check:
        same = output.is_file() and output.read_text(encoding="utf-8") == text
        if not same:
            print(f"{output} is not what the results say: python benchmarks/write_performance.py", file=sys.stderr)
        return same
    output.write_text(text, encoding="utf-8")
    print(f"written: {output}")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page would change")
    parser.add_argument("--results", type=Path, metavar="FILE", help="of bench.py; default: all of the repository")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in docs/, or beside other results")
    options = parser.parse_args(arguments)
    chosen = [options.results] if options.results else all_results(RESULTS.parent) or [RESULTS]
    if options.output and len(chosen) > 1:
        parser.error("--output is of one page: give --results too")
    wrong = [path for path in chosen if not write(path, options.output or page_of(path), check=options.check)]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
