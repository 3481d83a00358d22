"""Scenarios: what is played, one per file."""
