"""Checkpoints: atomic folders of everything a run needs to go on bit for bit.

Random numbers need no state here: a part of a step seeds torch from (seed, step, part), and the
plan of an epoch is a function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.errors import RunError
from fastlora.files import atomic_folder

KEEP = 2


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


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """Write `folder`/step-NNNNNN and remove all but the newest two."""
    path = folder / f"step-{progress.step:06d}"
    parameters = trainable(model)
    with atomic_folder(path) as building:
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        save_file(weights, building / "model.safetensors")
        moments = {
            f"{name}|{slot}": value.detach().cpu().contiguous()
            for name, parameter in parameters.items()
            for slot, value in optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, building / "optim.safetensors")
        state = {"progress": asdict(progress), "scaler": scaler.state_dict()}
        (building / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {file.name: _digest(file) for file in sorted(building.iterdir())}
        (building / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    # With what a killed process left half-written.
    for old in (*_checkpoints(folder)[:-KEEP], *folder.glob(".step-*")):
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as its manifest says, or None where there are none.

    Raises RunError when all are damaged.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        with suppress(OSError, ValueError):
            manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
            if all(_digest(path / name) == digest for name, digest in manifest.items()):
                return path
    if paths:
        raise RunError(f"{folder}: every checkpoint is damaged; remove them to begin anew")
    return None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Load a checkpoint; returns where the run was. RunError when it has other parameters."""
    weights = load_file(path / "model.safetensors")
    parameters = trainable(model)
    if {k: p.shape for k, p in parameters.items()} != {k: w.shape for k, w in weights.items()}:
        raise RunError(f"{path}: holds other parameters than this run trains; use a new --out")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, tensor in load_file(path / "optim.safetensors").items():
        name, _, slot = key.rpartition("|")
        optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
