"""The exceptions that end a script in one line."""

import signal

LONGEST = 1000  # characters of a message; what the user gave may have any length


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the remedy; scripts print it and exit with 2."""

    def __init__(self, message: str):
        # a loader's worker hands its exception on with the traceback in front
        line = " ".join(message.split(f"{type(self).__name__}: ")[-1].split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")


class Stopped(Exception):
    """A signal asked the run to end, and it is saved.

    Args:
        number: the signal; the script's exit code is 128 + `number`, as the shell's.
        where: how far the run has come.
    """

    def __init__(self, number: int, where: str):
        self.code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; --resume auto goes on from there")
