"""The run folder: what a run writes while it goes, and how it is found again."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomlkit
import torch

from fastlora.config import TrainConfig
from fastlora.errors import UserError
from fastlora.files import atomic_open, read_toml

PACKAGES = ("fastlora-bert", "torch", "triton", "numpy", "tokenizers", "safetensors")
# A run may go on elsewhere, or save more often, and still be the same run.
FREE_KEYS = ("device", "save_every", "grad_checkpoint")


def default_folder(config: TrainConfig) -> Path:
    """runs/DATE_TIME_rR, or the mode in place of the rank."""
    name = f"r{config.lora.r}" if config.mode == "lora" else config.mode
    return Path("runs") / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}"


def open_run(folder: Path, config: TrainConfig, name: str = "run.toml") -> TrainConfig:
    """Create a run folder, or check that it is this run's (else UserError).

    `name` is the file of its settings. Returns the configuration; an existing run's
    --tokens-per-batch is what "auto" means.
    """
    file = folder / name
    if file.exists():
        # A file of an earlier version lacks options that came later.
        found = {**TrainConfig().to_table(), **read_toml(file)}
        if config.tokens_per_batch == "auto":
            config = replace(config, tokens_per_batch=found.get("tokens_per_batch", "auto"))
        wanted = config.to_table()
        keys = [k for k in {**found, **wanted} if k not in FREE_KEYS]
        differing = [k for k in keys if found.get(k) != wanted.get(k)]
        if differing:
            what = ", ".join(f"{k} {found.get(k)!r} -> {wanted.get(k)!r}" for k in differing)
            raise UserError(f"{folder}: holds a run with other settings ({what}); use a new --out")
        return config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds other things (no {name}); use a new --out")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / "env.json") as out:
        started = f"{datetime.now():%Y-%m-%d %H:%M}"
        json.dump({"started": started, **environment()}, out, indent=1)
    write_config(file, config)
    return config


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


class Metrics:
    """metrics.jsonl and TensorBoard scalars of one run (the curves of the paper's Figure 1).

    On resuming at `step`, what an interrupted run logged beyond it is cut away.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: TensorBoard takes a second that only training should pay.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        with atomic_open(path) as out:
            # A killed process can leave half a line, only ever the last one.
            for line in text[: text.rfind("\n") + 1].splitlines():
                if json.loads(line)["step"] <= step:
                    out.write(line + "\n")
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log values at a step; nested tables become TensorBoard groups."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            group = value if isinstance(value, dict) else {"": value}
            for key, scalar in group.items():
                if isinstance(scalar, (int, float)):
                    self.board.add_scalar(f"{name}/{key}" if key else name, scalar, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.file.close()
        self.board.close()
