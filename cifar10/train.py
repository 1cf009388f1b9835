"""Train on CIFAR-10: `python cifar10/train.py`, with any flag of `--help`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path.insert(0, f"{sys.path[0]}/..")  # the repository
    import_module("engine.cli").main("engine.run:train", __file__, "cifar10.yml")
