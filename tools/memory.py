"""Train many steps, and many runs, in one process whose memory has to stay flat.

What the process holds (its resident memory) is measured all along. From a fifth of the way to the
end it may grow by 16 MiB, which is noise of the allocator: a leak of one batch's token ids a step,
or of one tiny model a run, would be more.

    python tools/memory.py --steps 5000 --runs 200
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tally import Tally, preload
from tiny import write_data, write_model

GROWTH = 16.0  # MiB


def resident() -> float:
    """The memory that this process holds, in MiB; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[float]) -> float:
    """How much the last fifth of the samples lies above the second fifth, at their highest."""
    part = len(samples) // 5
    return max(samples[-part:]) - max(samples[part : 2 * part])


def of_steps(settings: dict, steps: int) -> list[float]:
    """The memory at each of a run's steps."""
    from fastlora.runs.session import run_training
    from fastlora.training.config import TrainConfig
    from fastlora.training.loop import Trainer

    samples, step = [], Trainer.step

    def sampled(trainer: Trainer, plan: object) -> bool:
        samples.append(resident())
        return step(trainer, plan)

    Trainer.step = sampled
    run_training(TrainConfig(**settings, epochs=steps, max_steps=steps), quiet=True)
    Trainer.step = step
    return samples


def of_runs(settings: dict, runs: int) -> list[float]:
    """The memory after each of many runs, and after a prediction with each."""
    from fastlora.runs.session import run_training
    from fastlora.runs.trained import load
    from fastlora.training.config import TrainConfig

    samples = []
    for _ in range(runs):
        run_training(TrainConfig(**settings, max_steps=2), quiet=True)
        load(settings["out"], "cpu").predict(["the good film"], "sst")
        shutil.rmtree(settings["out"])
        samples.append(resident())
    return samples


def main() -> int:
    """Train what the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    preload()
    tally = Tally("memory")
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FASTLORA_CACHE"] = str(folder / "cache")
        model, data = str(write_model(folder / "model")), write_data(folder / "data")
        settings = {"model": model, "data": data, "device": "cpu", "tasks": ("sst", "sts")}
        settings |= {"tokens_per_batch": 160, "out": folder / "run"}
        for what, measure, count in (
            ("steps", of_steps, given.steps),
            ("runs", of_runs, given.runs),
        ):
            samples = measure(settings, count)
            grown = growth(samples)
            print(f"{count:,} {what}: {samples[-1]:.0f} MiB, grown by {grown:.1f} MiB", flush=True)
            tally.add("right" if grown <= GROWTH else "wrong", f"{what}: grown by {grown:.1f} MiB")
            shutil.rmtree(settings["out"], ignore_errors=True)
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
