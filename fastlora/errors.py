"""The two ways a command fails; the command line turns them into exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Usage, configuration or data is wrong, found before training starts: exit code 2.

    The message is one line: what, where, what was found, what was expected, what to do.
    """


class RunError(Exception):
    """A run that had started could not go on (diverged, out of memory, I/O): exit code 1."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ValueError that minBERT, which knows no users, raises for files into UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
