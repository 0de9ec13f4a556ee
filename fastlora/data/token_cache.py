"""Task files as tokens, kept on disk: the next run on a file reads them by memory map."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastlora.data.reading import TaskData, encode_rows, read_content, read_rows
from fastlora.data.tasks import Task
from fastlora.data.tokenizer import Encoded, Tokenizer
from fastlora.errors import UserError
from fastlora.files import atomic_folder, cache_folder

# To be raised when the code comes to give other tokens, or to store them in another way.
_FORMAT = 1


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
    """Read and tokenise one split ("train", "dev", "test") of each task; UserError as read_rows.

    The tokens are kept in `cache_folder()`, under a hash of all that they depend on.
    """
    data = {}
    for task in tasks:
        if split not in task.files:
            raise UserError(f"task {task.name!r} names no {split} file")
        path = Path(folder) / task.files[split]
        content = read_content(path)
        file = [hashlib.sha256(content).hexdigest(), path.suffix, task.to_table()]
        reading: dict[str, Any] = {"quoting": quoting, "bad_rows": bad_rows, "limit": limit}
        words = [tokenizer.fingerprint, tokenizer.definition, pairs]
        key = json.dumps([_FORMAT, file, reading, words])
        entry = cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()
        encoded = _read(entry, task)
        if encoded is None:
            rows = read_rows(path, task, content=content, **reading)
            encoded = encode_rows(rows, task, tokenizer, pairs)
            # No rights, no space, or another process was first: the next run tokenises again.
            with suppress(OSError), atomic_folder(entry) as building:
                _write(building, encoded)
        data[task.name] = encoded
    return data


def _read(entry: Path, task: Task) -> TaskData | None:
    """The tokens in a folder, or None when it is not there or broken."""
    try:
        index = json.loads((entry / "index.json").read_bytes())
        # By name: another process may be replacing the folder, and no array may go unnoticed.
        arrays = {n: np.load(entry / f"{n}.npy", mmap_mode="r") for n in index.pop("arrays")}
    except (OSError, EOFError, ValueError):
        return None
    truncated = index.pop("truncated")
    columns = tuple(
        Encoded(arrays[f"ids{i}"], arrays[f"offsets{i}"], arrays.get(f"types{i}"), count)
        for i, count in enumerate(truncated)
    )
    return TaskData(task, columns, arrays["labels"], truncated=sum(truncated), **index)


def _write(folder: Path, data: TaskData) -> None:
    arrays: dict[str, Any] = {"labels": data.labels}
    for i, column in enumerate(data.columns):
        arrays |= {f"{name}{i}": getattr(column, name) for name in ("ids", "offsets", "types")}
    names = [name for name, array in arrays.items() if array is not None]
    for name in names:
        np.save(folder / f"{name}.npy", arrays[name])
    truncated = [column.truncated for column in data.columns]
    counts = {"dropped": data.dropped, "empty": data.empty, "truncated": truncated}
    (folder / "index.json").write_text(json.dumps({"ids": data.ids, "arrays": names, **counts}))
