"""What SIGTERM and SIGINT ask for: the run shall end where it can be gone on with."""

import signal
from types import FrameType


class StopRequest:
    """As a context, notes the first SIGTERM or SIGINT in `signal`; a SIGINT after it ends the program at once."""

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # somebody is in a hurry; SIGTERM comes twice from some launchers
            raise KeyboardInterrupt
