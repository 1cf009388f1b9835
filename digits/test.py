"""Evaluate a checkpoint on the digits' test set: `python digits/test.py --checkpoint output/.../best.pt`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.cli import guard

if __name__ == "__main__":
    with guard():
        from analysis.energy import EnergyMeter
        from engine.run import test

        test(Path(__file__).resolve().with_name("digits.yml"), EnergyMeter)
