"""LoRA adapters in PEFT's format and task heads on disk.

Files are written into a folder that the caller makes atomic. `heads.json` has the sha256 of the
tensors in each file, and of the encoder and the tokenizer that they belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bert.config import BertConfig
from fastlora.data.tasks import Task, task_from_table
from fastlora.errors import UserError
from fastlora.files import read_json, write_json
from fastlora.lora import files as lora
from fastlora.lora.layer import DEFAULT
from fastlora.multitask.model import MultitaskBert
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

HEADS, HEADS_INFO = "heads.safetensors", "heads.json"
FORMAT = 3  # of `heads.json`: raised where stored heads get another meaning
# What `BaseInfo` has the sha256 of, in the words of messages.
BASE_PARTS = {
    "encoder_sha256": "base model",
    "encoder_config_sha256": "encoder configuration (config.json)",
    "tokenizer_sha256": "tokenizer",
}
# The settings that a model is built of, with their values.
SETTINGS = {
    "mode": ("lora", "frozen", "full"),
    "adapters": ("shared", "per-task", "shared+per-task"),
    "pairs": ("separate", "joint"),
}


@dataclass(frozen=True)
class BaseInfo:
    """The encoder and tokenizer that weights belong to: a name and three sha256."""

    base_model: str
    encoder_sha256: str
    encoder_config_sha256: str
    tokenizer_sha256: str


def fingerprint(encoder: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the base weights, LoRA parameters left out.

    Take it of the fp32 weights as loaded: a cast or merged encoder has another fingerprint.
    """
    return _sha256({n: p.detach() for n, p in encoder.named_parameters() if "lora_" not in n})


def config_fingerprint(config: BertConfig) -> str:
    """sha256 over an encoder's configuration."""
    return hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, whatever the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_names(kind: str, tasks: Iterable[str]) -> list[str]:
    """A run's adapters: the shared one is named "default", others after their tasks."""
    return [DEFAULT] * (kind != "per-task") + (list(tasks) if kind != "shared" else [])


def adapter_place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in a run's folder: the shared one at its top, a task's below it."""
    return folder if adapter == DEFAULT else folder / adapter


def save_all(
    folder: Path, model: MultitaskBert, base: BaseInfo, settings: Mapping[str, Any]
) -> None:
    """Write a model's adapters and `heads.safetensors`, then `heads.json`, which has their sha256.

    `heads.json` says what a model to load them into is built of: the tasks and the `settings`
    "mode", "adapters", "pairs" and "model".
    """
    for adapter in model.settings:
        place = adapter_place(folder, adapter)
        lora.save_adapter(model.encoder, place, adapter, base_model=base.base_model, heads=False)
    write_tensors(folder / HEADS, model.heads.state_dict())
    files = sorted([folder / HEADS, *folder.rglob(lora.WEIGHTS)])
    info = {
        "format": FORMAT,
        "fastlora_version": version("fastlora-bert"),
        **asdict(base),
        "tasks": {name: task.to_table() for name, task in model.tasks.items()},
        "settings": settings,
        "sha256": {str(f.relative_to(folder)): _sha256(read_tensors(f)[0]) for f in files},
    }
    write_json(folder / HEADS_INFO, info)


def read_heads(folder: Path) -> tuple[dict[str, Task], dict[str, Any]]:
    """The tasks and settings in `heads.json`, as `save_all` was given them.

    Raises UserError, naming the file and the key, for a value that is missing or wrong.
    """
    path, tasks = folder / HEADS_INFO, {}
    info = read_json(path)

    def check(key: str, value: Any, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{path}: {key} is {value!r:.80} (expected {expected})")

    same = f"{FORMAT}, that of this fastlora: train again, or use the version it was saved by"
    check("format", info.get("format"), info.get("format") == FORMAT, same)
    for key in ("tasks", "settings", "sha256"):
        check(key, info.get(key), isinstance(info.get(key), dict), "a table")
    settings = info["settings"]
    for key, known in SETTINGS.items():
        check(f"settings.{key}", settings.get(key), settings.get(key) in known, " or ".join(known))
    model = settings.get("model")
    for key, value in (("base_model", info.get("base_model")), ("settings.model", model)):
        check(key, value, isinstance(value, str), "the encoder's name or folder")
    for name, table in info["tasks"].items():
        check(f"tasks.{name}", table, isinstance(table, dict), "a table")
        try:
            tasks[name] = task_from_table(name, table)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        complete = "its labels, or low and high"
        check(f"tasks.{name}", table, tasks[name].is_complete, complete)
    check("tasks", tasks, bool(tasks), "one task or more")
    return tasks, settings


def load_all(folder: Path, model: MultitaskBert, tasks: Iterable[str], base: BaseInfo) -> None:
    """Load a run's adapters, and the heads of its tasks, into a model that has these.

    Raises UserError, before anything is loaded, for files of another base model or tokenizer, for
    other files than `heads.json` lists, and for tensors that are not those saved; also for what
    `fastlora.load_adapter` refuses, and for heads of other names or shapes.
    """
    path, heads = folder / HEADS_INFO, nn.ModuleDict({name: model.heads[name] for name in tasks})
    names = [name for name in model.settings if name == DEFAULT or name in heads]
    places = {name: adapter_place(folder, name) for name in names}
    info = read_json(path)
    for key, what in BASE_PARTS.items():
        if info.get(key) != (expected := getattr(base, key)):
            raise UserError(
                f"{path}: trained on another {what}, that of {info.get('base_model')!r} (sha256 "
                f"{info.get(key)!s:.12}; here {base.base_model!r}, {expected:.12}); give the one "
                "it was trained on as --model"
            )
    paths = [*(place / lora.WEIGHTS for place in places.values()), folder / HEADS]
    files = {str(path.relative_to(folder)): read_tensors(path)[0] for path in paths}
    stored = info["sha256"]
    if files.keys() != stored.keys():
        listed, needed = ", ".join(sorted(stored)), ", ".join(sorted(files))
        raise UserError(f"{path}: sha256 names {listed} (expected, by its settings, {needed})")
    for name, tensors in files.items():
        if (sha256 := _sha256(tensors)) != stored[name]:
            raise UserError(
                f"{folder / name}: its tensors have sha256 {sha256:.12} (expected "
                f"{stored[name]!r:.14}, as {path} says): damaged or replaced; copy the run again"
            )
    for name, place in places.items():
        lora.load_adapter(model.encoder, place, name)
    copy_tensors(folder / HEADS, files[HEADS], heads.state_dict())
