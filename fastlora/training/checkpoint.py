"""Checkpoints: atomic folders of everything a run needs to go on bit for bit.

Random numbers need no state here: a part of a step seeds torch from (seed, step, part), and the
plan of an epoch is a function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlora.errors import RunError, UserError
from fastlora.files import atomic_folder, read_json, write_json
from fastlora.tensors import read_tensors

KEEP = 2
WEIGHTS, MOMENTS, STATE = FILES = "model.safetensors", "optim.safetensors", "state.json"
MANIFEST = "MANIFEST.json"
# A process that was killed while it replaced a checkpoint leaves a whole one under the second name.
NAME = re.compile(r"step-(\d+)|\.step-(\d+)-\w+(?:\.old)?")


@dataclass
class Progress:
    """Where a run is: `position` batches of epoch `epoch` are done, `step` in all.

    `seconds` were spent in steps on `examples`. `sums` are each task's [summed loss, examples]
    since the last log line, and `scores` those of the epochs.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    examples: int = 0
    sums: list[list[float]] = field(default_factory=list)
    scores: list[dict] = field(default_factory=list)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise RunError for a tensor with a value that is not finite: it must not be saved."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(
                f"the weights of {name!r} are not finite after step {step}, so they are not saved; "
                "lower --lr or raise --warmup"
            )


def check_inputs(path: Path, recorded: Any, inputs: Mapping[str, str]) -> None:
    """Raise UserError naming what a run reads that is not what it read when it started.

    `recorded` and `inputs` are sha256 by what they are of, then and now.
    """
    known = recorded if isinstance(recorded, dict) else {}
    if changed := [name for name in {**known, **inputs} if known.get(name) != inputs.get(name)]:
        raise UserError(
            f"{path}: the run started with other inputs than these: {', '.join(changed)} differ; "
            "put back what it started with, or use a new --out"
        )


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    inputs: Mapping[str, str],
) -> None:
    """Write `folder`/step-NNNNNN and remove all but the newest two.

    `inputs` are the sha256 of what the run reads, see `check_inputs`.
    """
    parameters = trainable(model)
    with atomic_folder(folder / f"step-{progress.step:06d}") as building:
        moments = {
            f"{name}|{slot}": value
            for name, parameter in parameters.items()
            for slot, value in optimizer.state.get(parameter, {}).items()
        }
        for file, tensors in ((WEIGHTS, parameters), (MOMENTS, moments)):
            on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(on_cpu, building / file)
        state = {"progress": asdict(progress), "scaler": scaler.state_dict(), "inputs": inputs}
        write_json(building / STATE, state)
        digests = {name: _digest(building / name) for name in FILES}
        write_json(building / MANIFEST, digests)
    left_by_killed = list(folder.glob(".step-*"))
    complete = [path for path in _checkpoints(folder) if path not in left_by_killed]
    for old in (*complete[:-KEEP], *left_by_killed):
        shutil.rmtree(old)


def latest_checkpoint(folder: Path, note: Callable[[str], object] = lambda _: None) -> Path | None:
    """The newest checkpoint whose files are as its manifest says, or None where there are none.

    `note` is told of newer ones that are damaged. Raises RunError when all are.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        if not (reason := _damage(path)):
            for line in damaged:
                note(f"passed over a damaged checkpoint: {line}")
            return path
        if not path.name.startswith("."):  # else it was never complete
            damaged.append(f"{path}: {reason}")
    if damaged:
        what = "; ".join(damaged)
        raise RunError(f"every checkpoint is damaged: {what}; restore one or use a new --out")
    return None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: Mapping[str, str],
) -> Progress:
    """Put a checkpoint in place; returns where the run was.

    Raises UserError as `check_inputs`, and RunError for other parameters than the model trains.
    """
    state = read_json(path / STATE)
    check_inputs(path, state.get("inputs"), inputs)
    weights, _ = read_tensors(path / WEIGHTS)
    moments, _ = read_tensors(path / MOMENTS)
    parameters = trainable(model)
    if {k: p.shape for k, p in parameters.items()} != {k: w.shape for k, w in weights.items()}:
        raise RunError(f"{path}: holds other parameters than this run trains; use a new --out")
    try:
        progress = Progress(**state["progress"])
        for key, tensor in moments.items():
            name, _, slot = key.rpartition("|")
            optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device)
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: is no checkpoint of this run: {error!r}") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return progress


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; other names, as of backups, are left alone."""
    steps = {p: m for p in folder.glob("*step-*") if (m := NAME.fullmatch(p.name))}
    return sorted(steps, key=lambda path: (int(steps[path][1] or steps[path][2]), steps[path][0]))


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; nothing for an intact one."""
    try:
        digests = read_json(path / MANIFEST)
        wrong = [name for name in FILES if digests.get(name) != _digest(path / name)]
    except (OSError, UserError) as error:
        return str(error)
    return f"{wrong[0]} is not as {MANIFEST} says" if wrong else ""


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
