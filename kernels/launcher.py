"""The one place that launches a kernel, so that tests can count, capture and compile launches."""

from __future__ import annotations

from typing import Any

from fastlora.kernels.tuning import Blocks


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    blocks: Blocks,
) -> None:
    """Run `kernel` on `grid`; an empty grid is no launch."""
    if all(grid):
        kernel[grid](**arguments, **constants, num_warps=blocks.warps, num_stages=blocks.stages)
