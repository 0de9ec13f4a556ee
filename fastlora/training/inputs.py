"""Which data, tasks and model a command means. No torch here: mistakes are answered at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastlora.data import DEMO
from fastlora.data.source import Source, resolve
from fastlora.data.tasks import BUILTIN, Task, task_from_table
from fastlora.errors import UserError
from fastlora.lora.config import TARGETS
from fastlora.training.config import DEFAULT_TASKS, TrainConfig


@dataclass(frozen=True)
class Inputs:
    """The files a run reads, and why these."""

    folder: Path
    why_data: str
    tasks: dict[str, Task]
    model: str
    why_model: str
    source: Source


def find_inputs(config: TrainConfig) -> Inputs:
    """Resolve --data, --tasks and --model and check --targets; UserError when one is not there."""
    for settings in vars(config).values():
        for target in getattr(settings, "targets", None) or ():
            _check_name("target", target, TARGETS)
    known = known_tasks(config.task)
    folder, why_data = find_data(config.data, known.values())
    tasks = find_tasks(config.tasks, known, folder)
    model, why_model = config.model, "as given"
    if model is None:
        demo = why_data.startswith("demo")
        model = "minilm" if demo else "bert-base-uncased"
        why_model = f"the default on {'the demo corpus' if demo else 'real data'}"
    return Inputs(folder, why_data, tasks, model, why_model, resolve(model))


def adapter_folder(path: Path) -> Path:
    """The adapter folder of a run folder, or the folder itself; UserError without heads in it."""
    for folder in (path / "adapter", path):
        if (folder / "heads.json").is_file():
            return folder
    raise UserError(f"{path}: holds no trained adapter and heads (expected a finished run folder)")


def find_data(given: Path | None, tasks: Iterable[Task]) -> tuple[Path, str]:
    """The folder of the tasks' files and why it is the one."""
    if given is not None:
        if not given.is_dir():
            raise UserError(f"{given}: no such folder (--data names the task files' folder)")
        return given.resolve(), "as given"
    local = Path("data")
    if any(has_files(local, task) for task in tasks):
        return local.resolve(), "./data holds the task files"
    return DEMO, "demo corpus: no --data and no task files in ./data"


def known_tasks(own: Mapping[str, Any]) -> dict[str, Task]:
    """The built-in tasks and the user's own, given as tables."""
    known = dict(BUILTIN)
    for name, table in own.items():
        if name in known:
            raise UserError(f"task {name!r} is built in; give your own another name")
        known[name] = task_from_table(name, {k: v for k, v in table.items() if k != "lora"})
    return known


def find_tasks(
    names: tuple[str, ...] | None, known: Mapping[str, Task], folder: Path
) -> dict[str, Task]:
    """The tasks asked for, or those of the defaults and the user's own whose files are there."""
    if names is not None:
        for name in names:
            _check_name("task", name, known)
            for split in ("train", "dev"):
                if not (path := folder / known[name].files[split]).is_file():
                    raise UserError(f"{path}: no such file (task {name!r} needs it)")
        return {name: known[name] for name in names}
    # The paper's three tasks; CFIMDB's long reviews join when asked for.
    defaults = [t for n, t in known.items() if n in DEFAULT_TASKS or n not in BUILTIN]
    found = {task.name: task for task in defaults if has_files(folder, task)}
    if not found:
        files = ", ".join(file for t in defaults for s, file in t.files.items() if s != "test")
        raise UserError(f"{folder}: holds no task's files (expected some of {files})")
    return found


def has_files(folder: Path, task: Task) -> bool:
    """Whether a task's training and dev files are both in a folder."""
    return all((folder / task.files[split]).is_file() for split in ("train", "dev"))


def _check_name(what: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{what} {name!r} is none of {', '.join(known)}{hint}")
