"""What SIGTERM and SIGINT ask for: the run shall end where it can be gone on with."""

import signal
from types import FrameType


class StopRequest:
    """As a context, notes the first SIGTERM or SIGINT in `signal`; a second one acts as if there were no context."""

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
        self.signal = number
        self.__exit__()
