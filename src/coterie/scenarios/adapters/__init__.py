"""Scenarios of the ecosystem's environments, one module each; each needs the extra it names. See `foreign.py`."""
