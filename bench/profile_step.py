"""Where a training step goes, by operator, against what FLOPs and bytes allow.

    python bench/profile_step.py --data data/ [--precision bf16] [NAME]

NAME is a contender of trainers.py, by default fastlora. One batch of SST, Quora and STS is trained
again and again; an operator's time is the median over steps of its calls on one shape, so that a
slow spell of the machine does not count. The bound of an operator is the longer of its FLOPs at
this machine's rate of `torch.mm` and its bytes (inputs, and an output as large as the largest) at
its rate of copying.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from trainers import Job, gemm_rate, lengths_of, make_trainer, step_flops

from fastlora.bert.config import BertConfig

STEPS, ROWS = 15, 30
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise"}


def flops_of(name: str, shapes: list) -> float:
    """Of a matrix product, from its inputs' shapes."""
    if name not in PRODUCTS:
        return 0.0
    first, second = [s for s in shapes if len(s) > 1][-2:]
    if name.startswith("mkldnn"):  # a packed weight does not say which way round it is
        return 2.0 * math.prod(first) * max(second[0], math.prod(second) // first[-1])
    return 2.0 * math.prod(first) * second[-1]


def copy_rate() -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.empty(1 << 26)
    target, times = torch.empty_like(source), []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="fastlora")
    parser.add_argument("--data", type=Path, help="folder of the CS224N files")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    job = Job(options.data, options.model, precision=options.precision)
    torch.set_num_threads(job.threads)
    trainer = make_trainer(options.name, job)
    config = BertConfig.from_json(trainer.setup.inputs.source.folder / "config.json")
    batch = trainer.plan(0)[0]
    lengths = lengths_of(trainer.setup.train, batch)
    tokens = lengths.sum()

    def step() -> float:
        start = time.perf_counter()
        trainer.step(batch)
        trainer.progress.step += 1
        return time.perf_counter() - start

    for _ in range(3):
        step()
    plain = statistics.median(step() for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
    rate = gemm_rate(config, int(tokens), trainer.device, trainer.setup.dtype)
    bandwidth = copy_rate()

    calls, width = defaultdict(list), trainer.setup.dtype.itemsize
    for event in profiler.events():
        calls[event.name, str(event.input_shapes)].append(event)
    totals = defaultdict(lambda: [0.0, 0.0, 0.0])
    for (name, _), events in calls.items():
        shapes = [shape for shape in events[0].input_shapes if shape]
        sizes = [math.prod(shape) for shape in shapes] or [0]
        bound = max(flops_of(name, shapes) / rate, width * (sum(sizes) + max(sizes)) / bandwidth)
        count = len(events) / STEPS
        entry = totals[name]
        entry[0] += count
        entry[1] += count * statistics.median(e.self_cpu_time_total for e in events) / 1e3
        entry[2] += count * bound * 1e3
    useful = step_flops(config, lengths, trainer.config.mode == "full")
    print(f"{options.name}: {len(batch)} examples, {tokens} tokens, {1e3 * plain:.0f} ms a step")
    least = useful / rate
    print(
        f"useful {useful / 1e9:.1f} GFLOP: {1e3 * least:.0f} ms at {rate / 1e9:.0f} GFLOP/s "
        f"(MFU {least / plain:.0%}); copies at {bandwidth / 1e9:.0f} GB/s"
    )
    print(f"{'operator':44}{'calls':>7}{'ms':>9}{'bound ms':>10}")
    for name, (count, took, bound) in sorted(totals.items(), key=lambda t: -t[1][1])[:ROWS]:
        known = f"{bound:10.2f}" if "::" in name else ""
        print(f"{name[:43]:44}{count:7.0f}{took:9.2f}{known}")
    seen = sum(took for _, took, _ in totals.values())
    print(f"{'all operators, under the profiler':51}{seen:9.2f}")


if __name__ == "__main__":
    main()
