"""The run folder: what a run writes while it goes, and how it is found again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch

from fastlora.bert.config import BertConfig
from fastlora.data.reading import TaskData
from fastlora.errors import UserError
from fastlora.files import atomic_open, read_json, read_toml
from fastlora.training.checkpoint import check_inputs
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import adapter_folder
from fastlora.training.setup import Setup

PACKAGES = ("fastlora-bert", "torch", "triton", "numpy", "tokenizers", "safetensors")
# A run may go on elsewhere, or save more often, and still be the same run.
FREE_KEYS = ("device", "save_every", "grad_checkpoint")
SETTINGS, ENVIRONMENT, INPUTS, LOCK = "run.toml", "env.json", "inputs.json", "run.lock"


def default_folder(config: TrainConfig) -> Path:
    """runs/DATE_TIME_rR, or the mode in place of the rank."""
    name = f"r{config.lora.r}" if config.mode == "lora" else config.mode
    return Path("runs") / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}"


def fingerprints(setup: Setup, encoder_sha256: str, encoder_config: BertConfig) -> dict[str, str]:
    """The sha256 of the encoder, the tokenizer and the data that a run reads, by their names."""
    values = {
        "the encoder's weights": encoder_sha256,
        "the encoder's configuration": _sha256(json.dumps(asdict(encoder_config)).encode()),
        "the tokenizer": setup.tokenizer.fingerprint,
    }
    for split, datasets in (("training", setup.train), ("dev", setup.dev)):
        for name, data in datasets.items():
            values[f"the {split} data of {name}"] = _data_sha256(data)
    if setup.config.add_to:
        files = sorted(adapter_folder(setup.config.add_to).rglob("*.safetensors"))
        values["the run of --add-to"] = _sha256(*(file.read_bytes() for file in files))
    return values


def _data_sha256(data: TaskData) -> str:
    """Of a dataset's ids, classes, labels and tokens: all that a run takes from its file."""
    sequences = [(column.ids, column.offsets, column.types) for column in data.columns]
    arrays = [array for array in (data.labels, *chain(*sequences)) if array is not None]
    return _sha256(json.dumps([data.ids, data.task.labels]).encode(), *arrays)


def _sha256(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make a run folder if need be, and keep other processes out of it until the block ends.

    Raises UserError naming the process that has it, and for a folder of other things.
    """
    _check_is_ours(folder, SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            import fcntl  # there is none on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(f"{folder}: {holder} is running in it; use a new --out") from None
        except (ImportError, OSError) as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}): start no second run in it", stacklevel=2
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def open_run(
    folder: str | Path,
    config: TrainConfig,
    inputs: Mapping[str, str],
    settings: str = SETTINGS,
) -> None:
    """Fill a new run folder, or check that the run in it has these settings and fingerprints.

    Raises UserError naming what differs, or where the folder holds other things.
    """
    folder = Path(folder)
    file = folder / settings
    if file.exists():
        # A file of an earlier version lacks options that came later.
        stored = {**TrainConfig().to_table(), **read_toml(file)}
        given = config.to_table()
        keys = [k for k in {**stored, **given} if k not in FREE_KEYS]
        differing = [k for k in keys if stored.get(k) != given.get(k)]
        if differing:
            what = ", ".join(f"{k} {stored.get(k)!r} -> {given.get(k)!r}" for k in differing)
            raise UserError(f"{folder}: holds a run with other settings ({what}); use a new --out")
        check_inputs(folder, read_json(folder / INPUTS), inputs)
        return
    _check_is_ours(folder, settings)
    started = f"{datetime.now():%Y-%m-%d %H:%M}"
    for name, value in ((ENVIRONMENT, {"started": started, **environment()}), (INPUTS, inputs)):
        with atomic_open(folder / name) as out:
            json.dump(value, out, indent=1)
    write_config(file, config)  # last: a folder without it has not been started


def write_config(file: Path, config: TrainConfig) -> None:
    """Write the settings of a run, for --config."""
    with atomic_open(file) as out:
        out.write(f"# Train with it: fastlora-train --config {file.name}\n")
        out.write(tomlkit.dumps(config.to_table()))


def _check_is_ours(folder: Path, settings: str) -> None:
    """Raise UserError for a folder that no run began, and that is not empty."""
    if folder.exists() and not (folder / settings).is_file():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
        # A process that was killed may have left these, or their temporaries, as .env.json.123.
        started = (LOCK, ENVIRONMENT, INPUTS, settings)
        if not all(name.lstrip(".").startswith(started) for name in names):
            what = f"exists and holds other things (no {settings})"
            raise UserError(f"{folder}: {what}; use a new --out")


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
