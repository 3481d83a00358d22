"""The fault matrix of clients whose first tier is CAMEL itself, on a real clock: the openai client keeps its own."""

from __future__ import annotations

import pytest

from tests.e2e.test_faults import (  # noqa: F401 - the tests, with the fixtures below
    test_a_mended_server_is_used_again,
    test_a_refusal_is_told_in_the_servers_words_and_never_retried,
    test_another_server_answers,
    test_last_of_all_answers_are_simulated_unless_one_was_begun,
    test_the_next_tier_answers_when_no_server_can,
)
from tests.support.loops import Runs, run

pytestmark = pytest.mark.camel


@pytest.fixture
def go() -> Runs:
    return run


@pytest.fixture
def tier() -> str:
    return "camel"
