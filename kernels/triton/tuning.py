"""Block sizes per (capability, dtype, number of rows).

A table replaces Triton's autotuning, which would measure in the user's first step and give other
results each time. The shipped rows are guesses; what `fastlora tune` measures takes precedence.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

SMALL = 2048  # calls with fewer rows are in the bucket "small"
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Blocks:
    """A kernel's tile: rows, columns, depth; warps and stages."""

    m: int = 64
    n: int = 64
    k: int = 64
    warps: int = 4
    stages: int = 2


# Two programs a multiprocessor (see `programs`) must have enough loads on their way.
OUTER = Blocks(m=32, k=128, warps=8)


@dataclass(frozen=True)
class Config:
    """The blocks of each kernel."""

    down: Blocks = Blocks()
    add: Blocks = Blocks()
    outer: Blocks = OUTER


# By "capability/dtype", "capability/bucket" or "capability"; the row for any GPU is "any".
SHIPPED = {
    "any": Config(),
    # fp32 has no tensor cores, so tiles are smaller and accumulators stay in registers.
    "any/fp32": Config(down=Blocks(32, k=32), add=Blocks(32, 32), outer=Blocks(16, k=16, warps=8)),
    # One stage: Turing cannot copy to shared memory in the background (see turing.py).
    "75/fp16": Config(Blocks(m=32, stages=1), Blocks(stages=1), replace(OUTER, stages=1)),
    **dict.fromkeys(("80/small", "90/small"), Config(down=Blocks(m=32))),
    **dict.fromkeys(("80", "90"), Config(down=Blocks(stages=3))),
}
MEASURED: dict[str, Config] = {}  # by `key_of`; takes precedence over the shipped rows


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """A GPU's capability as 75, 80, 90; 0 for anything else."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def programs(device: torch.device) -> int:
    """Programs that a GPU runs at once: two on each multiprocessor. On a CPU, for tests, 8."""
    cuda = device.type == "cuda"
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if cuda else 8


def key_of(capability: int, dtype: torch.dtype, rows: int) -> str:
    """The table's key of a call: "90/fp16/large"."""
    return f"{capability}/{DTYPE_NAMES[dtype]}/{'small' if rows < SMALL else 'large'}"


def config(capability: int, dtype: torch.dtype, rows: int) -> Config:
    """The row of the user's measurements, or else the nearest shipped row."""
    chip, name, bucket = (key := key_of(capability, dtype, rows)).split("/")
    nearest = (key, f"{chip}/{name}", f"any/{name}", f"{chip}/{bucket}", chip, "any")
    return next(table[row] for row in nearest for table in (MEASURED, SHIPPED) if row in table)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict, constants: dict, blocks: Blocks
) -> None:
    """Run `kernel` on `grid`. All launches come here, so that tests can count and capture them."""
    if all(grid):
        first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
        from fastlora.kernels.triton import turing

        # Triton launches on the current device.
        with torch.cuda.device_of(first), turing.compiling(capability(first.device)):
            kernel[grid](**arguments, **constants, num_warps=blocks.warps, num_stages=blocks.stages)
