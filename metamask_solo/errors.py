"""The one exception that a command turns into a single line and exit code 2."""


class UserError(ValueError):
    """A setting, a file or a folder that cannot be used.

    The message is one line: it names the key or path, the value found, and what is allowed.
    """
