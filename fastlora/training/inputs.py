"""Finds the data, tasks and model of a command, without torch, so that mistakes show at once."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from fastlora.data import DEMO
from fastlora.data.infer import FileTask, complete, task_of_file
from fastlora.data.source import Source, resolve
from fastlora.data.tasks import BUILTIN, COURSE_NAMES, Task, task_from_table
from fastlora.errors import UserError, did_you_mean
from fastlora.files import read_json
from fastlora.lora.config import ALL, TARGETS
from fastlora.training.config import DEFAULT_TASKS, TrainConfig

NEEDED = ("train", "dev")  # the splits that a run reads


@dataclass(frozen=True)
class Inputs:
    """The files that a run reads, and why these."""

    folder: Path
    why_data: str
    tasks: dict[str, Task]
    model: str
    why_model: str
    source: Source


def with_file(config: TrainConfig, file: Path, how: FileTask) -> tuple[TrainConfig, str]:
    """Add the task that `task_of_file` infers; returns the configuration and `why` of its data."""
    if config.tasks or config.data:
        raise UserError(f"{file} says what to train on; leave out --tasks and --data")
    folder, task, separated = task_of_file(file, how, config.quoting, config.bad_rows)
    tables = {**config.task, task.name: task.to_table()}
    config = replace(config, data=folder, tasks=(task.name,), task=tables)
    return config, f"the folder of {file.name}, {separated}"


def find_inputs(config: TrainConfig, why: str = "as given", beside: Path | None = None) -> Inputs:
    """Resolve --data, --tasks and --model and check --targets; UserError when one is not there.

    `why` is the reason for the data folder that the configuration names; where it names none, the
    tasks' files may also lie `beside` the file of the configuration.
    """
    rank_and_world()  # raises for a wrong environment
    for settings in (config, *vars(config).values()):
        for target in getattr(settings, "targets", None) or ():
            _check_name("target", target, [*TARGETS, *ALL])
    if taken := BUILTIN.keys() & config.task:
        raise UserError(f"task {min(taken)!r} is built in; choose another name")
    tables = {n: {k: v for k, v in t.items() if k != "lora"} for n, t in config.task.items()}
    known = {**BUILTIN, **{name: task_from_table(name, table) for name, table in tables.items()}}
    names = config.tasks or [n for n in known if n in DEFAULT_TASKS or n in config.task]
    for name in names:
        _check_name("task", name, known)
    folder, why_data = find_data(config.data, known.values(), why, beside)
    tasks = {}
    for name in names:
        # The course's test files are not needed; all files that a user's own task names are.
        splits = NEEDED if name in BUILTIN else known[name].files
        missing = [p for split in splits if not (p := folder / known[name].files[split]).is_file()]
        if not missing:
            tasks[name] = complete(known[name], folder, config.quoting, config.bad_rows)
        # Without --tasks, those of the paper's three tasks are trained whose files exist. CFIMDB,
        # whose reviews are long, is trained only if it is named.
        elif config.tasks or name not in DEFAULT_TASKS:
            raise UserError(f"{missing[0]}: no such file (task {name!r} needs it)")
    if not tasks:
        files = ", ".join(known[n].files[split] for n in names for split in NEEDED)
        raise UserError(f"{folder}: holds no task's files (expected some of {files})")
    model, why_model = config.model, "as given"
    if model is None and config.add_to:
        model = read_json(adapter_folder(config.add_to) / "heads.json")["settings"]["model"]
        why_model = "that of the run of --add-to"
    elif model is None:
        demo = why_data.startswith("demo")
        model = "minilm" if demo else "bert-base-uncased"
        why_model = f"the default on {'the demo corpus' if demo else 'real data'}"
    model = (source := resolve(model)).again
    for path in map(str, (folder, model, config.add_to, Path(config.out or "").absolute())):
        if path != path.encode(errors="replace").decode():  # in an ASCII locale, any other letter
            raise UserError(f"{path}: is not UTF-8; rename it, or set PYTHONUTF8=1")
    return Inputs(folder, why_data, tasks, model, why_model, source)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the world size of torchrun, or (0, 1); UserError for wrong ones."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[0-9]{1,6},[0-9]{1,6}", f"{rank},{world}") or int(rank) >= int(world):
        given = f"RANK is {rank!r} and WORLD_SIZE {world!r} in the environment"
        raise UserError(f"{given} (expected RANK below WORLD_SIZE); start with torchrun")
    return int(rank), int(world)


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder of a run folder or of a run's checkpoint, or `path` itself.

    Raises UserError if it has no heads.
    """
    run = checkpoint.parents[1] if (checkpoint := checkpoint_of(path)) else Path(path)
    for folder in (run / "adapter", run):
        if (folder / "heads.json").is_file():
            return folder
    if (run / "run.toml").is_file():
        command = f"fastlora-train --resume {quote(str(run))}"
        raise UserError(f"{path}: this run is not finished; continue it first: {command}")
    raise UserError(f"{path}: holds no trained adapter and heads (expected a finished run folder)")


def checkpoint_of(path: str | Path) -> Path | None:
    """The checkpoint, RUN/checkpoints/step-N, that a path names; None if it names none."""
    full = Path(path).absolute()
    named = full.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", full.name)
    return full if named and full.is_dir() else None


def find_data(
    given: str | Path | None,
    tasks: Collection[Task],
    why: str = "as given",
    beside: Path | None = None,
) -> tuple[Path, str]:
    """The folder of the tasks' files, and why it was chosen; see `find_inputs`."""
    if given is not None:
        if not Path(given).is_dir():
            is_file = Path(given).is_file()
            hint = "a file is given by itself: fastlora-train FILE --text COLUMN --label COLUMN"
            what = f"is no folder ({hint})" if is_file else "no such folder"
            raise UserError(f"{given}: {what}; --data names the folder of the task files")
        return Path(given).resolve(), why
    if beside and any((beside.parent / task.files["train"]).is_file() for task in tasks):
        return beside.parent.resolve(), f"{beside.name} lies beside the task files"
    local = Path("data").resolve()
    needed = [[f for split, f in task.files.items() if split in NEEDED] for task in tasks]
    if any(all((local / file).is_file() for file in files) for files in needed):
        return local, "./data holds the task files"
    if any(task.name not in BUILTIN for task in tasks):  # whose files the demo corpus lacks
        return local, "the default"
    return DEMO, "demo corpus: no --data and no task files in ./data"


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        hint = did_you_mean(COURSE_NAMES.get(name, name), known)
        if what == "task" and not hint:
            own = f"train on its file: fastlora-train {name}.csv --text COLUMN --label COLUMN"
            hint = f"; describe it as [task.{name}] in a file for --config, or {own}"
        raise UserError(f"{what} {name!r} is none of {', '.join(known)}{hint}")
