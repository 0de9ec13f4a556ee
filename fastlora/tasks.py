"""Tasks: the columns of a file, what its labels mean, and the four built-in ones."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastlora.errors import UserError

SPLITS = ("train", "dev", "test")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


# The keys of a task's table: the type a value must have, and what turns it into the field.
_FIELDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "kind": (str, str),
    "columns": ((list, tuple), _texts),
    "label": (str, str),
    "labels": ((list, tuple), _texts),
    "low": ((int, float), float),
    "high": ((int, float), float),
    "files": (Mapping, lambda files: {str(split): str(file) for split, file in files.items()}),
}


@dataclass(frozen=True)
class Task:
    """One task: its text columns, label column, kind of label and file names.

    A classification task has `labels` (class names, in the order of the head's outputs); a
    regression task has a range `low` to `high`. Raises UserError when the fields disagree.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    label: str
    files: Mapping[str, str] = field(hash=False)
    labels: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a task that could not be read or trained."""
        if problem := _problem(self):
            raise UserError(f"task {self.name!r}: {problem}")

    @property
    def is_pair(self) -> bool:
        """Whether an example is two sentences."""
        return len(self.columns) == 2

    @property
    def outputs(self) -> int:
        """Width of the head: the number of classes, or 1."""
        return len(self.labels) or 1

    @property
    def metric(self) -> str:
        """Name of the score: "accuracy" or "pearson"."""
        return "accuracy" if self.kind == "classification" else "pearson"

    @cached_property
    def expected(self) -> str:
        """The legal labels in words, for messages."""
        if self.kind == "regression":
            return f"a number from {self.low:g} to {self.high:g}"
        if len(self.labels) > 10:
            return f"one of {', '.join(self.labels[:8])}, ... ({len(self.labels)} classes)"
        return f"{', '.join(self.labels[:-1])} or {self.labels[-1]}"

    @cached_property
    def _classes(self) -> dict[str | float, float]:
        return {_value(name): float(index) for index, name in enumerate(self.labels)}

    def parse_label(self, text: str) -> float:
        """Turn a label cell into a class index or a value in [low, high], else ValueError."""
        value = _value(text)
        if value in self._classes:
            return self._classes[value]
        in_range = isinstance(value, float) and self.low <= value <= self.high
        if self.kind == "classification" or not in_range:
            raise ValueError(f"{text!r} (expected {self.expected})")
        return float(value)

    def to_table(self) -> dict[str, Any]:
        """Give the task as the plain table that `task_from_table` reads back."""
        table: dict[str, Any] = {
            "kind": self.kind,
            "columns": list(self.columns),
            "label": self.label,
            "files": dict(self.files),
        }
        if self.kind == "classification":
            return {**table, "labels": list(self.labels)}
        return {**table, "low": self.low, "high": self.high}


def task_from_table(name: str, table: Mapping[str, Any]) -> Task:
    """Build a user's own task from its TOML table; anything unknown or ill-typed is a UserError."""
    where = f"task {name!r}"
    for key in table:
        if key not in _FIELDS:
            close = difflib.get_close_matches(key, _FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(_FIELDS)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    missing = [key for key in ("kind", "columns", "label", "files") if key not in table]
    if missing:
        raise UserError(f"{where}: key {missing[0]!r} is missing")
    values = {key: _typed(where, key, value) for key, value in table.items()}
    return Task(name=name, **values)


def _typed(where: str, key: str, value: Any) -> Any:
    kind, make = _FIELDS[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: key {key!r} has a value of the wrong type: {value!r}")
    return make(value)


def _value(text: str) -> str | float:
    """Give the number a label cell spells ("3", "3.0"), or else the text itself."""
    # float() also takes "1_0" and non-ASCII digits, which no label means.
    if "_" in text or not text.isascii():
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _problem(task: Task) -> str | None:
    if not _NAME.fullmatch(task.name):
        return "a name is a lower-case letter followed by lower-case letters, digits or _"
    if task.kind not in ("classification", "regression"):
        return f"kind is {task.kind!r} (expected classification or regression)"
    named = (*task.columns, task.label)
    if len(task.columns) not in (1, 2) or len(set(named)) < len(named) or not all(named):
        return "needs one or two text columns and a label column, all of different names"
    if not {"train", "dev"} <= set(task.files) <= set(SPLITS):
        return f"files has {', '.join(task.files) or 'none'} (expected train, dev and maybe test)"
    if task.kind == "regression":
        if task.labels or not -math.inf < task.low < task.high < math.inf:
            return "a regression needs low < high and no labels"
        return None
    distinct = {_value(name) for name in task.labels}
    if not 2 <= len(distinct) == len(task.labels) or task.low or task.high:
        return "a classification needs two or more different labels, and no low or high"
    return None


def _course(stem: str) -> dict[str, str]:
    return {split: f"{stem}-{split}.csv" for split in SPLITS}


_ONE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_DIGITS = ("0", "1", "2", "3", "4")
# The CS224N default project's tasks, under its own file and column names.
BUILTIN: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst", "classification", _ONE, "sentiment", _course("ids-sst"), _DIGITS),
        Task("cfimdb", "classification", _ONE, "sentiment", _course("ids-cfimdb"), _DIGITS[:2]),
        Task("quora", "classification", _PAIR, "is_duplicate", _course("quora"), _DIGITS[:2]),
        Task("sts", "regression", _PAIR, "similarity", _course("sts"), low=0.0, high=5.0),
    )
}
