"""Train on CIFAR-10: `python cifar10/train.py`, with any flag of `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.cli import guard

if __name__ == "__main__":
    with guard():
        from engine.run import train

        train(Path(__file__).resolve().with_name("cifar10.yml"))
