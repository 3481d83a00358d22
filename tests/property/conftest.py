"""Settings of the property tests here."""

from __future__ import annotations

from tests.support import examples as examples
