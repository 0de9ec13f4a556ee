"""Tasks: the columns of a file, what its labels mean, and the four built-in ones."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from fastlora.errors import UserError

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
_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d{0,98}))(?:\.0*)?", re.ASCII)  # "01" is a name
_MISSING = re.compile(r"|[+-]?(nan|inf|infinity)|na|n/a|null|none", re.IGNORECASE)


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
        for name in named if self.labels else ():
            if (index := self.class_of(name)) is None:
                expected = _listed(self.labels)
                raise UserError(f"task {self.name!r}: {name!r} is no class (expected {expected})")
            if self.metric == f"f1:{name}":
                object.__setattr__(self, "metric", f"f1:{self.labels[index]}")

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
        part = f"{self.dev_share or 0:.0%} of {self.files['train']}"
        dev = self.files.get("dev", part + ", stratified" * bool(self.labels))
        what = f"{self.label} ({self.expected}) from {' and '.join(self.columns)}"
        return f"{self.name}: {self.kind}, {what}; metric {self.metric}; dev split: {dev}"

    @cached_property
    def _classes(self) -> dict[str | int, int]:
        return {class_key(name): index for index, name in enumerate(self.labels)}

    def class_of(self, name: str) -> int | None:
        """The index of a class, or None; "1.0" names the class "1", too, but "01" does not."""
        return self._classes.get(class_key(name))

    def parse_label(self, text: str) -> float | tuple[float, ...]:
        """Turn a label cell into a class index, a value in [low, high], or 0 or 1 for each class.

        Raises ValueError for another cell.
        """
        label: float | None = None
        if self.kind == "multilabel":
            found = {self.class_of(name) for name in split_names(text)}
            if None not in found:
                return tuple(float(index in found) for index in range(len(self.labels)))
        elif self.kind == "classification":
            label = self.class_of(text)
        elif (value := label_number(text)) is not None and self.low <= value <= self.high:
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
    check_name(name)
    given = {key: value for key, value in table.items() if value is not None}
    for key in given:
        if key not in (known := _KEYS.get(kind := str(table.get("kind")), table)):
            expected = ", ".join(known)
            raise UserError(f"task {name!r}: unknown key {key!r} of a {kind} (expected {expected})")
    for key, ok, expected in _rules(given):
        if not ok:
            raise UserError(f"task {name!r}: {key} is {table.get(key)!r} (expected {expected})")
    types: dict[str, Callable[[Any], Any]] = {"low": float, "high": float, "files": dict}
    types |= dict.fromkeys(("columns", "labels"), lambda names: tuple(map(label_text, names)))
    return Task(name, **{k: types[k](v) if k in types else v for k, v in given.items()})


def check_name(name: str) -> None:
    """Raise UserError unless a user's own task may have this name."""
    # Files are named after tasks, and the shared adapter is called "default".
    if not re.fullmatch("[a-z][a-z0-9_]{0,99}", name) or name == "default":
        expected = "another name of at most 100 lower-case letters, digits and _, a letter first"
        raise UserError(f"task {name!r:.99}: expected {expected}")


def _rules(table: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Yield keys of a task's table, whether their values are right, and what is expected.

    Each rule relies on those before it.
    """
    get: Callable[[str], Any] = table.get
    kind, columns, label, files = map(get, _COMMON)
    yield "kind", kind in tuple(_KEYS), "classification, multilabel or regression"
    yield "columns", _distinct(columns) and len(columns) in (1, 2), "one or two text columns"
    yield "label", isinstance(label, str) and label not in columns, "another column's name"
    yield "dev_share", 0 < _number(table.get("dev_share", 0.5)) < 1, "a share between 0 and 1"
    yield "weight", _number(table.get("weight", 1)) > 0, "a positive number"

    splits = set(files) if isinstance(files, Mapping) else set()
    needed = {"train"} if "dev_share" in table else {"train", "dev"}
    expected = "files for train, dev, maybe test; and none for dev where there is a dev_share"
    yield "files", needed <= splits <= needed | {"test"}, expected
    paths = [PurePath(file) for file in files.values() if isinstance(file, str)]
    inside = len(paths) == len(files) and not any(p.anchor or ".." in p.parts for p in paths)
    yield "files", inside, "paths inside the data folder, not absolute and without '..'"

    if "labels" in table:
        labels = table["labels"]
        yield "labels", _distinct(labels) and len(labels) > 1, "two or more different classes"
        apart = kind != "multilabel" or all([n] == split_names(n) for n in map(label_text, labels))
        yield "labels", apart, "names without |, which separates them"
    if "low" in table or "high" in table:
        low, high = _number(get("low")), _number(get("high"))
        yield "low", not math.isnan(low), "a number"
        yield "high", low + 1e-300 < high, "more than low, by 1e-300 or more"

    weights, metric = table.get("class_weights", "auto"), table.get("metric", "")
    values = list(weights.values()) if isinstance(weights, Mapping) else []
    ok = weights == "auto" or (values != [] and all(_number(value) > 0 for value in values))
    yield "class_weights", ok, '"auto", or a table of classes and positive numbers'
    names = (*METRICS[kind], *(["f1:CLASS"] if kind != "regression" else []))
    of_class = "f1:CLASS" in names and re.match("f1:.", str(metric)) is not None
    yield "metric", metric in ("", *names) or of_class, ", ".join(names)


def _number(value: Any) -> float:
    """A table's number, or NaN for a value that is no number or too large for a float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e38 else math.nan


def _distinct(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and len(set(map(class_key, names))) == len(names)


def _listed(names: tuple[str, ...]) -> str:
    """Names of classes for a message; of many, only the first ones."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} or {len(names) - _MOST_NAMES} others"
    return f"{', '.join(names[:-1])} or {names[-1]}"


def label_text(label: Any) -> str:
    """A label as a file has it: a boolean is "true" or "false"."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def label_number(text: str) -> float | None:
    """The number that a label cell spells, or None."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def class_key(label: Any) -> str | int:
    """What all spellings of a class share: an int for "1" and "1.0", else text ("01", "true")."""
    text = label_text(label).strip()
    text = text.lower() if text.lower() in ("true", "false") else text
    return int(whole[1]) if (whole := _WHOLE.fullmatch(text)) else text


def without_missing(cells: Iterable[str]) -> list[str]:
    """Label cells without empty ones and, if all others are numbers, without "nan" and the like."""
    given = [cell.strip() for cell in cells if cell.strip()]
    rest = [cell for cell in given if not _MISSING.fullmatch(cell)]
    return given if None in map(label_number, rest) else rest


def split_names(text: str) -> list[str]:
    """The names in a label cell of a multilabel task, "a|b"."""
    return [name.strip() for name in text.split("|") if name.strip()]


def distinct_names(names: Iterable[str]) -> list[str]:
    """The different classes among label cells, sorted: numbers by value, before other names."""
    found: dict[str | int, str] = {}
    for name in sorted(set(without_missing(names)), key=lambda name: (len(name), name)):
        found.setdefault(class_key(name), name)  # of "1" and "1.0", the shorter spelling
    return sorted(found.values(), key=lambda x: (label_number(x) is None, label_number(x) or 0, x))


def sampling_exponent(sampling: str) -> float:
    """The exponent a for which a task's share of an epoch is proportional to its examples ** a.

    `sampling` is "proportional", "sqrt", "uniform", or a temperature T as text, for a = 1 / T
    (Raffel et al. 2020). Raises UserError for another text.
    """
    named = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
    if sampling in named:
        return named[sampling]
    temperature = label_number(sampling)
    if temperature is None or temperature <= 0:
        expected = f"{', '.join(named)} or a positive number"
        raise UserError(f"sampling is {sampling!r} (expected {expected})")
    return 1 / temperature


def _course(stem: str) -> dict[str, str]:
    return {split: f"{stem}-{split}.csv" for split in ("train", "dev", "test")}


_ONE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
COURSE_NAMES = {"para": "quora"}  # what the course calls a task of ours
# The CS224N default project's tasks, under its own file and column names.
BUILTIN: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst", "classification", _ONE, "sentiment", _course("ids-sst"), tuple("01234")),
        Task("cfimdb", "classification", _ONE, "sentiment", _course("ids-cfimdb"), ("0", "1")),
        Task("quora", "classification", _PAIR, "is_duplicate", _course("quora"), ("0", "1")),
        Task("sts", "regression", _PAIR, "similarity", _course("sts"), low=0.0, high=5.0),
    )
}
