"""Tasks: the columns of a file, what its labels mean, and the four built-in ones."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from fastlora.errors import UserError

SPLITS = ("train", "dev", "test")
# The metrics of each kind of task, its default first. "f1:NAME" is the F1 of one class.
METRICS = {
    "classification": ("accuracy", "macro_f1", "matthews"),
    "multilabel": ("macro_f1", "micro_f1"),
    "regression": ("pearson", "spearman"),
}
# The keys of a task's table.
_COMMON = ("kind", "columns", "label", "files")
_INFERRED = ("labels", "low", "high")  # from the files, where the table leaves them out
_OPTIONAL = ("metric", "weight", "dev_share")
_KEYS = {
    "classification": (*_COMMON, "labels", "class_weights", *_OPTIONAL),
    "multilabel": (*_COMMON, "labels", *_OPTIONAL),
    "regression": (*_COMMON, "low", "high", *_OPTIONAL),
}
_MOST_NAMES = 12  # of classes in a message
# Narrower than float(), which also takes "nan", "1_0" and non-ASCII digits.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """One task; `task_from_table` checks a table and builds one from it.

    Raises UserError where `metric` or `class_weights` name a class that is none of `labels`.
    """

    name: str
    kind: str  # "classification", "multilabel" or "regression"
    columns: tuple[str, ...]  # one or two columns of text
    label: str  # the label's column
    files: Mapping[str, str] = field(hash=False)  # by split
    labels: tuple[str, ...] = ()  # the classes' names, in the order of the head's outputs
    low: float = 0.0  # the range of a regression's labels
    high: float = 0.0
    metric: str = ""  # the score's name; by default the first of METRICS
    class_weights: str | Mapping[str, float] | None = field(default=None, hash=False)  # or "auto"
    weight: float = 1.0  # factor of the task's share of the examples of an epoch
    dev_share: float | None = None  # of the training file, where there is no dev file

    def __post_init__(self) -> None:
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        weighted = self.class_weights if isinstance(self.class_weights, Mapping) else {}
        named = [*weighted, *self.metric.split("f1:", 1)[1:]]
        if unknown := [name for name in named if self.labels and self.class_of(name) is None]:
            raise UserError(
                f"task {self.name!r}: {unknown[0]!r} is no class (expected {_listed(self.labels)})"
            )

    @property
    def is_pair(self) -> bool:
        """Whether an example is two sentences."""
        return len(self.columns) == 2

    @property
    def is_complete(self) -> bool:
        """Whether the classes, or the range, are known."""
        return bool(self.labels) or self.low < self.high

    @property
    def outputs(self) -> int:
        """Width of the head: the number of classes, or 1."""
        return len(self.labels) or 1

    @property
    def expected(self) -> str:
        """The legal labels in words, for messages."""
        if self.kind == "regression":
            low, high = (repr(end).removesuffix(".0") for end in (self.low, self.high))
            return f"a number from {low} to {high}"
        names = _listed(self.labels)
        return names if self.kind == "classification" else f"{names}, several as a|b"

    @property
    def description(self) -> str:
        """The task in words, for a run's banner."""
        dev = self.files.get("dev", f"{self.dev_share or 0:.0%} of {self.files.get('train')}")
        what = f"{self.label} ({self.expected}) from {' and '.join(self.columns)}"
        return f"{self.name}: {self.kind}, {what}; metric {self.metric}; dev split: {dev}"

    @cached_property
    def _classes(self) -> dict[str | float, int]:
        return {label_value(name): index for index, name in enumerate(self.labels)}

    def class_of(self, name: str) -> int | None:
        """The index of a class, or None; "1.0" names the class "1", too."""
        return self._classes.get(label_value(name))

    def parse_label(self, text: str) -> float | tuple[float, ...]:
        """Turn a label cell into a class index, a value in [low, high], or 0 or 1 for each class.

        Raises ValueError for another cell.
        """
        value = label_value(text)
        label: float | None = None
        if self.kind == "multilabel":
            found = {self.class_of(name) for name in split_names(text)}
            if None not in found:
                return tuple(float(index in found) for index in range(len(self.labels)))
        elif self.kind == "classification":
            label = self._classes.get(value)
        elif isinstance(value, float) and self.low <= value <= self.high:
            label = value
        if label is None:
            raise ValueError(f"column {self.label!r} is {text!r} (expected {self.expected})")
        return float(label)

    def to_table(self) -> dict[str, Any]:
        """Return the task as the plain table that `task_from_table` reads."""
        keys = [key for key in _KEYS[self.kind] if self.is_complete or key not in _INFERRED]
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


def task_from_table(name: str, table: Mapping[str, Any]) -> Task:
    """Build a user's own task from its TOML table; UserError for what is unknown or ill-typed.

    The task is not complete if the table leaves out `labels`, or `low` and `high`.
    """

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"task {name!r}: {key} is {table.get(key)!r} (expected {expected})")

    check_name(name)
    get: Callable[[str], Any] = table.get
    kind, columns, label = map(get, ("kind", "columns", "label"))
    check("kind", kind in tuple(_KEYS), "classification, multilabel or regression")
    for key in table:
        if key not in _KEYS[kind]:
            known = ", ".join(_KEYS[kind])
            raise UserError(f"task {name!r}: unknown key {key!r} (expected {known})")
    check("columns", _distinct(columns) and len(columns) in (1, 2), "one or two text columns")
    check("label", isinstance(label, str) and label not in columns, "another column's name")
    _check_files(table, check)
    own = {**_labels_or_range(table, check), **_optional(table, check)}
    return Task(name, kind, tuple(map(str, columns)), label, dict(table["files"]), **own)


def check_name(name: str) -> None:
    """Raise UserError for what is no name of a user's own task."""
    # Files are named after tasks, and the shared adapter is called "default".
    if not re.fullmatch("[a-z][a-z0-9_]{0,99}", name) or name == "default":
        expected = "another name of at most 100 lower-case letters, digits and _, a letter first"
        raise UserError(f"task {name!r:.99}: expected {expected}")


_Check = Callable[[str, bool, str], None]


def _check_files(table: Mapping[str, Any], check: _Check) -> None:
    files, share = table.get("files"), table.get("dev_share")
    ok = share is None or (_is_positive(share) and share < 1)
    check("dev_share", ok, "a share between 0 and 1")
    splits = set(files) if isinstance(files, Mapping) else set()
    needed, how = {"train", "dev"}, "files for train, dev, maybe test; or dev_share without dev"
    if share is not None:
        needed, how = {"train"}, "files for train, maybe test, and none for dev beside dev_share"
    check("files", needed <= splits <= needed | {"test"}, how)
    assert isinstance(files, Mapping)
    paths = [PurePath(file) for file in files.values() if isinstance(file, str)]
    inside = len(paths) == len(files) and not any(p.anchor or ".." in p.parts for p in paths)
    check("files", inside, "paths inside the data folder, not absolute and without '..'")


def _labels_or_range(table: Mapping[str, Any], check: _Check) -> dict[str, Any]:
    """Check a table's `labels`, or `low` and `high`; returns them in a Task's types."""
    get: Callable[[str], Any] = table.get
    labels, low, high = map(get, _INFERRED)
    if labels is low is high is None:
        return {}
    if table["kind"] != "regression":
        check("labels", _distinct(labels) and len(labels) > 1, "two or more different classes")
        names = tuple(map(label_text, labels))
        apart = table["kind"] == "classification" or all([n] == split_names(n) for n in names)
        check("labels", apart, "names without |, which separates them")
        return {"labels": names}
    check("low", _is_number(low), "a number")
    check("high", _is_number(high) and low < high, "more than low")
    return {"low": float(low), "high": float(high)}


def _optional(table: Mapping[str, Any], check: _Check) -> dict[str, Any]:
    """Check a table's optional keys; returns them in a Task's types."""
    metric, weights = table.get("metric", ""), table.get("class_weights")
    known, of_class = METRICS[table["kind"]], table["kind"] != "regression"
    fits = isinstance(metric, str) and (not metric or metric in known)
    fits = fits or (of_class and re.match("f1:.", str(metric)) is not None)
    check("metric", fits, ", ".join(known) + " or f1:CLASS" * of_class)
    values = weights.values() if isinstance(weights, Mapping) else ()
    ok = weights in (None, "auto") or (bool(values) and all(map(_is_positive, values)))
    check("class_weights", ok, '"auto", or a table of classes and positive numbers')
    check("weight", _is_positive(table.get("weight", 1)), "a positive number")
    return {key: table[key] for key in (*_OPTIONAL, "class_weights") if table.get(key) is not None}


def _is_number(value: Any) -> bool:
    # JSON and TOML also hold integers that are too large for any float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e38


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _distinct(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and len(set(map(label_value, names))) == len(names)


def _listed(names: tuple[str, ...]) -> str:
    """Names of classes for a message; of many, only the first ones."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} or {len(names) - _MOST_NAMES} others"
    return f"{', '.join(names[:-1])} or {names[-1]}"


def label_text(label: Any) -> str:
    """A label as a file has it: a boolean is "true" or "false"."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def label_value(label: Any) -> str | float:
    """The number a label cell spells ("3", "3.0"), or else its text; "True" is "true"."""
    text = label_text(label).strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    return text.lower() if text.lower() in ("true", "false") else text


def split_names(text: str) -> list[str]:
    """The names in a label cell of a multilabel task, "a|b"."""
    return [name.strip() for name in text.split("|") if name.strip()]


def distinct_names(names: Iterable[str]) -> list[str]:
    """The different classes among label cells, sorted: numbers by value, before other names."""
    found: dict[str | float, str] = {}
    for name in sorted({name.strip() for name in names} - {""}, key=lambda name: (len(name), name)):
        found.setdefault(label_value(name), name)  # of "1" and "1.0", the shorter spelling
    return [found[v] for v in sorted(found, key=lambda value: (isinstance(value, str), value))]


def sampling_exponent(sampling: str) -> float:
    """The exponent a for which a task's share of an epoch is proportional to its examples ** a.

    `sampling` is "proportional", "sqrt", "uniform", or a temperature T as text, for a = 1 / T
    (Raffel et al. 2020). Raises UserError for another text.
    """
    named = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
    if sampling in named:
        return named[sampling]
    temperature = label_value(sampling)
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
