"""Evaluate a checkpoint on CIFAR-100: `python cifar100/test.py --checkpoint FILE`, with any flag of `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.energy import EnergyMeter
from engine.run import test

if __name__ == "__main__":
    test(Path(__file__).resolve().with_name("cifar100.yml"), EnergyMeter)
