"""Measurements and figures of the paper, run from the repository root as `python -m analysis.NAME`."""
