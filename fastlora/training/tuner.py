"""`fastlora tune`: measures block sizes on this machine's GPU, for later runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastlora.errors import UserError, in_place_of
from fastlora.files import cache_folder, read_json, write_json
from fastlora.kernels import Term, forced_route, lora_grouped
from fastlora.kernels.triton import tuning

ROWS = (512, 8192)  # one in each of the ranges of rows that have block sizes of their own
WIDTH, RANK = 768, 32
TILES = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128))


def tuned_file() -> Path:
    """Where `fastlora tune` keeps what it measured."""
    return cache_folder() / "blocks.json"


def use_measured_blocks() -> None:
    """Load what `fastlora tune` measured, if it ran here; UserError for a damaged file."""
    if os.path.isfile(tuned_file()):  # which is False without permissions, too
        load(tuned_file())


def tune(device: torch.device, dtype: torch.dtype, report: Callable[[str], None]) -> Path:
    """Measure the fastest blocks of each kernel on a CUDA device.

    It times forward and backward of BERT's query, key and value, and calls `report` with a line on
    each choice. Returns the file of the choices, which also has those of earlier measurements.
    """
    use_measured_blocks()
    capability = tuning.capability(device)
    for rows in ROWS:
        key = tuning.key_of(capability, dtype, rows)
        best = tuning.config(capability, dtype, rows)
        for kernel in ("down", "outer", "add"):
            # The kernel `add` runs where some rows have no term.
            run, given = _problem(rows, kernel == "add", device, dtype), getattr(best, kernel)
            second = "n" if kernel == "add" else "k"
            sizes = [{"m": m, second: size} for m, size in TILES]
            others = [replace(given, **size, warps=w) for size in sizes for w in (4, 8)]
            trials = {b: replace(best, **{kernel: b}) for b in (given, *others)}
            times = {b: _time(run, key, row) for b, row in trials.items()}
            choice = min(times, key=times.__getitem__)
            best = replace(best, **{kernel: choice})
            report(f"{key} {kernel}: {choice} {times[choice]:.3f} ms (was {times[given]:.3f})")
        tuning.MEASURED[key] = best
    write_json(tuned_file(), {key: asdict(row) for key, row in tuning.MEASURED.items()})
    return tuned_file()


def load(file: Path) -> None:
    """Load a file that `tune` wrote, in place of built-in choices; UserError for another file."""
    wrong = (ValueError, KeyError, TypeError, AttributeError)
    with in_place_of(wrong, UserError, f"{file}: not a table of block sizes; delete it: "):
        for key, row in read_json(file).items():
            kernels = {name: tuning.Blocks(**row[name]) for name in ("down", "add", "outer")}
            tuning.MEASURED[key] = tuning.Config(**kernels)


def _problem(
    rows: int, without: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    x = torch.randn(rows, WIDTH, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(3 * WIDTH, WIDTH, device=device, dtype=dtype)
    A = [torch.randn(RANK, WIDTH, device=device, requires_grad=True) for _ in range(2)]
    B = [torch.randn(WIDTH, RANK, device=device, requires_grad=True) for _ in range(2)]
    terms = [Term(A[i], B[i], 0.5, 0.1, i, 0, rows - without, 2 * i * WIDTH) for i in (0, 1)]

    def run() -> object:
        y = lora_grouped(x, weight, None, terms)
        return torch.autograd.grad(y, [x, *A, *B], y)

    return run


def _time(run: Callable[[], object], key: str, row: tuning.Config) -> float:
    """Median milliseconds, or infinity for blocks that need more shared memory than there is."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    tuning.MEASURED[key] = row
    with forced_route("gemm"):
        try:
            return do_bench(run, return_mode="median")
        except OutOfResources:
            return float("inf")
