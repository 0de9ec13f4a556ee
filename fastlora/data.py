"""Strict reading of task files, and their encoding to flat arrays of tokens."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlora.errors import UserError
from fastlora.tasks import Task

if TYPE_CHECKING:
    from fastlora.bert.tokenizer import Encoded, Tokenizer

# A row as its id and its wanted cells, or the words that say what is wrong with it.
Record = tuple[str, list[str]] | str


@dataclass(frozen=True)
class Rows:
    """The rows of one file: ids, one list of texts per text column, labels float32 [N] or None.

    `dropped` counts bad rows left out, `empty` the rows that have an empty text.
    """

    ids: list[str]
    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    dropped: int
    empty: int

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.ids)


@dataclass(frozen=True)
class TaskData:
    """The tokens of one file of a task.

    `columns` holds one Encoded per sequence of an example: 1, or 2 for pairs encoded separately.
    `labels` is float32 [N] (class index or value) or None; `truncated` counts cut sequences.
    """

    task: Task
    columns: tuple["Encoded", ...]
    labels: np.ndarray | None
    ids: list[str]
    dropped: int
    truncated: int
    empty: int

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    def lengths(self, i: Any) -> Any:
        """Count the tokens of example i (or of each example of an index array), all sequences."""
        return sum(column.offsets[i + 1] - column.offsets[i] for column in self.columns)


def read_rows(
    path: Path,
    task: Task,
    *,
    labelled: bool = True,
    bad_rows: str = "error",
    limit: int | None = None,
) -> Rows:
    """Read a CSV (comma or tab), TSV or JSONL file whose columns are named as the task's.

    `limit` keeps the first rows only. Bad rows (wrong field count, bad label) are a UserError
    that counts them all, or are left out and counted with `bad_rows="skip"`. A file that is not
    UTF-8, has no rows or lacks a column is a UserError always.
    """
    wanted = [*task.columns, *([task.label] if labelled else [])]
    records = _json_records if path.suffix == ".jsonl" else _csv_records
    kept: list[tuple[str, list[str]]] = []
    labels: list[float] = []
    problems: list[tuple[int, str]] = []
    for line, record in records(path, _text(path), wanted):
        if len(kept) == limit:
            break
        try:
            if isinstance(record, str):
                raise ValueError(record)
            if labelled:
                labels.append(_label(task, record[1].pop()))
            kept.append(record)
        except ValueError as error:
            problems.append((line, str(error)))
    if problems and bad_rows != "skip":
        raise UserError(_complaint(path, problems))
    if not kept:
        raise UserError(f"{path}: no rows (and {len(problems)} bad ones left out)")
    texts = tuple([cells[i].strip() for _, cells in kept] for i in range(len(task.columns)))
    empty = sum(not all(row) for row in zip(*texts, strict=True))
    values = np.array(labels, np.float32) if labelled else None
    return Rows([name for name, _ in kept], texts, values, len(problems), empty)


def encode_rows(
    rows: Rows,
    task: Task,
    tokenizer: "Tokenizer",
    pairs: str = "separate",
    max_length: int = 512,
) -> TaskData:
    """Tokenise rows; a pair becomes two sequences, or one `[CLS] a [SEP] b [SEP]` if "joint".

    The course's own preparation (lower case, spaces before punctuation) is left to the tokenizer,
    which gives the same tokens without it.
    """
    if task.is_pair and pairs == "joint":
        columns = (tokenizer.encode_pairs(*rows.texts, max_length=max_length),)
    else:
        columns = tuple(tokenizer.encode(text, max_length=max_length) for text in rows.texts)
    truncated = sum(column.truncated for column in columns)
    return TaskData(task, columns, rows.labels, rows.ids, rows.dropped, truncated, rows.empty)


def load_tasks(
    folder: Path,
    tasks: Iterable[Task],
    split: str,
    tokenizer: "Tokenizer",
    *,
    pairs: str = "separate",
    max_length: int = 512,
    labelled: bool = True,
    bad_rows: str = "error",
    limit: int | None = None,
) -> dict[str, TaskData]:
    """Read and tokenise one split ("train", "dev", "test") of each task; UserError as read_rows."""
    data = {}
    for task in tasks:
        if split not in task.files:
            raise UserError(
                f"task {task.name!r} names no {split} file (has {', '.join(task.files)})"
            )
        path = Path(folder) / task.files[split]
        rows = read_rows(path, task, labelled=labelled, bad_rows=bad_rows, limit=limit)
        data[task.name] = encode_rows(rows, task, tokenizer, pairs, max_length)
    return data


def available_tasks(folder: Path, tasks: Iterable[Task]) -> list[str]:
    """Name the tasks whose training and dev files are both in the folder."""
    folder = Path(folder)
    return [
        task.name
        for task in tasks
        if all((folder / task.files[split]).is_file() for split in ("train", "dev"))
    ]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}:{line}: {found} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty (expected a header line and rows)")
    return text


def _csv_records(path: Path, text: str, wanted: list[str]) -> Iterator[tuple[int, Record]]:
    # newline="" leaves CRLF and newlines inside quotes to the csv module, which counts lines.
    lines = io.StringIO(text, newline="")
    tabbed = "\t" in lines.readline() or path.suffix == ".tsv"
    lines.seek(0)
    # strict: an unbalanced quote is an error; otherwise it would swallow the rows that follow.
    reader = csv.reader(lines, delimiter="\t" if tabbed else ",", strict=True)
    line = 1
    try:
        header = next(reader)
        places = _places(path, header, wanted)
        id_at = header.index("id") if "id" in header else None
        line = reader.line_num + 1
        for number, row in enumerate(reader):
            if not row and len(header) == 1:
                row = [""]  # in a file of one column, a blank line is an empty text
            if len(row) == len(header):
                name = str(number) if id_at is None else row[id_at]
                yield line, (name, [row[place] for place in places])
            elif row:
                yield line, f"{len(row)} fields (expected {len(header)}, as in the header)"
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: {error}; a field that starts with a quote must end with one, "
            "and quotes inside it are doubled"
        ) from None


def _places(path: Path, header: list[str], wanted: list[str]) -> list[int]:
    for name in wanted:
        if header.count(name) != 1:
            found = "is there more than once" if name in header else "is missing"
            raise UserError(f"{path}:1: column {name!r} {found} (the header has {header})")
    return [header.index(name) for name in wanted]


def _json_records(path: Path, text: str, wanted: list[str]) -> Iterator[tuple[int, Record]]:
    filled = (line for line in enumerate(io.StringIO(text, newline=""), 1) if line[1].strip())
    for number, (line, content) in enumerate(filled):
        yield line, _json_record(content, wanted, number)


def _json_record(content: str, wanted: list[str], number: int) -> Record:
    try:
        found = json.loads(content)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(found, dict):
        return "not a JSON object (expected one object on each line)"
    cells = []
    for name in wanted:
        if name not in found:
            return f"column {name!r} is missing"
        value = found[name]
        if value is None or isinstance(value, (dict, list)):
            return f"column {name!r} is {json.dumps(value)[:40]} (expected text or a number)"
        cells.append(value if isinstance(value, str) else json.dumps(value))
    return str(found.get("id", number)), cells


def _label(task: Task, cell: str) -> float:
    try:
        return task.parse_label(cell)
    except ValueError as error:
        raise ValueError(f"column {task.label!r} is {error}") from None


def _complaint(path: Path, problems: list[tuple[int, str]]) -> str:
    line, what = problems[0]
    kind = "such" if all(other == what for _, other in problems) else "bad"
    rows = (
        f"1 {kind} row; fix it" if len(problems) == 1 else f"{len(problems)} {kind} rows; fix them"
    )
    return f"{path}:{line}: {what}. {rows} or pass --bad-rows skip"
