"""Run a script; one rank kills itself after the optimizer's n-th step, but not after a restart.

python dies.py RANK STEP SCRIPT [flag ...]
"""

import itertools
import os
import runpy
import signal
import sys

from torch.optim.optimizer import register_optimizer_step_post_hook

if __name__ == "__main__":
    rank, last, *sys.argv = sys.argv[1:]
    steps = itertools.count(1)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        register_optimizer_step_post_hook(lambda *_: next(steps) < int(last) or os.kill(os.getpid(), signal.SIGKILL))
    runpy.run_path(sys.argv[0], run_name="__main__")
