"""The run folder: its name, its lock, and the files that bind a run to its settings and inputs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch

from fastlora.data.reading import TaskData
from fastlora.errors import UserError, in_place_of
from fastlora.files import atomic_open, naming, read_json, write_json
from fastlora.multitask.files import HEADS_INFO
from fastlora.training.checkpoint import check_inputs
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import adapter_folder
from fastlora.training.setup import Setup

WHEELS = ("fastlora-bert", "torch", "triton", "numpy", "transformers", "tokenizers", "safetensors")
# Settings that may change when a run is continued, because they do not change its training. The
# content of the folders of the model and the data does, and `fingerprints` has its sha256.
FREE_KEYS = ("device", "save_every", "grad_checkpoint", "keep", "model", "data")
SETTINGS, ENVIRONMENT, INPUTS, LOCK = "run.toml", "env.json", "inputs.json", "run.lock"
DATA = "data"  # the folder of a run's data that were given in memory


def default_folder(config: TrainConfig) -> Path:
    """runs/DATE_TIME_rR, or the mode for rR; the microseconds tell apart what starts at once."""
    name = f"r{config.lora.r}" if config.mode == "lora" else config.mode
    return Path("runs") / f"{datetime.now():%Y-%m-%d_%H%M%S.%f}_{name}"


def fingerprints(setup: Setup, encoder_sha256: str, config_sha256: str) -> dict[str, str]:
    """What decides a run's result, by name: each setting that differs from its default, as JSON,
    and the sha256 of the encoder, the tokenizer and the data of each task.
    """
    values = {
        "the encoder's weights": encoder_sha256,
        "the encoder's configuration": config_sha256,
        "the tokenizer": setup.tokenizer.fingerprint,
    }
    for split, datasets in (("training", setup.train), ("dev", setup.dev)):
        for name, data in datasets.items():
            values[f"the {split} data of {name}"] = _data_sha256(data)
    if setup.config.add_to:
        tensors = read_json(adapter_folder(setup.config.add_to) / HEADS_INFO)["sha256"]
        values["the run of --add-to"] = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()
    defaults = TrainConfig().to_table()
    for key, value in setup.config.to_table().items():
        if key not in FREE_KEYS and value != defaults.get(key):
            values[f"the setting {key}"] = json.dumps(value, sort_keys=True)
    return values


def _data_sha256(data: TaskData) -> str:
    """The sha256 of a dataset's ids, classes, labels and tokens, which are all that a run reads."""
    digest = hashlib.sha256(json.dumps([data.ids, data.task.labels]).encode())
    sequences = [(column.ids, column.offsets, column.types) for column in data.columns]
    for array in (data.labels, *chain(*sequences)):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def open_run(
    folder: Path, config: TrainConfig, inputs: Mapping[str, str], settings: str = SETTINGS
) -> Iterator[None]:
    """Begin or continue the run in a folder, which is locked until the block ends.

    `inputs` are its `fingerprints`, and `settings` names the file of its settings. Raises UserError
    if another process holds the lock, if the folder holds a run with other inputs, and if it holds
    files that belong to no run.
    """
    if folder.exists() and not (folder / settings).is_file():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
        # A process that was killed may have left these, or temporary files such as .env.json.123.
        first = (LOCK, ENVIRONMENT, INPUTS, DATA, settings)
        if not all(name.lstrip(".").startswith(first) for name in names):
            what = f"exists and holds other things (no {settings})"
            raise UserError(f"{folder}: {what}; use a new --out")
    with in_place_of(OSError, UserError, "the run's folder cannot be made: "):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / settings).exists():
            check_run(folder, inputs)
        else:
            started = f"{datetime.now():%Y-%m-%d %H:%M}"
            write_json(folder / ENVIRONMENT, {"started": started, **environment()})
            write_json(folder / INPUTS, inputs)
            # Written last, because a folder without this file counts as not started.
            write_config(folder / settings, config)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder until the block or the process ends; UserError if another holds the lock."""
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            import fcntl  # Windows does not have it

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(f"{folder}: {holder} is running in it; use a new --out") from None
        except (ImportError, OSError) as error:
            what = f"{folder} cannot be locked ({error})"
            warnings.warn(f"{what}: start no second run in it", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        with naming(folder):
            yield


def check_run(folder: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError naming the `fingerprints` that differ from those of the run in a folder."""
    for name in (ENVIRONMENT, INPUTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; restore it, or use a new --out")
    check_inputs(folder, read_json(folder / INPUTS), inputs)


def write_config(file: Path, config: TrainConfig) -> None:
    """Write settings as a file for --config."""
    with atomic_open(file) as out:
        out.write(f"# Train with it: fastlora-train --config {file.name}\n")
        out.write(tomlkit.dumps(config.to_table()))


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and `fastlora doctor`."""
    versions: dict[str, str | None] = dict.fromkeys(WHEELS)
    for package in WHEELS:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **versions,
        "cpu_threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": [describe_gpu(index) for index in range(torch.cuda.device_count())],
    }


def describe_gpu(index: int) -> str:
    """A GPU's name and compute capability, such as "NVIDIA H100 (sm_90)"."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
