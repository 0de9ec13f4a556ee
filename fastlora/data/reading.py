"""Strict reading of task files, and their encoding to flat arrays of tokens."""

import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlora.data.tasks import Task, label_text, split_names
from fastlora.data.tokenizer import Encoded, Tokenizer
from fastlora.errors import UserError, in_place_of
from fastlora.files import read_content


@dataclass(frozen=True)
class Rows:
    """The N rows of one task in a file."""

    ids: list[str]
    texts: tuple[list[str], ...]  # one list for each text column
    labels: np.ndarray | None  # float64 [N], class index or value; multilabel: [N, C], 0 or 1
    skipped: int  # bad rows, which are left out
    empty: int  # rows with an empty text


@dataclass(frozen=True)
class TaskData:
    """The tokens of one file of a task: its Rows, encoded."""

    task: Task
    columns: tuple[Encoded, ...]  # one for each sequence of an example
    labels: np.ndarray | None  # as in Rows
    ids: list[str]
    skipped: int
    truncated: int  # sequences cut to the longest that the encoder takes
    empty: int

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)


def read_rows(
    path: str | Path,
    task: Task,
    *,
    content: bytes | None = None,
    labelled: bool = True,
    quoting: str = "minimal",
    bad_rows: str = "error",
    limit: int | None = None,
    split: str | None = None,
) -> Rows:
    """Read a CSV (comma or tab), TSV or JSONL file whose columns are named as the task's.

    `content` is that of the file, if the caller has read it. With `quoting="none"` quotes are plain
    characters. `limit` keeps so many rows, evenly spaced over the file. If the task has a
    `dev_share`, `split` names the part of the training file: "train" or "dev".

    Bad rows (wrong number of fields, unbalanced quotes, bad label) are a UserError that counts
    them, or are skipped and counted with `bad_rows="skip"`. A file that is not UTF-8, has no rows
    or lacks a column is always a UserError, as is a labelled one whose texts are all empty.
    """
    path = Path(path)
    wanted = [*task.columns, *([task.label] if labelled else [])]
    stream = None if content is None else io.BytesIO(content)
    records = read_records(path, task, quoting, wanted, stream)
    found, problems = [], []
    for position, (line, record) in enumerate(records):
        try:
            cells = cells_of(record, wanted, task)
            label = task.parse_label(cells.pop()) if labelled else None
            identity = record.get("id")
            name = identity if isinstance(identity, str) else str(position)
            found.append((name, [cell.strip() for cell in cells], label))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems and bad_rows != "skip":
        raise UserError(f"{_complaint(path, problems)} or pass --bad-rows skip")
    if not found:
        raise UserError(f"{path}: no rows (and {len(problems)} bad ones skipped)")
    in_dev = bool(task.dev_share and split == "dev")
    if task.dev_share and split in ("train", "dev"):
        found = [found[i] for i in np.flatnonzero(_dev_part(found, task) == in_dev)]
        if not found:
            raise UserError(f"{path}: too few different texts for a {split} split; name a dev file")
    if limit is not None and limit < len(found):
        # Evenly spaced, because the SST files are sorted by label.
        found = [found[i * len(found) // limit] for i in range(limit)]
    ids, texts, labels = zip(*found, strict=True)
    if labelled and not any(map(any, texts)):
        raise UserError(f"{path}: every text in {' and '.join(task.columns)} is empty")
    return Rows(
        list(ids),
        texts=tuple(map(list, zip(*texts, strict=True))),
        labels=np.array(labels, np.float64) if labelled else None,
        skipped=0 if in_dev else len(problems),  # counted for the training part alone
        empty=sum(not all(row) for row in texts),
    )


def read_records(
    path: Path,
    task: Task,
    quoting: str = "minimal",
    required: Collection[str] = (),
    stream: BinaryIO | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield each row's line, and its cells by column or a ValueError that says what is wrong.

    Rows are read one by one, from the stream if it is given. Raises UserError unless a CSV file
    has exactly one column of each `required` name, and for a file that is not UTF-8.
    """
    lines = read_lines(path, io.BytesIO(read_content(path)) if stream is None else stream)
    if path.suffix.lower() == ".jsonl":
        return _json_records(lines)
    return _csv_records(path, lines, required, quoting, task)


def read_lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of a UTF-8 stream with their ends; UserError if it is not UTF-8."""
    count = 0
    try:
        # newline="" leaves CRLF and newlines inside quotes to the csv module, which counts lines.
        for line in io.TextIOWrapper(stream, "utf-8-sig", newline=""):
            yield line
            count += 1
    except UnicodeDecodeError as error:
        number = count + error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def _dev_part(rows: Sequence[tuple[str, list[str], Any]], task: Task) -> np.ndarray:
    """Which rows [N] are in the dev split: a stratified sample, which is always the same.

    Rows with equal texts are in the same split, and count for the class of the first drawn; a row
    with several labels counts for the rarest of them. A class of two or more texts is in both
    splits; one of a single text is in the training split.
    """
    assert task.dev_share is not None
    labels = np.array([row[2] for row in rows])
    strata = labels if task.kind == "classification" else np.zeros(len(labels))
    if task.kind == "multilabel":
        rarity = np.where(labels > 0, labels.sum(0), np.inf)
        strata = np.where(labels.any(1), rarity.argmin(1), -1)
    equal: dict[tuple[str, ...], list[int]] = {}  # the rows of each example
    for row in np.random.Generator(np.random.PCG64(0)).permutation(len(rows)).tolist():
        equal.setdefault(tuple(rows[row][1]), []).append(row)
    classes: dict[float, list[list[int]]] = {}
    for group in equal.values():
        classes.setdefault(strata[group[0]], []).append(group)
    chosen = np.zeros(len(rows), bool)
    for groups in classes.values():
        total, taken = sum(map(len, groups)), list[int]()
        room = min(max(1, round(task.dev_share * total)), total - 1)
        for group in groups:
            taken += group if len(taken) + len(group) <= room else []
        chosen[taken or min(groups[1:], key=len, default=[])] = True
    return chosen


def encode_rows(rows: Rows, task: Task, tokenizer: Tokenizer, pairs: str = "separate") -> TaskData:
    """Tokenise rows; a pair becomes two sequences, or one `[CLS] a [SEP] b [SEP]` if "joint".

    Texts are not prepared as in the CS224N starter code, because that changes no token.
    """
    sequences = [rows.texts] if pairs == "joint" else [(texts,) for texts in rows.texts]
    columns = tuple(tokenizer.encode(*texts) for texts in sequences)
    truncated = sum(column.truncated for column in columns)
    return TaskData(task, columns, rows.labels, rows.ids, rows.skipped, truncated, rows.empty)


def _csv_records(
    path: Path, source: Iterator[str], required: Collection[str], quoting: str, task: Task
) -> Iterator[tuple[int, Any]]:
    """Yield the records of a CSV file, as `read_records` does.

    After a row whose quotes are wrong, the next line begins a row.
    """
    held = deque(islice(source, 1))  # the lines read that do not belong to an earlier row
    delimiter = delimiter_of(path, "".join(held))
    quotes: Any = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
    usual_limit = csv.field_size_limit()

    def lines() -> Iterator[str]:
        yield from tuple(held)
        for line in source:
            held.append(line)
            # A field may be as long as its line; beyond that, the limit stops stray quotes.
            if len(line) > csv.field_size_limit():
                csv.field_size_limit(len(line))
            yield line

    def drop(count: int) -> None:
        for _ in range(count):
            held.popleft()

    def new_reader() -> Any:
        # strict: an unbalanced quote is an error; otherwise it would swallow the rows that follow.
        return csv.reader(lines(), delimiter=delimiter, quoting=quotes, strict=True)

    with in_place_of(csv.Error, UserError, f"{path}:1: the header's quotes do not balance: "):
        reader = new_reader()
        header: list[str] = next(reader, [])
    for name in required:
        if header.count(name) != 1:
            columns = f"{header.count(name)} columns named {name!r} in {header}"
            hint = "; or name the rows' task with --task" if name == "task" else ""
            raise UserError(f"{path}:1: {columns} (expected 1){hint}")
    # A repeated name gets the column's number as its suffix, so that no cell is lost.
    keys = [f"{name}.{i}" if name in header[:i] else name for i, name in enumerate(header)]
    line = reader.line_num
    drop(line)
    try:
        while True:
            start, reader = line, new_reader()
            try:
                for row in reader:
                    count = start + reader.line_num - line
                    if count > 1:
                        _check_span(row, header, delimiter, task)
                    # In a file of one column, a blank line is an empty text.
                    row = row or [""] * (len(header) == 1)
                    if len(row) == len(header):
                        yield line + 1, dict(zip(keys, row, strict=True))
                    elif row:
                        counts = f"{len(row)} fields (the header has {len(header)})"
                        yield line + 1, ValueError(counts)
                    line += count
                    drop(count)
                return
            except csv.Error as error:
                remedy = "double the quotes in a quoted field, or pass --quoting none"
                long = "a text is long (it is safe in JSONL), or " * ("limit" in str(error))
                yield line + 1, ValueError(f"{long}the quotes do not balance: {error}; {remedy}")
                line += 1
                drop(1)
    finally:
        csv.field_size_limit(usual_limit)


def delimiter_of(path: Path, header: str) -> str:
    """The delimiter of a CSV file with this first line: a tab, comma or semicolon."""
    if path.suffix.lower() == ".tsv" or "\t" in header:
        return "\t"
    return ";" if header.count(";") > header.count(",") else ","


def _check_span(row: list[str], header: list[str], delimiter: str, task: Task) -> None:
    """Raise csv.Error when a row of several lines may be several rows with stray quotes."""
    if len(row) != len(header):
        counts = f"{len(row)} fields (the header has {len(header)})"
        raise csv.Error(f"a quoted field spans lines, and the row has {counts}")
    if delimiter == "\t" and any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in row):
        raise csv.Error("a quoted field spans lines and holds tabs")
    # The row's lines without the quotes that join them; delimiters quoted in one line are removed.
    cells = [c if "\n" in c or "\r" in c else c.replace(delimiter, "").strip() for c in row]
    lines = [line.split(delimiter) for line in re.split("[\r\n]+", delimiter.join(cells))]
    named = [dict(zip(header, line, strict=False)).get(task.label, "").strip() for line in lines]
    # In a sentence, unlike between cells, a space follows a comma or semicolon.
    spaced = any(cell[:1] == " " for line in lines for cell in line[1:])
    rows = {len(line) for line in lines} == {len(header)} and all(named) and not spaced
    if not rows and task.is_complete:
        whole, *ends = (_has_label(line, header, task) for line in (row, lines[0], lines[-1]))
        rows = all(ends) if whole else min(len(lines[0]), len(lines[-1])) >= len(header)
    if rows:
        what = "a quoted field spans lines that may be rows themselves"
        raise csv.Error(f"{what} (a text with line breaks is safe in JSONL)")


def _has_label(cells: list[str], header: list[str], task: Task) -> bool:
    try:
        task.parse_label(dict(zip(header, cells, strict=True))[task.label])
    except (KeyError, ValueError):
        return False
    return True


def _json_records(lines: Iterator[str]) -> Iterator[tuple[int, Any]]:
    # Numbers stay as they are spelt; NaN and Infinity, which are not JSON, are the only floats.
    decoder = json.JSONDecoder(parse_float=str, parse_int=str, object_pairs_hook=_unique)
    for line, content in enumerate(lines, 1):
        if content.strip():
            try:
                record = decoder.decode(content)
                if "\\ud" in content.lower():  # half a surrogate pair is not a character
                    json.dumps(record, ensure_ascii=False).encode()
                if not isinstance(record, dict):
                    raise ValueError(f"it is {content.strip()[:20]}")
                yield line, record
            except (ValueError, RecursionError) as error:
                expected = "expected one object on each line"
                yield line, ValueError(f"not a JSON object: {error} ({expected})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; ValueError for a key that is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {key!r} is there twice")
    return record


def cells_of(record: Any, wanted: Iterable[str], task: Task) -> list[str]:
    """Return the texts of the wanted columns; a ValueError says what is wrong with the row.

    The labels of a multilabel task may be a list, which is returned as "a|b".
    """
    if isinstance(record, ValueError):
        raise record
    cells = []
    for name in wanted:
        value = record.get(name)
        if task.kind == "multilabel" and name == task.label and isinstance(value, list):
            names = [label_text(item) for item in value if isinstance(item, (str, bool))]
            plain = len(names) == len(value) and all([n.strip()] == split_names(n) for n in names)
            value = "|".join(names) if plain else value
        if isinstance(value, bool):
            value = json.dumps(value)
        if not isinstance(value, str):
            given = json.dumps(value)[:40] if name in record else "missing"
            raise ValueError(f"column {name!r} is {given} (expected text or a number)")
        cells.append(value)
    return cells


def _complaint(path: Path, problems: list[tuple[int, str]]) -> str:
    line, what = problems[0]
    kind = "such" if all(other == what for _, other in problems) else "bad"
    count = len(problems)
    fix = f"1 {kind} row; fix it" if count == 1 else f"{count} {kind} rows; fix them"
    return f"{path}:{line}: {what}. {fix}"
