"""Logs the metrics of a run's steps to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlora.files import atomic_open, read_content

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl and TensorBoard scalars of one run (the curves of the paper's Figure 1).

    On resuming at `step`, lines of an interrupted run after it are removed, and so are evaluations
    after step `scored`. `note` is called with a line if damaged lines are left out.
    """

    def __init__(
        self, folder: Path, step: int, note: Callable = str, scored: float = math.inf
    ) -> None:
        # Imported here, because TensorBoard takes a second and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        text = read_content(path).decode(errors="replace") if path.exists() else ""
        # The last line may be incomplete, if the process was killed.
        entries = [_entry(line) for line in text.split("\n")[:-1]]
        if damaged := entries.count(None):
            note(f"{path}: damaged lines are left out ({damaged})")
        with atomic_open(path) as out:
            for entry in filter(None, entries):
                if entry["step"] <= (scored if "dev" in entry else step):
                    out.write(json.dumps(entry) + "\n")
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log values at a step; nested tables become TensorBoard groups."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            group = value if isinstance(value, dict) else {"": value}
            for key, scalar in group.items():
                if isinstance(scalar, (int, float)):
                    self.board.add_scalar(f"{name}/{key}" if key else name, scalar, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.file.close()
        self.board.close()


def _entry(line: str) -> dict[str, Any] | None:
    """The values in a line of metrics.jsonl, or None if it is damaged."""
    try:
        entry = json.loads(line)
        whole = type(entry["step"]) is int and isinstance(entry.get("loss", {}), dict)
        return entry if whole else None
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return None
