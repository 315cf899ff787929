"""The exceptions that a command turns into a single line and an exit code."""


class UserError(ValueError):
    """A setting, a file or a folder that cannot be used; exit code 2.

    The message is one line: it names the key or path, the value found, and what is allowed.
    """


class RunStopped(Exception):
    """A run that ended early; the message is one line: where, why, and what is left of it.

    Attributes:
        exit_code: 1 for numerical trouble; 128 and the signal's number for a signal.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
