"""The two ways a command fails; the command line turns them into exit codes."""


class UserError(Exception):
    """Usage, configuration or data is wrong, found before training starts: exit code 2.

    The message is one line: what, where, what was found, what was expected, what to do.
    """


class RunError(Exception):
    """A run that had started could not go on (diverged, out of memory, I/O): exit code 1."""
