"""Four configurations side by side, one encoder pass a step, against one after the other.

Last by its name: a process starts with its parent's peak of memory, which other benchmarks report.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from race import LOSS_NOISE

from fastlora.console import Log
from fastlora.training.side_by_side import side_by_side

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LIMIT = 100  # examples of the whole runs, which start-up then rules
NOISE = 0.05  # of Pearson's r on so few pairs, the encoder's dropout being random
TOGETHER = """
import json
import sys
from dataclasses import replace
from pathlib import Path
from fastlora.training.config import TrainConfig
from fastlora.console import Log
from fastlora.cli.process import keep_freed_memory
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import prepare
from fastlora.training.side_by_side import side_by_side
data, model, device = sys.argv[1:]
config = TrainConfig(data=Path(data), model=model, tasks=("sts",), limit={limit}, device=device)
keep_freed_memory()
setup = prepare(config, find_inputs(config))
rates = {rates}
trainer = side_by_side(setup, [replace(setup.config, lr=lr) for lr in rates], Log(quiet=True))
print(json.dumps(list(trainer.run().scores.values())))
"""


@pytest.mark.parametrize("tokens", [256, 1024])
def test_steps(compare, job, tokens):
    """A step's time for four configurations, with so many tokens a batch each."""
    setup = job.setup(full=False)
    setup = replace(setup, config=replace(setup.config, tokens_per_batch=tokens))
    configs = [replace(setup.config, lr=lr) for lr in RATES]
    together = side_by_side(setup, configs, Log(quiet=True))
    alone = [side_by_side(setup, [config], Log(quiet=True)) for config in configs]
    size = sorted(map(len, together.plan(0)))[len(together.plan(0)) // 2]
    which = next(i for i, rows in enumerate(together.plan(0)) if len(rows) == size)

    def run(trainer):
        trainer.step(trainer.plan(0)[which])
        trainer.progress.step += 1

    def mean_loss(trainers):
        return sum(t.sums[:, 0].sum().item() for t in trainers) / sum(
            t.sums[:, 1].sum().item() for t in trainers
        )

    run(together)
    for trainer in alone:
        run(trainer)
    difference = abs(mean_loss([together]) / mean_loss(alone) - 1)
    compare(
        f"side by side {job.device}: {tokens} tokens a batch, ratio to one by one",
        lambda: [run(trainer) for trainer in alone],
        lambda: run(together),
        job.device,
        name="four at once",
        agrees=difference < LOSS_NOISE,
    )


def test_whole_runs(benchmark, job, tmp_path):
    """Four short runs as commands, start and end included, and one process for all: once."""
    setup = job.setup(full=False)
    data, model = str(setup.config.data), setup.config.model
    flags = ["--data", data, "--model", model, "--tasks", "sts", "--limit", str(LIMIT), "--quiet"]
    command = [sys.executable, "-m", "fastlora.cli", "train", "--device", job.device, *flags]
    script = TOGETHER.format(rates=RATES, limit=LIMIT)
    outs, times, together = [tmp_path / str(rate) for rate in RATES], [], []

    def four_commands():
        start = time.perf_counter()
        for rate, out in zip(RATES, outs, strict=True):
            subprocess.run([*command, "--lr", str(rate), "--out", str(out)], check=True)
        times.append(time.perf_counter() - start)

    def one_process():
        arguments = [sys.executable, "-c", script, data, model, job.device]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        together.extend(json.loads(done.stdout.splitlines()[-1]))

    benchmark.group = (
        f"side by side {job.device}: {LIMIT} examples, start included, ratio to commands"
    )
    benchmark.pedantic(one_process, setup=four_commands, rounds=1)
    (found,) = benchmark.stats.stats.data
    ratio = times[0] / found
    alone = [json.loads((out / "result.json").read_text())["scores"]["sts"] for out in outs]
    pairs = zip(alone, together, strict=True)
    benchmark.extra_info.update(
        name="four at once",
        ratio=ratio,
        low=ratio,
        high=ratio,
        milliseconds=1e3 * found,
        agrees=all(abs(a - b) < NOISE for a, b in pairs),
    )
