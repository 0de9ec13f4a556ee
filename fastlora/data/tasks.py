"""Tasks: the columns of a file, what its labels mean, and the four built-in ones."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from fastlora.errors import UserError

SPLITS = ("train", "dev", "test")
# The keys of a task's table.
_COMMON = ("kind", "columns", "label", "files")
_KEYS = {"classification": (*_COMMON, "labels"), "regression": (*_COMMON, "low", "high")}
# Narrower than float(), which also takes "nan", "1_0" and non-ASCII digits.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """One task; `task_from_table` is the way in that checks."""

    name: str
    kind: str  # "classification" or "regression"
    columns: tuple[str, ...]  # one or two columns of text
    label: str  # the label's column
    files: Mapping[str, str] = field(hash=False)  # by split
    labels: tuple[str, ...] = ()  # the classes' names, in the order of the head's outputs
    low: float = 0.0  # the range of a regression's labels
    high: float = 0.0

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

    @property
    def expected(self) -> str:
        """The legal labels in words, for messages."""
        if self.kind == "regression":
            low, high = (repr(end).removesuffix(".0") for end in (self.low, self.high))
            return f"a number from {low} to {high}"
        return f"{', '.join(self.labels[:-1])} or {self.labels[-1]}"

    @cached_property
    def _classes(self) -> dict[str | float, float]:
        return {_value(name): float(index) for index, name in enumerate(self.labels)}

    def parse_label(self, text: str) -> float:
        """Turn a label cell into a class index or a value in [low, high], else ValueError."""
        value = _value(text)
        label = self._classes.get(value)
        if self.kind == "regression" and isinstance(value, float):
            label = value if self.low <= value <= self.high else None
        if label is None:
            raise ValueError(f"column {self.label!r} is {text!r} (expected {self.expected})")
        return label

    def to_table(self) -> dict[str, Any]:
        """Give the task as the plain table that `task_from_table` reads back."""
        return {key: value for key, value in asdict(self).items() if key in _KEYS[self.kind]}


def task_from_table(name: str, table: Mapping[str, Any]) -> Task:
    """Build a user's own task from its TOML table; anything unknown or ill-typed is a UserError."""

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"task {name!r}: {key} is {table.get(key)!r} (expected {expected})")

    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == "default":  # the shared adapter's
        raise UserError(f"task {name!r}: expected another name of lower-case letters, digits and _")
    get: Callable[[str], Any] = table.get
    kind, columns, label, files, labels, low, high = map(get, (*_COMMON, "labels", "low", "high"))
    check("kind", kind in tuple(_KEYS), "classification or regression")
    for key in table:
        if key not in _KEYS[kind]:
            known = ", ".join(_KEYS[kind])
            raise UserError(f"task {name!r}: unknown key {key!r} (expected {known})")
    check("columns", _distinct(columns) and len(columns) in (1, 2), "one or two text columns")
    check("label", isinstance(label, str) and label not in columns, "another column's name")
    splits = set(files) if isinstance(files, Mapping) else set()
    check("files", {"train", "dev"} <= splits <= set(SPLITS), "files for train, dev, maybe test")
    paths = [PurePath(file) for file in files.values() if isinstance(file, str)]
    inside = len(paths) == len(files) and not any(p.anchor or ".." in p.parts for p in paths)
    check("files", inside, "paths inside the data folder, not absolute and without '..'")
    if kind == "classification":
        check("labels", _distinct(labels) and len(labels) > 1, "two or more different classes")
        own: dict[str, Any] = {"labels": tuple(map(str, labels))}
    else:
        # JSON and TOML also hold integers that are too large for any float.
        check("low", type(low) in (int, float) and abs(low) < 1e38, "a number")
        check("high", type(high) in (int, float) and low < high < 1e38, "more than low")
        own = {"low": float(low), "high": float(high)}
    return Task(name, kind, tuple(map(str, columns)), label, dict(files), **own)


def _distinct(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and len({_value(str(n)) for n in names}) == len(names)


def _value(text: str) -> str | float:
    """Give the number a label cell spells ("3", "3.0"), or else the text itself."""
    text = text.strip()
    return float(text) if _NUMBER.fullmatch(text) else text


def sampling_exponent(sampling: str) -> float:
    """The power of the number of a task's examples that its share of a batch is proportional to.

    `sampling` is "proportional", "sqrt", "uniform", or a temperature T as text, for the power 1 / T
    (Raffel et al. 2020). Raises UserError for another text.
    """
    named = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
    if sampling in named:
        return named[sampling]
    temperature = _value(sampling)
    if not isinstance(temperature, float) or temperature <= 0:
        expected = f"{', '.join(named)} or a positive number"
        raise UserError(f"sampling is {sampling!r} (expected {expected})")
    return 1 / temperature


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
