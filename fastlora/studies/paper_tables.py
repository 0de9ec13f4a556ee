"""The paper's tables as data: rows of settings, and the scores that the paper gives for them.

Rows train at this library's own learning rates (the paper's is not known), except each table's
last, at the 1e-5 of the course that the paper was written for. No torch here: mistakes are
answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastlora.training.config import DEFAULT_TASKS

RANKS, ALPHAS, DROPOUTS = (2, 4, 8, 16, 32, 64), (16, 32), (0.0, 0.05, 0.1, 0.2)
COURSE = "lr 1e-5"


@dataclass(frozen=True)
class Row:
    """A point (`setting`) on a line (`variant`) of the plot: what it changes, the paper's scores.

    `name` is its folder's.
    """

    name: str
    setting: str
    variant: str
    changes: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One of the paper's tables; `note` says what the paper leaves open."""

    title: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def _paper(*scores: float) -> dict[str, float]:
    return dict(zip(DEFAULT_TASKS, scores, strict=True))


def _course(name: str, setting: str, **changes: Any) -> Row:
    return Row(f"{name}-lr1e-5", setting, COURSE, {**changes, "lr": 1e-5, "head_lr": 1e-5})


# At alpha 16, r = 64 at alpha 32.
SHARED = {
    2: _paper(0.451, 0.681, 0.278),
    4: _paper(0.421, 0.681, 0.281),
    8: _paper(0.423, 0.677, 0.276),
    16: _paper(0.428, 0.654, 0.309),
    32: _paper(0.439, 0.679, 0.287),
    64: _paper(0.420, 0.686, 0.272),
}


def _shared_row(r: int, alpha: int) -> Row:
    paper = SHARED[r] if alpha == (32 if r == 64 else 16) else {}
    changes = {"r": r, "alpha": alpha}
    return Row(f"r{r}-alpha{alpha}", f"r={r}", f"alpha {alpha}", changes, paper)


def _task_table(task: str, best: float | None = None, at_dropout: float | None = None) -> Table:
    """One task's own adapter; of the paper only the best score and its dropout are known."""
    rows = [
        Row(
            f"r{r}-{'-'.join(targets)}-dropout{dropout:g}",
            f"r={r}",
            f"{' and '.join(targets)}, dropout {dropout:g}",
            {"adapters": "per-task", "r": r, "targets": targets, "dropout": dropout},
            {task: best} if best and len(targets) == 2 and dropout == at_dropout else {},
        )
        for targets in (("value",), ("query", "value"))
        for dropout in DROPOUTS
        for r in RANKS
    ]
    note = "The paper's number is not known."
    if best:
        note = (
            f"The paper's best is {best:.3f}, on query and value with dropout {at_dropout:g}; its "
            "rank is not known, so it stands beside each rank."
        )
    course = _course("r8", "r=8", adapters="per-task")
    return Table(f"an adapter for {task} alone", (task,), (*rows, course), note)


TABLES = {
    "table1": Table(
        "frozen encoder and full fine-tuning",
        DEFAULT_TASKS,
        (
            Row("frozen", "frozen", "heads", {"mode": "frozen"}, _paper(0.447, 0.692, 0.277)),
            Row("full", "full", "fine-tuning", {"mode": "full"}, _paper(0.405, 0.761, 0.168)),
            Row("lora-r8", "LoRA", "shared, r=8", {}, SHARED[8]),
            _course("full", "full", mode="full"),
        ),
    ),
    "table2": Table(
        "one LoRA adapter for all tasks, on query and value",
        DEFAULT_TASKS,
        (*(_shared_row(r, alpha) for r in RANKS for alpha in ALPHAS), _course("r8", "r=8")),
    ),
    "table3": _task_table("sst", 0.452, 0.1),
    "table4": _task_table("quora", 0.702, 0.2),
    "table5": _task_table("sts"),
}
