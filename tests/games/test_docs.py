"""The prompts in docs/scenarios are those the code shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.scripts import ROOT, load_script

prompts = load_script("docs/generate_prompts.py")
PAGES = [path for path in sorted((ROOT / "docs" / "scenarios").glob("*.md")) if "configs/games/" in path.read_text()]


def test_every_adapter_has_a_page_that_runs_its_config() -> None:
    assert {page.stem for page in PAGES} == {"datasets", "openspiel", "pettingzoo", "reasoning_gym", "textarena"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        (config,) = {match["config"] for match in prompts._BLOCK.finditer(text)}
        assert (ROOT / config).is_file()
        assert f"coterie train {config}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prompts_are_what_the_code_shows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert prompts.written(text, ROOT) == text
    spoilt = text.replace("user       ", "user       Once upon a time ", 1)
    assert spoilt != text == prompts.written(spoilt, ROOT)


def test_a_prompt_that_is_never_shown_is_an_error() -> None:
    with pytest.raises(ValueError, match="so none with the number 99"):
        prompts.prompt(ROOT / "configs" / "games" / "openspiel-kuhn.toml", 99)
