"""The paper's tables as data: rows of settings, and the scores that the paper gives for them.

The paper adapts query and value, and does not give its learning rate: adapters train at 2e-3, and
the last row of each table at 1e-5, the rate of the course that the paper was written for.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from fastlora.training.config import DEFAULT_TASKS

RANKS, ALPHAS, DROPOUTS = (2, 4, 8, 16, 32, 64), (16, 32), (0.0, 0.05, 0.1, 0.2)
LORA = {"targets": ("query", "value"), "lr": 2e-3}
COURSE, COURSE_RATES = "lr 1e-5", {"lr": 1e-5, "head_lr": 1e-5}


class Row(NamedTuple):
    """What a row changes in a configuration, and the paper's scores by task.

    Its runs are in the folder `name`. In the plot, it is the point `setting` of the line `variant`.
    """

    name: str
    setting: str
    variant: str
    changes: Mapping[str, Any] = {}
    paper: Mapping[str, float] = {}


class Table(NamedTuple):
    """One of the paper's tables."""

    title: str
    tasks: tuple[str, ...]
    rows: list[Row]


def _paper(*scores: float) -> dict[str, float]:
    return dict(zip(DEFAULT_TASKS, scores, strict=True))


SHARED = {  # by rank and alpha
    (2, 16): _paper(0.451, 0.681, 0.278),
    (4, 16): _paper(0.421, 0.681, 0.281),
    (8, 16): _paper(0.423, 0.677, 0.276),
    (16, 16): _paper(0.428, 0.654, 0.309),
    (32, 16): _paper(0.439, 0.679, 0.287),
    (64, 32): _paper(0.420, 0.686, 0.272),
}
SHARED_ROWS = [
    Row(f"r{r}-alpha{a}", f"r={r}", f"alpha {a}", LORA | {"r": r, "alpha": a}, paper)
    for r, a in product(RANKS, ALPHAS)
    for paper in [SHARED.get((r, a), {})]
]


def _task_table(task: str, paper: float = 0.0, paper_dropout: float = 0.0) -> Table:
    """The rows of one task's adapter; `paper` is the best score, which is for query and value."""
    rows, alone = [], LORA | {"adapters": "per-task"}
    for targets, dropout, r in product((("value",), ("query", "value")), DROPOUTS, RANKS):
        known = paper > 0 and len(targets) == 2 and dropout == paper_dropout
        name = f"r{r}-{'-'.join(targets)}-dropout{dropout:g}"
        variant = f"{' and '.join(targets)}, dropout {dropout:g}"
        changes = {**alone, "r": r, "targets": targets, "dropout": dropout}
        rows.append(Row(name, f"r={r}", variant, changes, {task: paper} if known else {}))
    rows.append(Row("r8-lr1e-5", "r=8", COURSE, alone | COURSE_RATES))
    return Table(f"an adapter for {task} alone", (task,), rows)


TABLES = {
    "table1": Table(
        "frozen encoder and full fine-tuning",
        DEFAULT_TASKS,
        [
            Row("frozen", "frozen", "heads", {"mode": "frozen"}, _paper(0.447, 0.692, 0.277)),
            Row("full", "full", "fine-tuning", {"mode": "full"}, _paper(0.405, 0.761, 0.168)),
            Row("lora-r8", "LoRA", "shared, r=8", LORA, SHARED[8, 16]),
            Row("full-lr1e-5", "full", COURSE, {"mode": "full", **COURSE_RATES}),
        ],
    ),
    "table2": Table(
        "one LoRA adapter for all tasks, on query and value",
        DEFAULT_TASKS,
        [*SHARED_ROWS, Row("r8-lr1e-5", "r=8", COURSE, LORA | COURSE_RATES)],
    ),
    "table3": _task_table("sst", 0.452, 0.1),
    "table4": _task_table("quora", 0.702, 0.2),
    "table5": _task_table("sts"),
}
