"""The examples in docs/scenarios that need other packages are what the code shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.scripts import ROOT, load_script

generate = load_script("docs/generate_scenarios.py")
EXAMPLE = re.compile(r"^<!-- example: (configs/games/\S+)", re.MULTILINE)
PAGES = [
    path
    for path in sorted((ROOT / "docs" / "scenarios").glob("*.md"))
    if EXAMPLE.search(path.read_text(encoding="utf-8"))
]


def test_every_adapter_has_a_page_that_runs_its_config() -> None:
    assert {page.stem for page in PAGES} == {"datasets", "openspiel", "pettingzoo", "reasoning_gym", "textarena"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        (config,) = set(EXAMPLE.findall(text))
        assert f"coterie train {config}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_are_what_the_code_shows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text, pages=page.parent, results=generate.FOLDER) == text
    spoilt = text.replace("\nuser: ", "\nuser: Once upon a time ", 1)
    assert spoilt != text == generate.filled(spoilt, pages=page.parent, results=generate.FOLDER)
