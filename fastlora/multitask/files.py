"""LoRA adapters in PEFT's format and task heads on disk.

Files are written into a folder that the caller makes atomic. `heads.json` has the fingerprints of
them all, and of the encoder and tokenizer that the weights belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bert.config import BertConfig
from fastlora.data.tasks import Task, task_from_table
from fastlora.errors import UserError, in_place_of
from fastlora.files import json_sha256, read_json, read_sealed, write_sealed
from fastlora.lora import files as lora
from fastlora.lora.layer import DEFAULT
from fastlora.multitask.model import MultitaskBert
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

HEADS, HEADS_INFO = "heads.safetensors", "heads.json"
FORMAT = 3  # of `heads.json`: raised where stored heads get another meaning
# What messages call the parts that `BaseInfo` has the sha256 of.
BASE_PARTS = {
    "encoder_sha256": "base model",
    "encoder_config_sha256": "encoder configuration (config.json)",
    "tokenizer_sha256": "tokenizer",
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

    It is meant for fp32 weights as loaded: a cast or merged encoder has another fingerprint.
    """
    return _sha256({n: p.detach() for n, p in encoder.named_parameters() if "lora_" not in n})


def config_fingerprint(config: BertConfig) -> str:
    """sha256 over an encoder's configuration."""
    return json_sha256(asdict(config))


def _file_sha256(path: Path) -> str:
    """sha256 over what a JSON or safetensors file says, however it is written."""
    is_json = path.suffix == ".json"
    return json_sha256(read_json(path)) if is_json else _sha256(read_tensors(path)[0])


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
    """Write a model's adapters and `heads.safetensors`, then `heads.json` with the sha256 of all.

    `heads.json` says what a model to load them into is built of: the tasks and the `settings`
    "mode", "adapters", "pairs" and "model".
    """
    for adapter in model.settings:
        place = adapter_place(folder, adapter)
        lora.save_adapter(model.encoder, place, adapter, base_model=base.base_model, heads=False)
    write_tensors(folder / HEADS, model.heads.state_dict())
    files = sorted([folder / HEADS, *folder.rglob(lora.WEIGHTS), *folder.rglob(lora.CONFIG)])
    info = {
        "format": FORMAT,
        "fastlora_version": version("fastlora-bert"),
        **asdict(base),
        "tasks": {name: task.to_table() for name, task in model.tasks.items()},
        "settings": settings,
        "sha256": {str(f.relative_to(folder)): _file_sha256(f) for f in files},
    }
    write_sealed(folder / HEADS_INFO, info)


def read_heads(folder: Path) -> tuple[dict[str, Task], dict[str, Any]]:
    """The tasks and settings in `heads.json`, as `save_all` was given them.

    Raises UserError if it is of another version of fastlora, and if it, or a file that it has the
    sha256 of, has changed since it was saved.
    """
    path = folder / HEADS_INFO
    info = read_json(path)
    if info.get("format") != FORMAT:
        expected = f"{FORMAT}, of this fastlora: train again, or use the version it was saved by"
        raise UserError(f"{path}: format is {info.get('format')!r:.80} (expected {expected})")
    with in_place_of(
        (LookupError, TypeError, AttributeError), UserError, f"{path}: cannot be used: "
    ):
        hashes, settings = read_sealed(path)["sha256"].items(), info["settings"]
        [settings[key] for key in ("mode", "adapters", "pairs", "model")]
        tasks = {name: task_from_table(name, table) for name, table in info["tasks"].items()}
    for name, sha256 in hashes:
        if _file_sha256(file := folder / name) != sha256:
            raise UserError(f"{file}: has changed since it was saved; copy the run again")
    return tasks, settings


def load_all(folder: Path, model: MultitaskBert, tasks: Iterable[str], base: BaseInfo) -> None:
    """Load a run's adapters, and the heads of its tasks, into a model that has these.

    `read_heads` has checked the files.

    Raises UserError, before anything is loaded, for those of another base model or tokenizer; also
    for what `fastlora.load_adapter` refuses, and for heads of other names or shapes.
    """
    info, heads = read_json(folder / HEADS_INFO), nn.ModuleDict({t: model.heads[t] for t in tasks})
    for key, what in BASE_PARTS.items():
        if info.get(key) != (expected := getattr(base, key)):
            its = f"that of {info.get('base_model')!r} (sha256 {info.get(key)!s:.12}; here"
            found = f"trained on another {what}, {its} {base.base_model!r}, {expected:.12})"
            raise UserError(f"{folder}: {found}; give the one it was trained on as --model")
    for name in model.settings:
        if name == DEFAULT or name in heads:
            lora.load_adapter(model.encoder, adapter_place(folder, name), name)
    copy_tensors(folder / HEADS, read_tensors(folder / HEADS)[0], heads.state_dict())
