"""Kill training with SIGKILL, and continue it with the same command.

Every run has to end with the bits of one that was never killed: adapter, heads, predictions, scores
and history. The kills come at each operation on a file in the run's folder (a file opened for
writing, a rename, a removal, an fsync, a new folder), before it, and at random moments, some of
them during a continuation.

    python tools/kills.py                 # each operation, and 50 random moments
    python tools/kills.py --operations 10 --random 5 --seed 7
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tally import Tally, command, comparison, failure, preload
from tiny import outcome, train_arguments, write_data, write_model

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def on_operations(folder: Path, action: Callable[[int], object]) -> None:
    """Have each operation on a file below a folder call `action` with its number, from 1."""
    root, count = str(folder), [0]

    def operation(path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root):
            count[0] += 1
            action(count[0])

    def hook(event: str, arguments: tuple) -> None:
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if written or event in CHANGES:
            operation(arguments[0])

    sys.addaudithook(hook)
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        operation(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched


class Killer:
    """Kills runs of one command, and compares how they end with a run that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        write_model(folder / "model")
        write_data(folder / "data")
        os.environ["FASTLORA_CACHE"] = str(folder / "cache")
        self.flags = ["--epochs", "2", "--save-every", "4", "--max-steps", "11"]
        # The first run fills the cache of tokens.
        for name in ("first", "whole"):
            start = time.monotonic()
            child = command(self.arguments(folder / name), self.output)
            assert (code := child.wait()) == 0, f"{code} {child.text()}"
        self.seconds, self.whole = time.monotonic() - start, outcome(folder / "whole")

    def arguments(self, out: Path) -> list[str]:
        """The arguments of the command that writes `out`."""
        return train_arguments(self.folder, out, *self.flags)

    def count(self) -> int:
        """The number of operations on files of a run."""
        out, number = self.folder / "counted", self.folder / "number"
        note = lambda n: os.environ.update(OPERATIONS=str(n))  # noqa: E731

        def watch() -> None:
            on_operations(out, note)
            real = os._exit
            os._exit = lambda code: (number.write_text(os.environ["OPERATIONS"]), real(code))

        assert command(self.arguments(out), self.output, watch).wait() == 0
        return int(number.read_text())

    def at_operation(self, number: int) -> str:
        """Kill a run before an operation, and continue it; returns the verdict."""
        out = self.folder / "killed"

        def watch() -> None:
            on_operations(out, lambda n: n == number and os.kill(os.getpid(), signal.SIGKILL))

        command(self.arguments(out), self.output, watch).wait()
        return self.verdict(out)

    def at_moments(self, rng: random.Random) -> str:
        """Kill a run at one to three random moments, and continue it; returns the verdict."""
        out = self.folder / "killed"
        for _ in range(rng.randint(1, 3)):
            child = command(self.arguments(out), self.output)
            time.sleep(rng.uniform(0, self.seconds))
            child.kill()
            child.wait()
        return self.verdict(out)

    def verdict(self, out: Path) -> str:
        """Continue a run that was killed, until its end; returns the verdict, and removes it."""
        child = command(self.arguments(out), self.output)
        code = child.wait()
        if code:
            return failure(code, child.text())
        left = [path.name for path in out.rglob(".*")]  # a continued run removes what was left
        found = {**outcome(out), "leftovers": left}
        shutil.rmtree(out)
        return comparison(found, {**self.whole, "leftovers": []})


def main() -> int:
    """Run the kills that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, help="how many, evenly spaced (default: all)")
    parser.add_argument("--random", type=int, default=50, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    preload()
    with TemporaryDirectory() as folder:
        killer, tally = Killer(Path(folder)), Tally("kills")
        total = killer.count()
        wanted = total if given.operations is None else min(given.operations, total)
        for i in range(wanted):
            number = 1 + i * total // wanted
            tally.add(killer.at_operation(number), f"kill before operation {number} of {total}")
            shutil.rmtree(killer.folder / "killed", ignore_errors=True)
        for i in range(given.random):
            verdict = killer.at_moments(random.Random(f"{given.seed}-{i}"))
            tally.add(verdict, f"kills at random moments, seed {given.seed}-{i}")
            shutil.rmtree(killer.folder / "killed", ignore_errors=True)
        return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
