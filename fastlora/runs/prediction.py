"""`fastlora predict`: the rows of a file or of standard input with predictions, block by block."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fastlora.data.reading import cells_of, read_lines, read_records
from fastlora.data.tasks import Task
from fastlora.errors import UserError
from fastlora.files import atomic_open, naming
from fastlora.multitask.metrics import Prediction, label_texts
from fastlora.multitask.predictor import predictions
from fastlora.runs.trained import Trained, merged_weights

BLOCK = 4096  # rows
STANDARD = Path("-")  # standard input, or standard output
UTF_8: Any = {"mode": "w", "encoding": "utf-8", "newline": "", "closefd": False}
# The CS224N project's submission files: their names for our tasks, and the names of their columns,
# as the course spells them.
COURSE = {
    "sst": ("sst", "Predicted_Sentiment"),
    "quora": ("para", "Predicted_Is_Paraphrase"),
    "sts": ("sts", "Predicted_Similiary"),
}
Row = tuple[dict[str, str], str, list[str]]  # its cells by column, its task, and its texts
Block = list[tuple[dict[str, str], str, Prediction]]


def predict_file(
    trained: Trained,
    path: Path,
    out: Path | None = None,
    task: str | None = None,
    *,
    quoting: str = "minimal",
    top: int = 1,
    course: bool = False,
) -> tuple[Path, int, int]:
    """Write a file's rows with their predictions, in the same order.

    The file is CSV, TSV or JSONL, or "-": standard input with a text on each line, or with two
    texts and a tab between them. A run of several tasks needs `task`, or a column "task" in the
    file. `out` becomes a CSV file with the `top` most probable classes, or with `course` one that
    the CS224N project asks for; "-" is standard output, the default for a pipe.

    Returns the file written, its number of rows, and how many texts were truncated. Raises
    UserError for a row that cannot be read, and RunError as `Trained.predict`.
    """
    mixed = task is None and len(trained.tasks) > 1 and path != STANDARD
    tasks = trained.tasks if mixed else {(only := trained.task(task)).name: only}
    first = next(iter(tasks))
    if course and (mixed or first not in COURSE):
        raise UserError(f"--task is {task!r} (--format cs224n has {', '.join(COURSE)})")
    if out is None:
        split = "test" if "test" in path.name else "dev"
        name = f"{COURSE[first][0]}-{split}-output" if course else f"{path.name}.predictions"
        out = path.with_name(f"{name}.csv") if path.is_file() else STANDARD
    counts: Counter[str] = Counter()
    with (
        nullcontext(sys.stdin.buffer) if path == STANDARD else path.open("rb") as stream,
        open(sys.stdout.fileno(), **UTF_8) if out == STANDARD else atomic_open(out) as file,
        nullcontext() if mixed else merged_weights(trained, first),
        naming(out),
    ):
        blocks = _predicted(trained, tasks, _rows(path, stream, tasks, quoting), counts)
        if course:
            _write_course(file, blocks, tasks[first])
        else:
            _write_table(file, path, blocks, tasks, top)
        if not counts["rows"]:
            raise UserError(f"{path}: no rows")
    return out, counts["rows"], counts["truncated"]


def _predicted(
    trained: Trained, tasks: Iterable[str], rows: Iterator[Row], counts: Counter[str]
) -> Iterator[Block]:
    """The rows with their predictions in blocks, so that memory does not grow with a file."""
    while block := list(islice(rows, BLOCK)):
        data = {
            task: trained.encode([texts for _, its_task, texts in block if its_task == task], task)
            for task in tasks
        }
        counts["rows"] += len(block)
        counts["truncated"] += sum(examples.truncated for examples in data.values())
        found = {task: iter(each) for task, each in predictions(trained.model, data).items()}
        yield [(cells, task, next(found[task])) for cells, task, _ in block]


def _write_course(file: TextIO, blocks: Iterable[Block], task: Task) -> None:
    """Write the course's submission file; a row without an id has its position."""
    file.write(f"id \t {COURSE[task.name][1]} \n")
    for position, (cells, _, prediction) in enumerate(chain.from_iterable(blocks)):
        (text,) = _cells(task, prediction, 1)
        file.write(f"{cells.get('id', position)} , {text} \n")


def _write_table(
    file: TextIO, path: Path, blocks: Iterable[Block], tasks: Mapping[str, Task], top: int
) -> None:
    """Write the CSV file of rows with predictions; UserError where columns do not fit."""
    classes = max(len(task.labels) for task in tasks.values())
    if not 1 <= top <= max(classes, 1):
        raise UserError(f"--top is {top} (expected 1 to {max(classes, 1)}, the number of classes)")
    added = ["prediction", *["probability"] * (classes > 0)]
    added += [f"{name}_{rank}" for rank in range(2, top + 1) for name in added]
    table = csv.writer(file, lineterminator="\n")
    columns: list[str] = []
    for block in blocks:
        if not columns:  # the rows of a JSONL file may have different ones
            columns = list(dict.fromkeys(name for cells, *_ in block for name in cells))
            if taken := set(added) & set(columns):
                raise UserError(f"{path}: has a column {min(taken)!r} already; rename it")
            table.writerow(columns + added)
        for cells, task, prediction in block:
            if unknown := cells.keys() - columns:
                message = f"none of the first {BLOCK} rows has a column {min(unknown)!r}"
                raise UserError(f"{path}: {message}, but a later row has")
            texts = [cells.get(name, "") for name in columns]
            table.writerow(texts + _cells(tasks[task], prediction, len(added)))


def _cells(task: Task, prediction: Prediction, count: int) -> list[str]:
    """The cells of a row's prediction; the last ones are empty where it has fewer than others."""
    if task.kind == "regression":
        cells = label_texts(task, [prediction.score])
    else:
        others = islice(prediction.probabilities.items(), 1, -(-count // 2))
        ranked = [(str(prediction.label), prediction.score), *others]
        cells = [text for label, share in ranked for text in (label, f"{share:.4f}")]
    return (cells + [""] * count)[:count]


def _rows(path: Path, stream: BinaryIO, tasks: Mapping[str, Task], quoting: str) -> Iterator[Row]:
    """Each row's cells by column, the name of its task, and its texts."""
    first, several = next(iter(tasks.values())), len(tasks) > 1
    if path == STANDARD:
        records = _plain_lines(path, stream, first)
    else:
        required = ["task"] if several else list(first.columns)
        records = read_records(path, first, quoting, required, stream)
    for line, record in records:
        try:
            name = cells_of(record, ["task"], first)[0] if several else first.name
            if name not in tasks:
                raise ValueError(f"column 'task' is {name!r} (expected {' or '.join(tasks)})")
            texts = cells_of(record, tasks[name].columns, first)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {error}") from None
        cells = {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in record.items()
        }
        yield cells, name, texts


def _plain_lines(path: Path, stream: BinaryIO, task: Task) -> Iterator[tuple[int, Any]]:
    """Records as `read_records` gives them, of lines that hold a text, or two and a tab."""
    for number, line in enumerate(read_lines(path, stream), 1):
        texts = line.rstrip("\r\n").split("\t", len(task.columns) - 1)
        if len(texts) == len(task.columns):
            yield number, dict(zip(task.columns, texts, strict=True))
        else:
            yield number, ValueError("one text (expected two, with a tab between them)")
