"""A training step of this checkout against another one's, say the last release's, in turns.

    git worktree add ../old 980751b && make -C ../old .venv/.test
    python bench/releases.py ../old --data data/

Each side runs in a process of its own, with its own `.venv`, on the same batches of SST, Quora and
STS (MiniLM-L6, LoRA with r = 32 on query and value). Prints the ratio of the times of the
pairs of turns, more than 1 if this checkout is faster, with its quartiles, and the mean losses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STEPS = 2  # a turn
LIMIT = 300  # examples a task: a release may have another default


def serve(tree: Path, data: Path, precision: str) -> None:
    """Train the batches that standard input names, and answer with seconds and the mean loss."""
    sys.path[0] = str(tree / "bench")  # that checkout's contenders, not this one's
    from trainers import Job, make_trainer, plan_of, train

    from fastlora.bert.config import BertConfig

    trainer = make_trainer("fastlora", Job(data, limit=LIMIT, precision=precision))
    config = BertConfig.from_json(trainer.setup.inputs.source.folder / "config.json")
    plan = plan_of(trainer, "buckets")
    train(trainer, plan[:4], config)  # first calls pay for thread pools and packed weights
    print(len(plan), flush=True)
    for line in sys.stdin:
        first, start = int(line), time.perf_counter()
        work = train(trainer, plan[first : first + STEPS], config)
        print(json.dumps([time.perf_counter() - start, float(work.loss)]), flush=True)


class Side:
    """The process of one checkout."""

    def __init__(self, tree: Path, data: Path, precision: str) -> None:
        command = [tree / ".venv/bin/python", __file__, tree, "--data", data, "--serve"]
        command += ["--precision", precision]
        # A side's threads sleep while the other has its turn.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.batches = json.loads(self.process.stdout.readline())
        self.losses = []

    def turn(self, first: int) -> float:
        """Train STEPS batches from the given one on; returns the seconds."""
        print(first, file=self.process.stdin, flush=True)
        seconds, loss = json.loads(self.process.stdout.readline())
        self.losses.append(loss)
        return seconds


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the other checkout, installed in its .venv")
    parser.add_argument("--data", type=Path, required=True, help="folder of the CS224N files")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    other, data = args.other.resolve(), args.data.resolve()
    if args.serve:
        return serve(other, data, args.precision)
    trees = {"other": other, "this": HERE}
    sides = {name: Side(tree, data, args.precision) for name, tree in trees.items()}
    last = min(side.batches for side in sides.values()) - STEPS
    ratios = []
    for i in range(args.rounds):
        order = list(sides) if i % 2 else list(sides)[::-1]
        seconds = {name: sides[name].turn(STEPS * i % last) for name in order}
        ratios.append(seconds["other"] / seconds["this"])
    low, median, high = statistics.quantiles(ratios, n=4)
    losses = ", ".join(f"{name} {statistics.mean(s.losses):.4f}" for name, s in sides.items())
    print(f"{median:.3f}x [{low:.3f}, {high:.3f}] of the other's speed, {len(ratios)} pairs")
    print(f"mean losses: {losses}")
    for side in sides.values():
        side.process.kill()


if __name__ == "__main__":
    main()
