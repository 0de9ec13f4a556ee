"""The ways in which a command ends badly; the command line turns them into exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Usage, configuration or data is wrong, found before training starts: exit code 2."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved: exit code 130."""


class RunError(Exception):
    """A run that had started could not go on (diverged, out of memory, I/O): exit code 1."""


class Diverged(RunError):
    """A loss is no longer a finite number."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the ValueError that the kernels, which know no users, raise into UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
