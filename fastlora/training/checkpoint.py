"""Checkpoints: folders with everything that a run needs to continue bit for bit.

They hold no random state: each part of a step seeds PyTorch with (seed, step, part), and the plan
of an epoch follows from (seed, epoch).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlora.errors import RunError, UserError
from fastlora.files import atomic_folder, read_content, read_json, write_json
from fastlora.tensors import copy_tensors, read_tensors

KEEP = 2  # checkpoints, besides the best
WEIGHTS, MOMENTS, STATE = FILES = "model.safetensors", "optim.safetensors", "state.json"
MANIFEST = "MANIFEST.json"  # the sha256 of each of those files
NONE_YET = "none-yet"  # a file in the folder until there is a checkpoint
# A process that is killed while it replaces a checkpoint may leave a complete one whose name begins
# with a dot.
NAME = re.compile(r"(\.)?step-(\d+)(?(1)-\w+(?:\.old)?)")


@dataclass
class Progress:
    """How far a run is: `position` batches of epoch `epoch` are done, and `step` batches in all.

    Training these took `seconds` and `examples`. `sums` holds each task's [summed loss, examples]
    since the last logged step, and `scores` the dev scores of each evaluation.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    examples: int = 0
    sums: list[list[float]] = field(default_factory=list)
    scores: list[dict] = field(default_factory=list)

    @property
    def best(self) -> dict | None:
        """The evaluation with the highest mean score, the first of equals; None before any.

        A score that is not defined, such as a correlation with equal predictions, counts as 0.
        """
        means = [mean(score or 0.0 for score in entry["scores"].values()) for entry in self.scores]
        return self.scores[means.index(max(means))] if means else None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise RunError if a tensor that is about to be saved has a value that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            what = f"the weights of {name!r} are not finite after step {step}"
            raise RunError(f"{what}, so they are not saved; lower --lr or raise --warmup")


def check_inputs(path: Path, recorded: Any, inputs: Mapping[str, str]) -> None:
    """Raise UserError naming the inputs of a run that have changed since it started.

    `recorded` and `inputs` map the name of each input to its value or sha256, at the start and now.
    """
    before = recorded if isinstance(recorded, dict) else {}
    changes = [
        f"{name} ({before.get(name, 'default')!s:.20} -> {inputs.get(name, 'default'):.20})"
        for name in {**before, **inputs}
        if before.get(name) != inputs.get(name)
    ]
    if changes:
        command = f"fastlora-train --config {quote(str(path / 'run.toml'))} --out NEW_FOLDER"
        anew = f", as in: {command} ..." if (path / "run.toml").is_file() else ""
        what = f"the run started with other inputs than these: {', '.join(changes)}"
        what += ", on which its steps depend, as the learning rate's schedule does on their number"
        raise UserError(f"{path}: {what}; restore what it started with, or use a new --out{anew}")


def start_checkpoints(folder: Path, began: bool) -> None:
    """Prepare the checkpoint folder of a run without checkpoints; `began` says that it has steps.

    Raises RunError if a run that began once had checkpoints, because they are lost.
    """
    if began and not (folder / NONE_YET).exists():
        raise RunError(f"{folder}: its checkpoints are missing; restore them or use a new --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NONE_YET).touch()


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    inputs: Mapping[str, str],
) -> None:
    """Write `folder`/step-NNNNNN and remove all but the newest two and the best checkpoint.

    `inputs` maps the name of each input of the run to its sha256.
    """
    parameters = trainable(model)
    moments = {
        f"{name}|{slot}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
    with atomic_folder(checkpoint_at(folder, progress.step)) as building:
        for file, tensors in ((WEIGHTS, parameters), (MOMENTS, moments)):
            on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(on_cpu, building / file)
        state = {"progress": asdict(progress), "scaler": scaler.state_dict(), "inputs": inputs}
        write_json(building / STATE, state)
        write_json(building / MANIFEST, _digests(building))
    (folder / NONE_YET).unlink(missing_ok=True)
    best = progress.best and checkpoint_at(folder, progress.best["step"])
    if best and not best.exists():  # a process that was killed had not renamed it yet
        for left in [path for path in folder.glob(f".{best.name}-*") if not _damage(path)][:1]:
            left.rename(best)
    paths = [path for path in _checkpoints(folder) if not path.name.startswith(".")]
    # Those of later steps do not count: they are damaged, so the run went on from an earlier one.
    complete = paths[: paths.index(checkpoint_at(folder, progress.step)) + 1]
    for old in (*complete[:-KEEP], *folder.glob(".step-*")):
        if old != best:
            shutil.rmtree(old)


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint after this step."""
    return folder / f"step-{step:06d}"


def latest_checkpoint(folder: Path, note: Callable[[str], object] = lambda _: None) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None if there is no checkpoint.

    `note` is called with a line on each newer one that is damaged. Raises RunError if all are.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        if not (reason := _damage(path)):
            return path
        if not path.name.startswith("."):  # what a killed process left may be incomplete
            damaged.append(f"{path}: {reason}")
            note(f"passed over a damaged checkpoint: {damaged[-1]}")
    if damaged:
        what = f"every checkpoint is damaged: {'; '.join(damaged)}"
        raise RunError(f"{what}; restore one or use a new --out")
    return None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: Mapping[str, str],
) -> Progress:
    """Load a checkpoint into a model, its optimizer and its scaler; returns the run's progress.

    Raises UserError if the run's inputs have changed, and RunError if the checkpoint does not fit
    the model.
    """
    state = read_json(path / STATE)
    check_inputs(path, state.get("inputs"), inputs)
    parameters = trainable(model)
    try:
        copy_tensors(path / WEIGHTS, read_tensors(path / WEIGHTS)[0], parameters)
        for key, tensor in read_tensors(path / MOMENTS)[0].items():
            name, _, slot = key.rpartition("|")
            optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device)
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        for key, default in vars(Progress()).items():
            value = getattr(progress, key)
            if type(value) is not type(default) or not (default == [] or 0 <= value < 2**63):
                raise ValueError(f"{key} is {value!r:.80}")
        np.array(progress.sums, float).reshape(-1, 2)
        [entry["epoch"] + entry["step"] for entry in (*progress.scores, progress.best) if entry]
        return progress
    except (LookupError, TypeError, ValueError, AttributeError, UserError) as error:
        raise RunError(f"{path}: is not a checkpoint of this run ({error!r})") from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the trained weights of a checkpoint; RunError if it is missing or damaged."""
    if reason := _damage(path):
        what = f"the checkpoint is missing or damaged ({reason})"
        raise RunError(f"{path}: {what}; restore it, or keep the last weights with --keep last")
    stored = read_tensors(path / WEIGHTS)[0]
    there = {name: p for name, p in model.named_parameters() if name in stored}
    copy_tensors(path / WEIGHTS, stored, there)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; other names, such as backups, are left out."""
    names = [match for path in folder.glob("*step-*") if (match := NAME.fullmatch(path.name))]
    return [folder / n[0] for n in sorted(names, key=lambda name: (int(name[2]), name[0]))]


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or ""."""
    try:
        return "" if read_json(path / MANIFEST) == _digests(path) else f"not as {MANIFEST} says"
    except (OSError, UserError) as error:
        return str(error)


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint."""
    return {name: hashlib.sha256(read_content(folder / name)).hexdigest() for name in FILES}
