"""Evaluate on DVS128 Gesture: `python dvs128-gesture/test.py --checkpoint FILE`, with any flag of `--help`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path.insert(0, f"{sys.path[0]}/..")  # the repository
    import_module("engine.cli").main("engine.run:test", __file__, "dvs128-gesture.yml", "analysis.energy:EnergyMeter")
