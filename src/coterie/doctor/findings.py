"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad a finding is, best first."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing need be done."""
    WARNING = "warning"
    """Works, but slower, riskier or less than it could."""
    PROBLEM = "problem"
    """Something that was asked for will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a check found."""

    area: str
    check: str
    """Names the check within its area; stable, for scripts."""
    level: Level
    message: str
    mend: str = ""
    """What to do; never empty for warnings and problems."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The numbers and names behind the message, as JSON values."""

    def __post_init__(self) -> None:
        if self.level in (Level.WARNING, Level.PROBLEM) and not self.mend:
            raise ValueError(f"{self.area}/{self.check}: a {self.level} must say how to mend it")


MARKS = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.PROBLEM: "✗"}


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among findings; OK when there are none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings as JSON values, with the worst level and how many there are of each."""
    counts = {str(level): sum(f.level is level for f in findings) for level in Level}
    rows = [{**asdict(f), "level": str(f.level), "facts": dict(f.facts)} for f in findings]
    return {"worst": str(worst(findings)), "counts": counts, "findings": rows}


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """All findings as text, area by area in the order of their first appearance."""
    lines: list[str] = []
    for area in dict.fromkeys(finding.area for finding in findings):
        lines += ["", area] if lines else [area]
        for finding in findings:
            if finding.area != area:
                continue
            lines.append(f"  {MARKS[finding.level]} {finding.message}")
            if finding.mend:
                lines.append(f"    -> {finding.mend}")
    counts = [(sum(f.level is level for f in findings), level) for level in (Level.PROBLEM, Level.WARNING)]
    said = [f"{count} {level}{'s' if count > 1 else ''}" for count, level in counts if count]
    return [*lines, "", ", ".join(said) if said else "nothing to mend"]
