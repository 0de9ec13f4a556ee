"""Atomic writes of files and folders, the cache folder, and JSON and TOML files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EPIPE
from glob import escape
from pathlib import Path
from typing import Any, TextIO

from fastlora.errors import UserError


@contextmanager
def atomic_open(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing; it replaces `path` only if the block ends without an error.

    A symbolic link is followed. Raises UserError for what `check_replaceable` refuses.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.fastlora_{os.getpid()}")

    def touched() -> Path:
        temporary.touch()
        return temporary

    try:
        with _claimed(touched):
            # A report contains the name of its folder, which may not be UTF-8.
            with naming(path), temporary.open("w", -1, "utf-8", "backslashreplace", "") as file:
                yield file
            _sync(temporary)
            os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _remove_leftovers(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (None, EPIPE):
            error.filename = error.filename or str(path)
        raise


def check_replaceable(path: Path, source: Path | None = None) -> None:
    """Raise UserError if a path, or what it links to, is a folder, a device or a pipe.

    With `source`, also if it is that file, or lies in no folder that exists.
    """
    exists = path.exists() or os.path.islink(os.path.realpath(path))  # true for a link to itself
    if exists and not path.is_file():
        raise UserError(f"{path}: is not a regular file (expected the name of a file to write)")
    if exists and source and source.exists() and path.samefile(source):
        raise UserError(f"{path}: is the input itself (expected the name of a file to write)")
    if source and not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it first, or name another file")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill; it replaces `path` only if the block ends without an error.

    If the process is killed during the replacement, the old folder or the new one is complete:
    under the name `path`, or beside it under a name that begins with a dot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}-fastlora_"
    with _claimed(lambda: Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))) as building:
        old = Path(f"{building}.old")
        try:
            building.chmod(0o755)
            with naming(path):
                yield building
            for written in (*building.rglob("*"), building):
                _sync(written)
            if path.exists():
                os.replace(path, old)
            os.replace(building, path)
            _sync(path.parent)
            _remove_leftovers(path)
        finally:
            with suppress(OSError):  # there is an old folder only if the new one was not renamed
                os.rename(old, path)
            for folder in (building, old):
                shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left of writing a file or folder."""
    for left in sorted(path.parent.glob(f".{escape(path.name)}[.-]fastlora_*")):
        if left.suffix == ".old" and left.with_suffix("").exists():
            continue  # another process is replacing that folder
        with suppress(OSError):
            if _lock(descriptor := os.open(left, os.O_RDONLY), wait=False):
                shutil.rmtree(left, True) if left.is_dir() else left.unlink()
            os.close(descriptor)


@contextmanager
def _claimed(make: Callable[[], Path]) -> Iterator[Path]:
    """A file or folder that `make` makes; in the block, nobody takes it for a leftover."""
    while True:
        path = make()
        with suppress(FileNotFoundError):  # another process removed it before it was locked
            descriptor = os.open(path, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if path.exists():
                break
            os.close(descriptor)
    try:
        yield path
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; returns whether that was possible."""
    with suppress(ImportError, OSError):  # of Windows and of file systems without locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The cache folder: $FASTLORA_CACHE, or fastlora in $XDG_CACHE_HOME or ~/.cache."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(os.environ.get("FASTLORA_CACHE") or f"{shared}/fastlora")
    # Without a home directory, this is a path at which nothing can be read or written.
    return Path(os.devnull if folder.startswith("~") else "", folder)


def require(path: Path) -> None:
    """Raise UserError if a file does not exist; the message names a pickle that lies beside it."""
    if path.is_file():
        return
    hint = "expected the folder of a saved model or adapter"
    if Path(f"{path}.index.json").is_file():
        hint = "its weights are in several files; save_pretrained(max_shard_size='99GB') writes one"
    elif path.suffix == ".safetensors" and (pickles := sorted(path.parent.glob("*.bin"))):
        hint = f"{pickles[0].name} is a pickle and is not read; save_pretrained writes safetensors"
    raise UserError(f"{path}: cannot be read: no such file ({hint})")


def read_content(path: Path) -> bytes:
    """Read a whole file; UserError if it is unreadable, a device or a pipe, which may never end."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be read: not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; UserError if the file does not hold one."""
    require(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} (expected an object)")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file that appears only when it is complete."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=2) + "\n")


def json_sha256(value: Mapping[str, Any]) -> str:
    """sha256 of a JSON object."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own sha256, which shows later whether the file has changed."""
    write_json(path, {**value, "own_sha256": json_sha256(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` has written; UserError if it has changed since then."""
    value = read_json(path)
    if value.pop("own_sha256", None) != json_sha256(value):
        raise UserError(f"{path}: has changed since it was saved; copy the run again")
    return value


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file into plain Python types; UserError if it is missing or not valid TOML."""
    import tomlkit  # imported here because the LoRA library does not need it

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return tomlkit.parse(file.read_text(encoding="utf-8-sig")).unwrap()
    except (OSError, UnicodeDecodeError, RecursionError, tomlkit.exceptions.TOMLKitError) as error:
        raise UserError(f"{file}: not a readable TOML file: {error}") from None
