"""The file that holds a search's trials: an Optuna journal that several processes append to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from fastlora.errors import UserError


class _CountedLines(JournalFileBackend):
    """A journal file that remembers which line was read last."""

    line = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.line = log_number_from + 1
        for entry in super().read_logs(log_number_from):
            yield entry
            self.line += 1


def open_journal(path: Path) -> JournalStorage:
    """The storage in a file, which is created if it does not exist.

    An unfinished last line, as a full disk leaves it, is cut off. Raises UserError, with the line's
    number, when the file is damaged elsewhere.
    """
    # Optuna's lock is a symbolic link to this path. Relative, it would be broken, and Optuna could
    # not see that the process which held the lock is gone.
    path = path.resolve()
    backend, lock = _CountedLines(str(path)), JournalFileSymlinkLock(str(path))
    lock.acquire()  # nobody else is in the middle of a line now
    try:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()
    try:
        storage = JournalStorage(backend)
        read_all = backend.line > content.count(b"\n")
        damage: Exception | None = None if read_all else ValueError("not JSON")
    except Exception as error:  # whatever Optuna raises where an entry is not as it expects
        damage = error
    if damage is not None:
        raise UserError(
            f"{path}:{backend.line}: not an entry of an Optuna journal ({damage!r}); restore the "
            "file from a copy, or start a new search with another --out"
        )
    return storage
