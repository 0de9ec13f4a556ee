"""The ratio table at the end of `pytest bench/ --benchmark-only`, and what it is made of.

Each benchmark times the unfused reference in the set-up of each of its rounds, so both sides of
a ratio see the same machine in the same seconds.
"""

import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from implementations import PLACES
from race import Contender
from trainers import Job

ROUNDS = {"cpu": 7, "cuda": 50}


def pytest_addoption(parser):
    """What the training benchmarks train on."""
    parser.addoption("--data", type=Path, help="folder of the CS224N files; else ./data or demo")
    parser.addoption("--model", default="minilm", help="folder, hub id or minilm")
    parser.addoption("--precision", help="fp32, fp16 or bf16; else fp32 on a CPU, fp16 on a GPU")
    parser.addoption("--tokens-per-batch", type=int, default=1024, help="of a training step")


@pytest.fixture(scope="session", params=PLACES, ids=lambda place: place[0])
def job(request):
    """The training benchmarks' work on each device."""
    device, dtype = request.param
    option = request.config.option
    precision = option.precision or {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    tokens = option.tokens_per_batch
    limit = Job.limit * max(1, tokens // Job.tokens)  # as many batches, or more
    return Job(option.data, option.model, limit, tokens, device=device, precision=precision)


@pytest.fixture(scope="session")
def fastlora(job):
    """This library's trainer, in a process that all benchmarks of a device share."""
    with Contender("fastlora", job) as contender:
        yield contender


def timed(function):
    """Seconds that a call takes, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark):
    """Benchmark `ours` against `reference`, both functions without arguments, in turns."""

    def run(group, reference, ours, device, rounds=None, **facts):
        times = []
        reference(), ours()  # first calls pay for compiling, packing and buffers
        benchmark.group = group
        benchmark.pedantic(
            lambda: timed(ours),
            setup=lambda: times.append(timed(reference)),
            rounds=rounds or ROUNDS[device],
        )
        found = benchmark.stats.stats.data
        ratios = [a / b for a, b in zip(times, found, strict=True)]
        benchmark.extra_info.update(
            ratio=statistics.median(ratios),
            low=sorted(ratios)[len(ratios) // 4],
            high=sorted(ratios)[-1 - len(ratios) // 4],
            milliseconds=1e3 * statistics.median(found),
            **facts,
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    """Print ratios to the unfused reference by group, and their geometric means."""
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if "ratio" in bench.extra_info:
            groups[bench.group].append(bench.extra_info)
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios [quartiles of paired rounds]; layers: to the unfused form")
    means = defaultdict(list)
    for group, entries in groups.items():
        write(group)
        for e in entries:
            if not e["agrees"]:
                write(f"  {e['name']:<20} outputs or gradients differ from the reference: no ratio")
                continue
            means[group.partition(":")[0], e["name"]].append(e["ratio"])
            peak = f"  peak {e['peak'] / 2**20:.0f} MiB" if e.get("peak") else ""
            saved = f"  saved {e['saved']:.2f}x of x" if "saved" in e else ""
            took = f"{e['milliseconds']:9.3f} ms  " if "milliseconds" in e else ""
            write(
                f"  {e['name']:<20} {took}{e['ratio']:5.2f}x "
                f"[{e['low']:.2f}, {e['high']:.2f}]{saved}{peak}"
            )
            for note in e.get("notes", ()):
                write(f"    {note}")
    write("geometric mean and least, by benchmark")
    for (kind, name), ratios in means.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        write(f"  {kind:<22} {name:<20} {mean:5.2f}x  least {min(ratios):.2f}x")
    if not torch.cuda.is_available():
        write("no CUDA GPU here: route gemm not measured")
