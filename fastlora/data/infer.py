"""What a task's table leaves out, and the table of a single file: found in the data."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fastlora.data.reading import read_rows
from fastlora.data.tasks import Task, distinct_names, label_value, split_names, task_from_table
from fastlora.errors import UserError


def complete(task: Task, folder: Path, quoting: str, bad_rows: str) -> Task:
    """A task with its classes, from the training file, or its range, from the dev file, too.

    Raises UserError where they cannot be found, and as `read_rows`.
    """
    if task.is_complete:
        return task
    path = folder / task.files["train"]
    cells = label_cells(path, task, quoting, bad_rows)
    if task.kind != "regression":
        return task_from_table(task.name, task.to_table() | {"labels": _classes(path, task, cells)})
    if "dev" in task.files:
        cells += label_cells(folder / task.files["dev"], task, quoting, bad_rows)
    numbers = _numbers(cells)
    if len(set(numbers)) < 2:
        found = f"{numbers[0]!r} in every row" if numbers else f"no number, but {cells[0]!r}"
        raise UserError(f"{path}: column {task.label!r} has {found} (expected different numbers)")
    return task_from_table(task.name, task.to_table() | {"low": min(numbers), "high": max(numbers)})


def label_cells(path: Path, task: Task, quoting: str, bad_rows: str) -> list[str]:
    """The label of each row of a file, as text; UserError as `read_rows`."""
    column = replace(task, columns=(task.label,))
    return read_rows(path, column, labelled=False, quoting=quoting, bad_rows=bad_rows).texts[0]


def _classes(path: Path, task: Task, cells: list[str]) -> list[str]:
    """The classes in label cells, sorted; UserError where they are no classes."""
    several = task.kind == "multilabel"
    labels = distinct_names(name for c in cells for name in (split_names(c) if several else [c]))
    where = f"{path}: column {task.label!r} has"
    if len(labels) < 2:
        raise UserError(f"{where} the label {''.join(labels)!r} alone (expected two or more)")
    if len(labels) > max(20, len(cells) / 2):
        found = f"{len(labels):,} different labels in {len(cells):,} rows"
        raise UserError(f"{where} {found} (expected labels that repeat); is it the labels' column?")
    return labels


def _numbers(cells: Iterable[str]) -> list[float]:
    return [value for value in map(label_value, cells) if isinstance(value, float)]
