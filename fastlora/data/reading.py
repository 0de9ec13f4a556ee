"""Strict reading of task files, and their encoding to flat arrays of tokens."""

import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlora.data.tasks import Task
from fastlora.data.tokenizer import Encoded, Tokenizer
from fastlora.errors import UserError


@dataclass(frozen=True)
class Rows:
    """The N rows of one file."""

    ids: list[str]
    texts: tuple[list[str], ...]  # one list a text column
    labels: np.ndarray | None  # float32 [N], class index or value
    dropped: int  # bad rows left out
    empty: int  # rows with an empty text
    numbers: tuple[int, ...] = ()  # the rows' places in the file


@dataclass(frozen=True)
class TaskData:
    """The tokens of one file of a task: its Rows, encoded."""

    task: Task
    columns: tuple[Encoded, ...]  # one a sequence of an example: two for pairs "separate"
    labels: np.ndarray | None
    ids: list[str]
    dropped: int
    truncated: int  # sequences cut to the longest that the encoder takes
    empty: int

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)


def read_content(path: Path) -> bytes:
    """Read a whole file; UserError when it cannot be."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_rows(
    path: Path,
    task: Task,
    *,
    content: bytes | None = None,
    labelled: bool = True,
    bad_rows: str = "error",
    limit: int | None = None,
    mixed: Collection[str] = (),
) -> Rows:
    """Read a CSV (comma or tab), TSV or JSONL file whose columns are named as the task's.

    With `mixed`, a column "task" says which of these tasks a row is of, and others' are passed by.

    `content` is what the file holds, where the caller has read it. `limit` keeps that many rows,
    spread over the file. Bad rows (wrong field count, bad label) are a UserError that counts them
    all, or are left out and counted with `bad_rows="skip"`. A file that is not UTF-8, has no rows
    or lacks a column is a UserError always.
    """
    wanted = [*task.columns, *([task.label] if labelled else [])]
    text = _text(path, read_content(path) if content is None else content)
    header = ["task"] if mixed else wanted  # columns that only other tasks have may be missing
    records = _json_records(text) if path.suffix == ".jsonl" else _csv_records(path, text, header)
    ids: list[str] = []
    texts, labels, numbers, problems = [], [], [], []
    for number, (line, record) in enumerate(records):
        try:
            if mixed and (whose := _cells(record, ["task"])[0]) != task.name:
                if whose not in mixed:
                    raise ValueError(f"column 'task' is {whose!r} (expected {' or '.join(mixed)})")
                continue
            cells = _cells(record, wanted)
            if labelled:
                labels.append(task.parse_label(cells.pop()))
            ids.append(str(record.get("id", number)))
            texts.append([cell.strip() for cell in cells])
            numbers.append(number)
        except ValueError as error:
            problems.append((line, str(error)))
    if problems and bad_rows != "skip":
        # `fastlora predict` has no such option.
        raise UserError(_complaint(path, problems) + " or pass --bad-rows skip" * labelled)
    if not ids and not mixed:
        raise UserError(f"{path}: no rows (and {len(problems)} bad ones left out)")
    ids, texts, labels = (_spread(items, limit) for items in (ids, texts, labels))
    return Rows(
        ids,
        texts=tuple(map(list, zip(*texts, strict=True))),
        labels=np.array(labels, np.float32) if labelled else None,
        dropped=len(problems),
        empty=sum(not all(row) for row in texts),
        numbers=tuple(numbers),
    )


def encode_rows(rows: Rows, task: Task, tokenizer: Tokenizer, pairs: str = "separate") -> TaskData:
    """Tokenise rows; a pair becomes two sequences, or one `[CLS] a [SEP] b [SEP]` if "joint".

    The CS224N starter's own preparation of texts would change no token.
    """
    sequences = [rows.texts] if pairs == "joint" else [(texts,) for texts in rows.texts]
    columns = tuple(tokenizer.encode(*texts) for texts in sequences)
    truncated = sum(column.truncated for column in columns)
    return TaskData(task, columns, rows.labels, rows.ids, rows.dropped, truncated, rows.empty)


def _spread(items: list[Any], most: int | None) -> list[Any]:
    """Keep at most so many items, evenly spaced: the SST files are sorted by label."""
    if most is None or len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def _csv_records(path: Path, text: str, wanted: list[str]) -> Iterator[tuple[int, Any]]:
    """Give each row's line and cells by column, or the ValueError that it deserves."""
    # newline="" leaves CRLF and newlines inside quotes to the csv module, which counts lines.
    lines = io.StringIO(text, newline="")
    tabbed = "\t" in lines.readline() or path.suffix == ".tsv"
    lines.seek(0)
    # strict: an unbalanced quote is an error; otherwise it would swallow the rows that follow.
    reader = csv.reader(lines, delimiter="\t" if tabbed else ",", strict=True)
    line = 1
    try:
        header = next(reader, [])
        for name in wanted:
            if header.count(name) != 1:
                found = f"{header.count(name)} columns named {name!r} in {header}"
                hint = "; or name the rows' task with --task" if name == "task" else ""
                raise UserError(f"{path}:1: {found} (expected 1){hint}")
        line = reader.line_num + 1
        for row in reader:
            if not row and len(header) == 1:
                row = [""]  # in a file of one column, a blank line is an empty text
            if len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
            elif row:
                yield line, ValueError(f"{len(row)} fields (the header has {len(header)})")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: {error}; double the quotes in a quoted field") from None


def _json_records(text: str) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(io.StringIO(text, newline=""), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except ValueError as error:
                yield line, ValueError(f"not JSON: {error}")


def _cells(record: Any, wanted: list[str]) -> list[str]:
    """Give the texts of the wanted columns; ValueError says what is wrong with the row."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError("not a JSON object (expected one object on each line)")
    cells = []
    for name in wanted:
        value = record.get(name)
        if value is None or isinstance(value, (dict, list)):
            found = json.dumps(value)[:40] if name in record else "missing"
            raise ValueError(f"column {name!r} is {found} (expected text or a number)")
        cells.append(value if isinstance(value, str) else json.dumps(value))
    return cells


def _complaint(path: Path, problems: list[tuple[int, str]]) -> str:
    line, what = problems[0]
    kind = "such" if all(other == what for _, other in problems) else "bad"
    count = len(problems)
    fix = f"1 {kind} row; fix it" if count == 1 else f"{count} {kind} rows; fix them"
    return f"{path}:{line}: {what}. {fix}"
