"""The file of a search's trials: an Optuna journal, to which several processes may append."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from fastlora.errors import UserError


class _CountedLines(JournalFileBackend):
    """A journal file that keeps the number of the line that was read last."""

    line = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.line = log_number_from + 1
        for entry in super().read_logs(log_number_from):
            yield entry
            self.line += 1


def open_journal(path: Path) -> JournalStorage:
    """Open the journal in a file, which is created if it does not exist.

    An incomplete last line, such as a full disk leaves, is removed. Raises UserError with the
    number of the line if another line is damaged.
    """
    # Optuna's lock is a symbolic link to this path. If the path were relative, the link would be
    # broken, and Optuna could not read its age to see that the process that held it has ended.
    path = path.resolve()
    backend, lock = _CountedLines(str(path)), JournalFileSymlinkLock(str(path))
    lock.acquire()  # so that no other process is writing a line
    try:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()
    try:
        storage = JournalStorage(backend)
        read_all = backend.line > content.count(b"\n")
        damage: Exception | None = None if read_all else ValueError("not JSON")
    except Exception as error:  # Optuna raises many kinds for an entry that it does not expect
        damage = error
    if damage is not None:
        raise UserError(
            f"{path}:{backend.line}: not an entry of an Optuna journal ({damage!r}); restore the "
            "file from a copy, or start a new search with another --out"
        )
    return storage
