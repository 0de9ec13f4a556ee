"""What a run logs at its steps: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastlora.files import atomic_open


class Metrics:
    """metrics.jsonl and TensorBoard scalars of one run (the curves of the paper's Figure 1).

    On resuming at `step`, what an interrupted run logged beyond it is cut away.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: TensorBoard takes a second that only training should pay.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        with atomic_open(path) as out:
            # A killed process can leave half a line, only ever the last one.
            for line in text[: text.rfind("\n") + 1].splitlines():
                if json.loads(line)["step"] <= step:
                    out.write(line + "\n")
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
