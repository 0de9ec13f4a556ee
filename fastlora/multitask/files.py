"""LoRA adapters in PEFT's format and task heads on disk; loading is all or nothing.

Files are written into a folder that the caller makes atomic. They carry the fingerprints of the
encoder and tokenizer that their weights belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.data.tasks import Task, task_from_table
from fastlora.errors import UserError
from fastlora.files import read_json, write_json
from fastlora.lora import files as lora
from fastlora.lora.layer import DEFAULT
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

_HEADS, _HEADS_INFO = "heads.safetensors", "heads.json"


@dataclass(frozen=True)
class BaseInfo:
    """The encoder and tokenizer that weights belong to: a name and two sha256."""

    base_model: str
    encoder_sha256: str
    tokenizer_sha256: str

    @property
    def facts(self) -> dict[str, str]:
        """What a file says about its base."""
        return {"fastlora_version": version("fastlora-bert"), **asdict(self)}


def fingerprint(encoder: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the base weights, LoRA parameters left out.

    Take it of the fp32 weights as loaded: a cast or merged encoder has another fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(encoder.named_parameters()):
        if "lora_" not in name:
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
            values = parameter.detach().cpu().contiguous().view(-1)
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_names(kind: str, tasks: Iterable[str]) -> list[str]:
    """A run's adapters: the shared one is named "default", others after their tasks."""
    return [DEFAULT] * (kind != "per-task") + (list(tasks) if kind != "shared" else [])


def adapter_place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in a run's folder: the shared one at its top, a task's below it."""
    return folder if adapter == DEFAULT else folder / adapter


def save_adapter(folder: Path, encoder: nn.Module, adapter: str, base: BaseInfo) -> None:
    """Write one adapter of an encoder as PEFT does, with the facts about its base."""
    lora.save_adapter(
        encoder, folder, adapter, base_model=base.base_model, heads=False, metadata=base.facts
    )


def load_adapter(folder: Path, encoder: nn.Module, adapter: str, base: BaseInfo) -> None:
    """Load one adapter into an encoder that has its place, all of it or, on UserError, nothing.

    Refuses what `fastlora.load_adapter` does and, where the file says so, another base model or
    tokenizer.
    """
    _check_base(folder / lora.WEIGHTS, base)
    lora.load_adapter(encoder, folder, adapter)


def save_heads(
    folder: Path,
    heads: nn.ModuleDict,
    tasks: Mapping[str, Task],
    base: BaseInfo,
    extra: Mapping[str, Any],
) -> None:
    """Write ``heads.safetensors`` and ``heads.json`` (tasks, base model, ``extra`` settings)."""
    tables = {name: task.to_table() for name, task in tasks.items()}
    write_tensors(folder / _HEADS, heads.state_dict(), **base.facts)
    write_json(folder / _HEADS_INFO, {**base.facts, "tasks": tables, "settings": extra})


def read_heads(folder: Path) -> tuple[dict[str, Task], dict[str, Any]]:
    """The tasks and extra settings of saved heads: what a model to load them into is built of."""
    path = folder / _HEADS_INFO
    info = read_json(path)
    tables, extra = info.get("tasks"), info.get("settings")
    if not isinstance(tables, dict) or not isinstance(extra, dict):
        raise UserError(f"{path}: has no 'tasks' and 'settings' (expected a file of fastlora)")
    return {name: task_from_table(name, table) for name, table in tables.items()}, extra


def load_heads(
    folder: Path, heads: nn.ModuleDict, tasks: Mapping[str, Task], base: BaseInfo
) -> None:
    """Copy saved heads into ``heads``, all of them or, on UserError, nothing.

    Refuses other tasks or labels than ``tasks`` (their files may differ), another base model or
    tokenizer, and missing, unexpected, misshapen or non-finite tensors.
    """
    for name, stored in read_heads(folder)[0].items():
        if name in tasks and replace(tasks[name], files=stored.files) != stored:
            raise UserError(
                f"{folder / _HEADS_INFO}: the head of {name!r} was trained for {stored}, "
                f"but the task is defined here as {tasks[name]}"
            )
    path = folder / _HEADS
    copy_tensors(path, _check_base(path, base), heads.state_dict())


def load_all(
    folder: Path,
    encoder: nn.Module,
    names: Iterable[str],
    heads: nn.ModuleDict,
    tasks: Mapping[str, Task],
    base: BaseInfo,
) -> None:
    """`load_adapter` and `load_heads` of a run's adapter folder."""
    for name in names:
        load_adapter(adapter_place(folder, name), encoder, name, base)
    load_heads(folder, heads, tasks, base)


def _check_base(path: Path, base: BaseInfo) -> dict[str, Tensor]:
    """The tensors of a file that was trained on this base."""
    tensors, facts = read_tensors(path)
    for key, what in (("encoder_sha256", "base model"), ("tokenizer_sha256", "tokenizer")):
        expected = base.facts[key]
        # A file without our metadata, such as PEFT's, belongs to any base.
        if facts.get(key, expected) != expected:
            raise UserError(
                f"{path}: trained on another {what}, that of {facts.get('base_model')!r} (sha256 "
                f"{facts[key][:12]}; here {base.base_model!r}, {expected[:12]}); "
                "give the one it was trained on as --model"
            )
    return tensors
