"""Infers what a task's table leaves out, or the whole task of a file, from the data."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from os.path import commonpath
from pathlib import Path
from typing import Literal

from fastlora.data.reading import delimiter_of, read_records, read_rows
from fastlora.data.tasks import (
    BUILTIN,
    Task,
    distinct_names,
    label_value,
    split_names,
    task_from_table,
)
from fastlora.errors import UserError

Kind = Literal["classification", "multilabel", "regression"]
DEV_SHARE = 0.1  # of a file that comes without a dev file
# Labels of up to so many different whole numbers are classes, not values.
MOST_CLASSES = 20
_SEPARATED = {",": "separated by commas", ";": "separated by semicolons", "\t": "separated by tabs"}


@dataclass(frozen=True)
class FileTask:
    """How to train on a file; `text` may also be one text, with commas between the names.

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
    rows = islice(read_records(file, draft, quoting), 100)
    records = [record for _, record in rows if isinstance(record, dict)]
    if not records:
        raise UserError(f"{file}: no rows")
    columns, label = _columns(file, records, how)
    # A link keeps its name, whose suffix says what the file is; the hub's files are such links.
    path, dev = (f.parent.resolve() / f.name for f in (file, Path(how.dev or file)))
    folder = Path(commonpath([path.parent, dev.parent]))
    files = {"train": path, **({"dev": dev} if how.dev else {})}
    kind: str = how.kind or "multilabel"
    if how.kind is None and not any(isinstance(record.get(label), list) for record in records):
        kind = _kind(label_cells(path, replace(draft, label=label), quoting, bad_rows))
    table = {
        "kind": kind,
        "columns": columns,
        "label": label,
        "files": {split: str(name.relative_to(folder)) for split, name in files.items()},
        "dev_share": None if how.dev else DEV_SHARE,
        "metric": how.metric or "",
        "class_weights": how.class_weights,
    }
    task = task_from_table(name or _name(path.stem, label), table)
    task = complete(task, folder, quoting, bad_rows)
    with path.open(encoding="utf-8-sig") as lines:
        separated = _SEPARATED[delimiter_of(path, lines.readline())]
    return folder, task, "JSON lines" if path.suffix.lower() == ".jsonl" else separated


def _columns(file: Path, records: list[dict], how: FileTask) -> tuple[tuple[str, ...], str]:
    """The columns of texts and of labels; UserError unless they are given and in the file."""
    names = list(dict.fromkeys(name for record in records for name in record))
    if not how.text or not how.label:
        texts = {name: [str(record.get(name)) for record in records] for name in names}
        text = max(names, key=lambda name: sum(map(len, texts[name])))
        label = min(names, key=lambda name: (len(set(texts[name])) < 2, len(set(texts[name]))))
        command = shlex.join(["fastlora-train", str(file), "--text", text, "--label", label])
        raise UserError(
            f"{file} has the columns {', '.join(names)}; name those of the texts (two are a pair) "
            f"and of the labels, as in: {command}"
        )
    text = how.text.split(",") if isinstance(how.text, str) else how.text
    for name in (*text, how.label):
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{file} has no column {name!r}, but {', '.join(names)}{hint}")
    return tuple(text), how.label


def _kind(cells: list[str]) -> str:
    """Infer the kind of a task from its label cells."""
    values = {label_value(cell) for cell in cells} - {""}
    numbers = [float(value) for value in values if not isinstance(value, str)]
    few = len(values) <= MOST_CLASSES and all(number.is_integer() for number in numbers)
    return "regression" if len(numbers) == len(values) and not few else "classification"


def _name(stem: str, label: str) -> str:
    """A legal name for a task: from the stem of its file, or from its label's column."""
    from torch.nn import ModuleDict  # imported here, because it takes a second

    stems = re.sub(r"(^|[-_. ])train$", "", stem.lower()), label.lower(), "task"
    names = [re.sub("[^a-z0-9_]+", "_", name).strip("_0123456789") for name in stems]
    taken = {"", "default", *BUILTIN, *dir(ModuleDict())}
    return next(name for name in (*names, "own_task") if name not in taken)


def complete(task: Task, folder: Path, quoting: str, bad_rows: str) -> Task:
    """Infer a task's classes from its training file, or its range from that and the dev file.

    Raises UserError if they cannot be inferred, and as `read_rows` does.
    """
    if task.is_complete:
        return task
    splits = ("train", "dev") if task.kind == "regression" else ("train",)
    paths = [folder / task.files[split] for split in splits if split in task.files]
    cells = [cell for path in paths for cell in label_cells(path, task, quoting, bad_rows)]
    numbers = [float(value) for value in map(label_value, cells) if not isinstance(value, str)]
    if task.kind == "regression" and len(set(numbers)) < 2:
        only = f"{numbers[0]!r} in every row" if numbers else f"no number, but {cells[0]!r}"
        raise UserError(f"{paths[0]}: column {task.label!r} has {only} (expected several numbers)")
    labels = task.kind != "regression" and _classes(paths[0], task, cells)
    found = {"labels": labels} if labels else {"low": min(numbers), "high": max(numbers)}
    return task_from_table(task.name, task.to_table() | found)


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
