"""The errors that end a command; the command line turns them into exit codes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A wrong argument, configuration or data file, reported before training: exit code 2."""


class Interrupted(Exception):
    """A run was asked to stop, and has saved its state: exit code 130."""


class RunError(Exception):
    """A run has started but cannot go on (divergence, memory, input or output): exit code 1."""


class Diverged(RunError):
    """A training loss is not finite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the known name that is close to it, or nothing."""
    spelled = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), spelled, n=1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


@contextmanager
def in_place_of(
    old: type[Exception] | tuple[type[Exception], ...], new: type[Exception], where: str = ""
) -> Iterator[None]:
    """Raise `new` in place of `old`, with `where` before its text."""
    try:
        yield
    except old as error:
        raise new(f"{where}{error}") from error
