"""Counts how attempts end, and runs commands in child processes that can be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

VERDICTS = ("right", "refused", "wrong")


class Tally:
    """How often attempts ended right, were refused with a line, and went wrong.

    A verdict is one of `VERDICTS`, and may go on with a colon and what was seen. Each wrong one is
    printed, with what is needed to make it again.
    """

    def __init__(self, name: str) -> None:
        self.name, self.counts, self.start = name, dict.fromkeys(VERDICTS, 0), time.monotonic()

    def add(self, verdict: str, what: str) -> None:
        """Count an attempt; `what` describes it."""
        kind, _, seen = verdict.partition(": ")
        self.counts[kind] += 1
        if kind == "wrong":
            print(f"WRONG {what}{seen and ': '}{seen}", flush=True)

    def finish(self) -> int:
        """Print the one line of counts; returns the exit code, 1 if anything went wrong."""
        parts = ", ".join(f"{count:,} {verdict}" for verdict, count in self.counts.items())
        attempts, seconds = sum(self.counts.values()), time.monotonic() - self.start
        print(f"{self.name}: {attempts:,} attempts, {parts} ({seconds:.0f} s)", flush=True)
        return int(self.counts["wrong"] > 0)


class TimeUp(BaseException):
    """An attempt took too long; no reader catches it by its class."""


@contextmanager
def time_limit(seconds: int):
    """Raise TimeUp in the block when it takes longer."""

    def up(*_: object) -> None:
        raise TimeUp(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def preload() -> None:
    """Import and set up in this process what its children need."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import fastlora.cli.commands
    import fastlora.runs.prediction
    import fastlora.runs.session
    import fastlora.runs.trained  # noqa: F401

    torch.set_num_threads(1)


class Child:
    """A function in a forked process, whose output goes to a file."""

    def __init__(self, function: Callable[[], int], output: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.output = output
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function)

    def _run(self, function: Callable[[], int]) -> None:
        code = 70  # of a traceback
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            for number, name in ((1, "stdout"), (2, "stderr")):
                setattr(sys, name, os.fdopen(number, "w", 1, "utf-8", closefd=False))
            code = function()
        except SystemExit as end:  # with which cyclopts ends a command
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """End the process at once, as a power loss or the memory's watchman would."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, or the negative number of the signal that ended it; -99 for a hang."""
        # Time in which this process is stopped, as its child may be, does not count.
        for _ in range(round(seconds / 0.002)):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill()
        os.waitpid(self.pid, 0)
        return -99

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")


def command(arguments: list[str], output: Path, before: Callable[[], object] = int) -> Child:
    """Start a fastlora command in a child, which first calls `before`."""

    def run() -> int:
        from fastlora.cli import exit_code

        before()
        return exit_code(arguments)

    return Child(run, output)


def one_line(code: int, text: str) -> bool:
    """Whether a command has ended in an error of one line, as it should if it cannot go on."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return code in (1, 2) and "Traceback" not in text and len(errors) == 1


def failure(code: int, text: str) -> str:
    """The verdict on a command that has ended in an error."""
    if one_line(code, text):
        return "refused"
    return f"wrong: exit code {code}, last line {''.join(text.splitlines()[-1:])!r}"


def comparison(found: Mapping[str, object], whole: Mapping[str, object]) -> str:
    """The verdict on results that should be as those of the `whole` run, by their names."""
    other = [n for n in {**whole, **found} if found.get(n, "none") != whole.get(n, "none")]
    return f"wrong: other {', '.join(other)}" if other else "right"
