"""The run folder: what a run writes while it goes, and how it is found again."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomlkit
import torch

from fastlora.errors import UserError
from fastlora.files import atomic_open, read_toml
from fastlora.training.config import TrainConfig

PACKAGES = ("fastlora-bert", "torch", "triton", "numpy", "tokenizers", "safetensors")
# A run may go on elsewhere, or save more often, and still be the same run.
FREE_KEYS = ("device", "save_every", "grad_checkpoint")


def default_folder(config: TrainConfig) -> Path:
    """runs/DATE_TIME_rR, or the mode in place of the rank."""
    name = f"r{config.r}" if config.mode == "lora" else config.mode
    return Path("runs") / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}"


def open_run(folder: Path, config: TrainConfig, name: str = "run.toml") -> None:
    """Create a run folder, or check that it is this run's (else UserError).

    `name` is the file of its settings.
    """
    file = folder / name
    if file.exists():
        # A file of an earlier version lacks options that came later.
        found = {**TrainConfig().to_table(), **read_toml(file)}
        wanted = config.to_table()
        keys = [k for k in {**found, **wanted} if k not in FREE_KEYS]
        differing = [k for k in keys if found.get(k) != wanted.get(k)]
        if differing:
            what = ", ".join(f"{k} {found.get(k)!r} -> {wanted.get(k)!r}" for k in differing)
            raise UserError(f"{folder}: holds a run with other settings ({what}); use a new --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds other things (no {name}); use a new --out")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / "env.json") as out:
        started = f"{datetime.now():%Y-%m-%d %H:%M}"
        json.dump({"started": started, **environment()}, out, indent=1)
    write_config(file, config)


def write_config(file: Path, config: TrainConfig) -> None:
    """Write the settings of a run, for --config."""
    with atomic_open(file) as out:
        out.write(f"# Train with it: fastlora-train --config {file.name}\n")
        out.write(tomlkit.dumps(config.to_table()))


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and `fastlora doctor`."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["cpu_threads"] = torch.get_num_threads()
    facts["cores"] = os.cpu_count()
    facts["gpus"] = [describe_gpu(i) for i in range(torch.cuda.device_count())]
    return facts


def describe_gpu(index: int) -> str:
    """A GPU's name and capability, as "NVIDIA H100 (sm_90)"."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
