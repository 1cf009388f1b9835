"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the remedy; scripts print it and exit with 2."""

    def __init__(self, message: str):
        # a loader's worker hands its exception on with the traceback in front
        super().__init__(" ".join(message.split(f"{type(self).__name__}: ")[-1].split()))
