"""Infers what a task's table leaves out, or the whole task of a file, from the data."""

import filecmp
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Literal

from fastlora.data.reading import delimiter_of, read_records, read_rows
from fastlora.data.tasks import (
    BUILTIN,
    Task,
    distinct_names,
    label_number,
    split_names,
    task_from_table,
    without_missing,
)
from fastlora.errors import UserError, did_you_mean

Kind = Literal["classification", "multilabel", "regression"]
DEV_SHARE = 0.1  # of a file that comes without a dev file
# Labels of up to so many different whole numbers are classes, not values.
MOST_CLASSES = 20
_SEPARATED = {",": "separated by commas", ";": "separated by semicolons", "\t": "separated by tabs"}


@dataclass(frozen=True)
class FileTask:
    """How to train on a file; `text` may also be one string, with commas between the names.

    Args:
        text: Columns of text, comma-separated; two are a pair.
        label: Column of the labels.
        dev: File of the dev split; by default a tenth of FILE, stratified by class.
        kind: Kind of the task; by default inferred from the labels.
        metric: Metric that selects weights, such as macro_f1 or f1:CLASS; see docs/training.md.
        class_weights: auto: weigh each class by 1 / its frequency in the loss.
    """

    text: tuple[str, ...] | str | None = None
    label: str | None = None
    dev: Path | str | None = None
    kind: Kind | None = None
    metric: str | None = None
    class_weights: str | Mapping[str, float] | None = None


def task_of_file(
    file: Path, how: FileTask, quoting: str, bad_rows: str, name: str | None = None
) -> tuple[Path, Task, str]:
    """Infer the task of a file: returns its data folder, the task, and the delimiter in words.

    Without a `name`, the task's name is made from that of the file. Raises UserError if a column is
    missing or the labels fit no kind, and as `read_rows` does.
    """
    if file.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".txt"):
        raise UserError(f"{file}: is neither a folder nor a CSV, TSV or JSONL file")
    draft = Task("file", "multilabel", (), "", {})  # whose labels may also be lists
    rows = list(islice(read_records(file, draft, quoting), 100))
    records = [record for _, record in rows if isinstance(record, dict)]
    if not records:
        line, problem = rows[0] if rows else (1, "no rows")
        raise UserError(f"{file}:{line}: {problem}")
    columns, label = _columns(file, records, how)
    # A link keeps its name, whose suffix says what the file is; the hub's files are such links.
    path, dev = (f.parent.resolve() / f.name for f in (file, Path(how.dev or file)))
    if not dev.is_file():
        raise UserError(f"{how.dev}: no such file (expected that of the dev split)")
    folder = Path(commonpath([path.parent, dev.parent]))
    files = {"train": path, **({"dev": dev} if how.dev else {})}
    cells = None
    if how.kind is None and not any(isinstance(record.get(label), list) for record in records):
        cells = label_cells(path, replace(draft, label=label), quoting, bad_rows)
    table = {
        "kind": how.kind or (_kind(file, cells) if cells else "multilabel"),
        "columns": columns,
        "label": label,
        "files": {split: str(name.relative_to(folder)) for split, name in files.items()},
        "dev_share": None if how.dev else DEV_SHARE,
        "metric": how.metric or "",
        "class_weights": how.class_weights,
    }
    task = task_from_table(name or _name(path.stem, label), table)
    task = complete(task, folder, quoting, bad_rows, cells)
    with path.open(encoding="utf-8-sig") as lines:
        separated = _SEPARATED[delimiter_of(path, lines.readline())]
    return folder, task, "JSON lines" if path.suffix.lower() == ".jsonl" else separated


def _columns(file: Path, records: list[dict], how: FileTask) -> tuple[tuple[str, ...], str]:
    """The columns of texts and of labels; UserError unless they are given and in the file."""
    names = list(dict.fromkeys(name for record in records for name in record))
    if not how.text or not how.label:
        texts = {name: [str(record.get(name)) for record in records] for name in names}
        length = {n: sum(len(t) for t in texts[n] if label_number(t) is None) for n in names}
        text = how.text or max(names, key=length.__getitem__)
        text = text if isinstance(text, str) else ",".join(text)
        variety = {n: len(set(texts[n])) for n in names if n != text}
        label = how.label or min(variety, key=lambda n: (variety[n] < 2, variety[n]), default="...")
        command = shlex.join(["fastlora-train", str(file), "--text", text, "--label", label])
        ask = "name those of the texts (two are a pair) and of the labels, as in"
        raise UserError(f"{file} has the columns {', '.join(names)}; {ask}: {command}")
    text = how.text.split(",") if isinstance(how.text, str) else how.text
    for name in (*text, how.label):
        if name not in names:
            hint = did_you_mean(name, names)
            raise UserError(f"{file} has no column {name!r}, but {', '.join(names)}{hint}")
    return tuple(text), how.label


def _kind(file: Path, cells: list[str]) -> str:
    """Infer the kind of a task from its label cells; UserError where "a|b" leaves it open."""
    if several := next((cell for cell in cells if len(split_names(cell)) > 1), None):
        both = "--kind multilabel if these are several labels, --kind classification if one"
        raise UserError(f"{file}: there is the label {several!r:.60}; pass {both}")
    numbers = {label_number(cell) for cell in without_missing(cells)}
    few = len(numbers) <= MOST_CLASSES and all(n is None or n.is_integer() for n in numbers)
    return "classification" if few or None in numbers else "regression"


def _name(stem: str, label: str) -> str:
    """A legal name for a task: from the stem of its file, or from its label's column."""
    from torch.nn import ModuleDict  # imported here, because it takes a second

    stems = re.sub(r"(^|[-_. ])train$", "", stem.lower()), label.lower(), "task"
    names = [re.sub("[^a-z0-9_]+", "_", name).strip("_0123456789") for name in stems]
    taken = {"", "default", *BUILTIN, *dir(ModuleDict())}
    return next(name for name in (*names, "own_task") if name not in taken)


def complete(
    task: Task, folder: Path, quoting: str, bad_rows: str, cells: list[str] | None = None
) -> Task:
    """Infer a task's classes from its training file, or its range from that and the dev file.

    `cells` are the `label_cells` of the training file, if the caller has read them. Raises
    UserError if nothing can be inferred, where the dev file is the training file, and as
    `read_rows` does.
    """
    train, dev = (folder / task.files.get(split, "") for split in ("train", "dev"))
    if "dev" in task.files and filecmp.cmp(train, dev, shallow=False):
        remedy = "name other rows, or none: then a part of the training file is the dev split"
        raise UserError(f"{dev}: the dev file holds the same as the training file; {remedy}")
    if task.is_complete:
        return task
    cells = label_cells(train, task, quoting, bad_rows) if cells is None else cells
    if task.kind != "regression":
        return replace(task, labels=tuple(_classes(train, task, cells)))
    if "dev" in task.files:
        cells = cells + label_cells(dev, task, quoting, bad_rows)
    numbers = [number for number in map(label_number, cells) if number is not None]
    if len(set(numbers)) < 2:
        only = f"{numbers[0]!r} in every row" if numbers else f"no number, but {cells[0]!r}"
        raise UserError(f"{train}: column {task.label!r} has {only} (expected several numbers)")
    # Checked again, because a range may be too large or too small.
    return task_from_table(task.name, task.to_table() | {"low": min(numbers), "high": max(numbers)})


def label_cells(path: Path, task: Task, quoting: str, bad_rows: str) -> list[str]:
    """The label of each row of a file, as text; raises UserError as `read_rows` does."""
    column = replace(task, columns=(task.label,))
    return read_rows(path, column, labelled=False, quoting=quoting, bad_rows=bad_rows).texts[0]


def _classes(path: Path, task: Task, cells: list[str]) -> list[str]:
    """The classes in label cells, sorted; UserError if there is one alone, or too many."""
    several = task.kind == "multilabel"
    labels = distinct_names(name for c in cells for name in (split_names(c) if several else [c]))
    where = f"{path}: column {task.label!r} has"
    if len(labels) < 2:
        raise UserError(f"{where} the label {''.join(labels)!r} alone (expected two or more)")
    if len(labels) > max(MOST_CLASSES, len(cells) / 2):
        found = f"{len(labels):,} different labels in {len(cells):,} rows"
        raise UserError(f"{where} {found} (expected labels that repeat, or kind regression)")
    return labels
