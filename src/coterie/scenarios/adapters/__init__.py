"""Environments that others made, as scenarios."""
