"""The paper's tables as data: rows of settings, and the scores that the paper gives for them.

The paper does not give its learning rate, so rows use this library's default. The last row of each
table uses 1e-5, the rate of the course that the paper was written for. This module does not import
PyTorch, so that a mistake in a command is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from fastlora.training.config import DEFAULT_TASKS

RANKS, ALPHAS, DROPOUTS = (2, 4, 8, 16, 32, 64), (16, 32), (0.0, 0.05, 0.1, 0.2)
COURSE = "lr 1e-5"


class Row(NamedTuple):
    """The settings that a row changes in a configuration, and the paper's scores by task.

    Its runs are in the folder `name`. In the plot, it is the point `setting` of the line `variant`.
    """

    name: str
    setting: str
    variant: str
    changes: Mapping[str, Any] = {}
    paper: Mapping[str, float] = {}


class Table(NamedTuple):
    """One of the paper's tables; `note` tells what the paper does not say."""

    title: str
    tasks: tuple[str, ...]
    rows: list[Row]
    note: str = ""


def _paper(*scores: float) -> dict[str, float]:
    return dict(zip(DEFAULT_TASKS, scores, strict=True))


def _course(name: str, setting: str, **changes: Any) -> Row:
    return Row(f"{name}-lr1e-5", setting, COURSE, {**changes, "lr": 1e-5, "head_lr": 1e-5})


SHARED = {  # by rank and alpha
    (2, 16): _paper(0.451, 0.681, 0.278),
    (4, 16): _paper(0.421, 0.681, 0.281),
    (8, 16): _paper(0.423, 0.677, 0.276),
    (16, 16): _paper(0.428, 0.654, 0.309),
    (32, 16): _paper(0.439, 0.679, 0.287),
    (64, 32): _paper(0.420, 0.686, 0.272),
}


def _shared_row(r: int, alpha: int) -> Row:
    changes, paper = {"r": r, "alpha": alpha}, SHARED.get((r, alpha), {})
    return Row(f"r{r}-alpha{alpha}", f"r={r}", f"alpha {alpha}", changes, paper)


def _task_row(task: str, targets: tuple[str, ...], dropout: float, r: int) -> Row:
    best, at_dropout = BEST.get(task, (0.0, None))
    known = len(targets) == 2 and dropout == at_dropout
    return Row(
        f"r{r}-{'-'.join(targets)}-dropout{dropout:g}",
        f"r={r}",
        f"{' and '.join(targets)}, dropout {dropout:g}",
        {"adapters": "per-task", "r": r, "targets": targets, "dropout": dropout},
        {task: best} if known else {},
    )


def _task_table(task: str) -> Table:
    settings = product((("value",), ("query", "value")), DROPOUTS, RANKS)
    rows = [_task_row(task, *values) for values in settings]
    note = "The paper gives its best score with the dropout but not the rank: each rank shows it."
    rows.append(_course("r8", "r=8", adapters="per-task"))
    return Table(f"an adapter for {task} alone", (task,), rows, note if task in BEST else "")


BEST = {"sst": (0.452, 0.1), "quora": (0.702, 0.2)}  # score and dropout, for query and value
TABLES = {
    "table1": Table(
        "frozen encoder and full fine-tuning",
        DEFAULT_TASKS,
        [
            Row("frozen", "frozen", "heads", {"mode": "frozen"}, _paper(0.447, 0.692, 0.277)),
            Row("full", "full", "fine-tuning", {"mode": "full"}, _paper(0.405, 0.761, 0.168)),
            Row("lora-r8", "LoRA", "shared, r=8", {}, SHARED[8, 16]),
            _course("full", "full", mode="full"),
        ],
    ),
    "table2": Table(
        "one LoRA adapter for all tasks, on query and value",
        DEFAULT_TASKS,
        [*(_shared_row(*values) for values in product(RANKS, ALPHAS)), _course("r8", "r=8")],
    ),
    "table3": _task_table("sst"),
    "table4": _task_table("quora"),
    "table5": _task_table("sts"),
}
