"""Measurements of speed and memory, run by hand from the repository root as `python -m benchmarks.NAME`."""
