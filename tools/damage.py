"""Change a byte, or the length, of each file of a finished and of an unfinished run.

An unfinished run is then continued, and a finished one is reported by its own command, and used by
`fastlora predict`. Each command has to end in one line that names what is wrong, or as if nothing
had happened: the same weights, predictions and scores.

    python tools/damage.py               # 6 changes of each file
    python tools/damage.py --count 2 --seed 7
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tally import Tally, command, comparison, failure, preload
from tiny import outcome, train_arguments, write_data, write_model

WAYS = ("a bit", "a byte", "shorter", "longer", "empty", "a byte left out")


def change(content: bytes, way: str, rng: random.Random) -> bytes:
    """The content of a file, changed in one way at a random place."""
    place = rng.randrange(len(content)) if content else 0
    if way == "a bit" and content:
        return (
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    if way == "a byte":
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if way == "a byte left out":
        return content[:place] + content[place + 1 :]
    return {"shorter": content[:place], "empty": b""}.get(way, content + rng.randbytes(1))


class Runs:
    """A finished and an unfinished run, and what using them gives when they are whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.out = folder, folder / "output.txt", folder / "run"
        write_model(folder / "model")
        write_data(folder / "data")
        os.environ["FASTLORA_CACHE"] = str(folder / "cache")
        flags = ["--epochs", "2", "--save-every", "3", "--max-steps", "8"]
        self.train = train_arguments(folder, self.out, *flags)
        stop = self._stop_after_six_steps
        assert command(self.train, self.output, stop).wait() == 130, self.output.read_text()
        shutil.copytree(self.out, folder / "unfinished")
        assert command(self.train, self.output).wait() == 0, self.output.read_text()
        shutil.copytree(self.out, folder / "finished")
        self.table = self.report()[1]
        self.whole = outcome(self.out)
        self.predicted = self.predict()[1]

    def _stop_after_six_steps(self) -> None:
        from fastlora.training.loop import Trainer

        step = Trainer.step

        def stopping(trainer: Trainer, plan: object) -> bool:
            return step(trainer, plan) or trainer.progress.step == 6

        Trainer.step = stopping

    def report(self) -> tuple[int, str]:
        """The exit code of the training command, and what it prints."""
        train = [part for part in self.train if part != "--quiet"]
        child = command(train, self.output)
        return child.wait(), child.text()

    def predict(self) -> tuple[int, str]:
        """The exit code of a prediction with the run, and what it prints."""
        rows, model = self.folder / "data" / "sts-dev.csv", self.folder / "model"
        flags = ["--task", "sts", "--out", "-", "--device", "cpu", "--model", str(model)]
        child = command(["predict", str(self.out), str(rows), *flags], self.output)
        return child.wait(), child.text()

    def verdict(self, state: str, file: Path, way: str, rng: random.Random) -> str:
        """How the commands end after a change of a file of the run in a state."""
        shutil.rmtree(self.out)
        shutil.copytree(self.folder / state, self.out)
        path = self.out / file
        path.write_bytes(change(path.read_bytes(), way, rng))
        code, text = self.report()
        if code:
            return failure(code, text)
        if state == "unfinished":
            return comparison(outcome(self.out), self.whole)
        table = text
        code, text = self.predict()
        if code:
            return failure(code, text)
        found = {"report": table, "predictions": text}
        return comparison(found, {"report": self.table, "predictions": self.predicted})


def main() -> int:
    """Make the changes that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=len(WAYS), help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    preload()
    with TemporaryDirectory() as folder:
        runs, tally = Runs(Path(folder)), Tally("damage")
        for state in ("unfinished", "finished"):
            place = Path(folder, state)
            for path in sorted(path for path in place.rglob("*") if path.is_file()):
                file = path.relative_to(place)
                for i in range(given.count):
                    seed, way = json.dumps([given.seed, state, str(file), i]), WAYS[i % len(WAYS)]
                    verdict = runs.verdict(state, file, way, random.Random(seed))
                    tally.add(verdict, f"{way}, seed {seed}")
        return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
