"""Caches the tokens of task files on disk, for the next run on the same files."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fastlora.data.reading import TaskData, encode_rows, read_rows
from fastlora.data.tasks import Task
from fastlora.data.tokenizer import Encoded, Tokenizer
from fastlora.errors import UserError
from fastlora.files import atomic_folder, cache_folder, read_content

# Raise it when the code gives other tokens or stores them differently.
_FORMAT = 7
_ARRAYS = ("ids", "offsets", "types")
# The fields of a task that decide how its files are read.
_TASK_FIELDS = ("kind", "columns", "label", "labels", "low", "high", "dev_share")


def load_tasks(
    folder: str | Path,
    tasks: Iterable[Task],
    split: str,
    tokenizer: Tokenizer,
    *,
    pairs: str = "separate",
    quoting: str = "minimal",
    bad_rows: str = "error",
    limit: int | None = None,
) -> dict[str, TaskData]:
    """Read and tokenise one split ("train", "dev", "test") of each task; errors as `read_rows`.

    The tokens are kept in `cache_folder()`, under a hash of all that they depend on.
    """
    data = {}
    reading: dict[str, Any] = {"quoting": quoting, "bad_rows": bad_rows, "limit": limit}
    for task in tasks:
        source = "train" if split == "dev" and task.dev_share else split
        if source not in task.files:
            raise UserError(f"task {task.name!r} names no {split} file")
        path = Path(folder) / task.files[source]
        content = read_content(path)
        fields = [*(getattr(task, key) for key in _TASK_FIELDS), task.dev_share and split]
        file = [hashlib.sha256(content).hexdigest(), path.suffix, *fields]
        encoding = [tokenizer.fingerprint, tokenizer.definition, pairs]
        key = json.dumps([_FORMAT, file, reading, encoding])
        entry = cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()
        encoded = _read(entry / "tokens.npz", task)
        if encoded is None:
            rows = read_rows(path, task, content=content, split=split, **reading)
            encoded = encode_rows(rows, task, tokenizer, pairs)
            # It may fail: no permission, no space, or another process was first.
            with suppress(OSError), atomic_folder(entry) as building:
                _write(building / "tokens.npz", encoded, entry.name)
        data[task.name] = encoded
    return data


def _read(file: Path, task: Task) -> TaskData | None:
    """The tokens in a file; None if missing, damaged (zip files have checksums) or another's."""
    try:
        with np.load(BytesIO(read_content(file))) as stored:
            arrays = dict(stored)
        metadata = json.loads(arrays[file.parent.name].tobytes())
        columns = tuple(
            Encoded(**{name: arrays[f"{name}{i}"] for name in _ARRAYS}, truncated=count)
            for i, count in enumerate(metadata.pop("columns"))
        )
        return TaskData(task, columns, arrays["labels"], **metadata)
    except Exception:  # numpy raises different ones for different kinds of damage
        return None


def _write(file: Path, data: TaskData, entry: str) -> None:
    metadata = {key: getattr(data, key) for key in ("ids", "skipped", "truncated", "empty")}
    metadata["columns"] = [column.truncated for column in data.columns]
    content = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    arrays: dict[str, Any] = {"labels": data.labels, entry: content}
    for i, column in enumerate(data.columns):
        arrays |= {f"{name}{i}": getattr(column, name) for name in _ARRAYS}
    np.savez(file, **arrays)
