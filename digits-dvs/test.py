"""Evaluate on digits before a simulated event camera: `python digits-dvs/test.py --checkpoint output/.../best.pt`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path.insert(0, f"{sys.path[0]}/..")  # the repository
    import_module("engine.cli").main("engine.run:test", __file__, "digits-dvs.yml", "analysis.energy:EnergyMeter")
