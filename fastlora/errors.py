"""The errors that end a command; the command line turns them into exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A wrong argument, configuration or data file, reported before training: exit code 2."""


class Interrupted(Exception):
    """A run that was asked to stop has saved its state: exit code 130."""


class RunError(Exception):
    """A run that had started cannot continue (divergence, memory, input or output): exit code 1."""


class Diverged(RunError):
    """A loss is not finite any more."""


@contextmanager
def in_place_of(old: type[Exception], new: type[Exception], where: str = "") -> Iterator[None]:
    """Raise `new` in place of `old`, with the same text after `where`."""
    try:
        yield
    except old as error:
        raise new(f"{where}{error}") from error
