"""Where a training step goes, by operator and shape, against what FLOPs and bytes allow.

    python bench/profile_step.py --data data/ [--device cuda] [--precision bf16] [NAME]

NAME is a contender of trainers.py, by default fastlora. One batch of SST, Quora and STS is trained
again and again; an operator's time is the median over steps of its calls on one shape, so that a
slow spell of the machine does not count. Each call is timed by itself, a GPU's to its end, without
PyTorch's profiler: its records make the heap grow, and operators then wait for fresh pages.
Triton's kernels are no operators and not listed; gradients are summed in new memory, not in place.
The bound of an operator is the longer of its FLOPs at this machine's rate of `torch.mm` and its
bytes (inputs, and an output as large as the largest) at its rate of copying.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import Job, dtype_of, gemm_rate, lengths_of, make_trainer, step_flops, wait

from fastlora.bert.config import BertConfig

STEPS, ROWS = 15, 40
PRODUCTS = {"aten.mm", "aten.addmm", "aten.addmm_", "aten.bmm", "aten.baddbmm"}
PACKED = "mkldnn._linear_pointwise"


class Calls(TorchDispatchMode):
    """The seconds of every call of an operator, by its name and its inputs' shapes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seconds = device, defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Call it, and note how long it took."""
        start = time.perf_counter()
        found = function(*args, **(kwargs or {}))
        wait(self.device)
        seconds = time.perf_counter() - start
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.seconds[str(function).rpartition(".")[0], shapes].append(seconds)
        return found


def flops_of(name: str, shapes: tuple) -> float:
    """Of a matrix product, from its inputs' shapes."""
    if name == PACKED:  # a packed weight does not say which way round it is
        return 2.0 * math.prod(shapes[0]) * math.prod(shapes[1]) / shapes[0][-1]
    if name not in PRODUCTS:
        return 0.0
    first, second = [shape for shape in shapes if len(shape) > 1][-2:]
    return 2.0 * math.prod(first) * second[-1]


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.empty(1 << 26, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="fastlora")
    parser.add_argument("--data", type=Path, help="folder of the CS224N files")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    options = parser.parse_args()
    job = Job(options.data, options.model, device=options.device, precision=options.precision)
    torch.set_num_threads(job.threads)
    trainer = make_trainer(options.name, job)
    config = BertConfig.from_json(trainer.setup.inputs.source.folder / "config.json")
    batch = trainer.plan(0)[0]
    lengths = lengths_of(trainer.setup.train, batch)
    tokens = lengths.sum()

    def step() -> float:
        start = time.perf_counter()
        trainer.step(batch)
        wait(trainer.device)
        trainer.progress.step += 1
        return time.perf_counter() - start

    for _ in range(3):
        step()
    steps, rates, calls = [], [], Calls(trainer.device)
    for _ in range(STEPS):  # in turns, for a machine has slow spells
        steps.append(step())
        with calls:
            step()
        rates.append(gemm_rate(config, int(tokens), trainer.device, dtype_of(trainer.setup)))
    plain, rate = statistics.median(steps), statistics.median(rates)
    bandwidth, width = copy_rate(trainer.device), dtype_of(trainer.setup).itemsize

    useful = step_flops(config, lengths, trainer.config.mode == "full")
    least = useful / rate
    print(f"{options.name}: {len(batch)} examples, {tokens} tokens, {1e3 * plain:.1f} ms a step")
    print(
        f"useful {useful / 1e9:.1f} GFLOP: {1e3 * least:.1f} ms at {rate / 1e9:.0f} GFLOP/s "
        f"(MFU {least / plain:.0%}); copies at {bandwidth / 1e9:.0f} GB/s"
    )
    print(f"{'ms':>8}{'bound':>8}{'calls':>7}  operator and its inputs")
    rows = []
    for (name, shapes), seconds in calls.seconds.items():
        sizes = [math.prod(shape) for shape in shapes] or [0]
        bound = max(flops_of(name, shapes) / rate, width * (sum(sizes) + max(sizes)) / bandwidth)
        count = len(seconds) / STEPS
        took = 1e3 * count * statistics.median(seconds)
        rows.append((took, 1e3 * count * bound, count, f"{name} {' '.join(map(str, shapes))}"))
    for took, bound, count, text in sorted(rows, reverse=True)[:ROWS]:
        print(f"{took:8.2f}{bound:8.2f}{count:7.0f}  {text}")
    print(f"{sum(row[0] for row in rows):8.2f}{'':15}  all operators, each timed by itself")


if __name__ == "__main__":
    main()
