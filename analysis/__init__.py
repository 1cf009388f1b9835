"""What the paper measures and shows, run from the repository root as `python -m analysis.NAME`."""
