"""How hypothesis looks for counterexamples in every property test; imported by the folders that have any."""

from __future__ import annotations

from hypothesis import settings

# an example of more than 200 ms would count as a failure, which says more of the machine than of the code
settings.register_profile("coterie", deadline=None)
settings.load_profile("coterie")
