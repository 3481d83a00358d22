"""What a conformance check found: problems, each with how to mend it, and notes that are no problems.

A problem is one plain sentence, reported once, with the first place it was seen at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One way a scenario breaks its contract."""

    what: str
    mend: str
    """What to do, in a sentence."""
    where: str = ""
    """The first place it was seen at: task, language, who is heard."""

    @property
    def line(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass(slots=True)
class Findings:
    """What was found so far, and what was looked at."""

    problems: dict[str, Problem] = field(default_factory=dict)
    """By what is wrong."""
    notes: dict[str, None] = field(default_factory=dict)
    """Worth knowing and no fault, in the order they came up."""
    tasks: int = 0
    """Distinct tasks that were looked at."""
    plays: int = 0

    def add(self, what: str, where: str = "", *, mend: str) -> None:
        """Keep a problem, unless the same was seen before."""
        self.problems.setdefault(what, Problem(what, mend, where))

    def include(self, others: Findings) -> None:
        """Keep the problems of `others` too, unless the same were seen before."""
        for problem in others.problems.values():
            self.problems.setdefault(problem.what, problem)

    def note(self, text: str) -> None:
        self.notes.setdefault(text)

    def lines(self) -> list[str]:
        """Every problem with its place, in the order they came up."""
        return [problem.line for problem in self.problems.values()]

    def as_dict(self) -> Mapping[str, Any]:
        """JSON values."""
        return {
            "passed": not self.problems,
            "tasks": self.tasks,
            "plays": self.plays,
            "problems": [{"where": p.where, "what": p.what, "mend": p.mend} for p in self.problems.values()],
            "notes": list(self.notes),
        }
