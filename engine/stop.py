"""What SIGTERM, SIGINT and SIGHUP ask for: the run shall end where it can be gone on with."""

import functools
import os
import signal
from types import FrameType


class StopRequest:
    """As a context, notes the first of these in `signal`; a SIGINT after it ends the program at once.

    What is ignored when the context begins, as SIGHUP under nohup, stays so.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # somebody is in a hurry; SIGTERM comes twice from some launchers
            raise KeyboardInterrupt


@functools.cache
def spare_children() -> None:
    """Processes that are forked from now on, loaders', leave the group that a terminal or a launcher sends signals to.

    From their first moment: one that got such a signal while it starts would end, and the run with it.
    """
    os.register_at_fork(after_in_child=os.setpgrp)
