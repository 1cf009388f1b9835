"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the remedy; scripts print it and exit with 2."""
