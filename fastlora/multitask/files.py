"""LoRA adapters in PEFT's format and task heads on disk.

Files are written into a folder that the caller makes atomic. They carry the fingerprints of the
encoder and tokenizer that their weights belong to, and `heads.json` has those of all tensors.
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
from fastlora.multitask.heads import ValueHead, head_class
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

HEADS, HEADS_INFO = "heads.safetensors", "heads.json"
# To be raised where stored heads get another meaning. Files of format 1 do not name it; there, a
# regression on one text or on joint pairs had its output in the labels' unit.
FORMAT = 2
# The settings that a model is built of, with their values.
SETTINGS = {
    "mode": ("lora", "frozen", "full"),
    "adapters": ("shared", "per-task", "shared+per-task"),
    "pairs": ("separate", "joint"),
}


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
    return _sha256({n: p.detach() for n, p in encoder.named_parameters() if "lora_" not in n})


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
    settings: Mapping[str, Any],
) -> None:
    """Write `heads.safetensors` and `heads.json`, last: it has the sha256 of the adapters, too.

    `heads.json` says what a model to load them into is built of: the tasks and the `settings`
    "mode", "adapters", "pairs" and "model".
    """
    write_tensors(folder / HEADS, heads.state_dict(), **base.facts)
    files = sorted([folder / HEADS, *folder.rglob(lora.WEIGHTS)])
    info = {
        "format": FORMAT,
        **base.facts,
        "tasks": {name: task.to_table() for name, task in tasks.items()},
        "settings": settings,
        "sha256": {str(f.relative_to(folder)): _sha256(read_tensors(f)[0]) for f in files},
    }
    write_json(folder / HEADS_INFO, info)


def read_heads(folder: Path) -> tuple[dict[str, Task], dict[str, Any]]:
    """The tasks and settings in `heads.json`, as `save_heads` was given them.

    Raises UserError, which names the file and the key, for a value that is missing or wrong, and
    for heads of an older version whose outputs had another meaning.
    """
    path = folder / HEADS_INFO
    info = read_json(path)

    def check(key: str, value: Any, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{path}: {key} is {value!r:.80} (expected {expected})")

    def table(key: str) -> dict[str, Any]:
        value: Any = info.get(key)
        check(key, value, isinstance(value, dict), "a table")
        return value

    stored_format, base = info.get("format", 1), info.get("base_model")
    check("format", stored_format, stored_format in (1, FORMAT), f"{FORMAT}, or an older one")
    if stored_format == FORMAT:
        table("sha256")
    check("base_model", base, isinstance(base, str), "a name")
    settings, tasks = table("settings"), {}
    for key, known in SETTINGS.items():
        check(f"settings.{key}", settings.get(key), settings.get(key) in known, " or ".join(known))
    model = settings.get("model")
    check("settings.model", model, isinstance(model, str), "the encoder's name or folder")
    for name, task in table("tasks").items():
        check(f"tasks.{name}", task, isinstance(task, dict), "a table")
        try:
            tasks[name] = task_from_table(name, task)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if stored_format == 1 and head_class(tasks[name], settings["pairs"]) is ValueHead:
            raise UserError(
                f"{path}: the head of task {name!r} is a regression that an older fastlora trained "
                "in the labels' unit, not relative to their range; train it again"
            )
    check("tasks", tasks, bool(tasks), "a task or more")
    return tasks, settings


def load_heads(
    folder: Path, heads: nn.ModuleDict, tasks: Mapping[str, Task], base: BaseInfo
) -> None:
    """Copy saved heads into `heads`, all of them or, on UserError, nothing.

    Refuses other tasks or labels than `tasks` (their files may differ), another base model or
    tokenizer, and missing, unexpected, misshapen or non-finite tensors.
    """
    for name, stored in read_heads(folder)[0].items():
        if name in tasks and replace(tasks[name], files=stored.files) != stored:
            raise UserError(
                f"{folder / HEADS_INFO}: the head of {name!r} was trained for {stored}, "
                f"but the task is defined here as {tasks[name]}"
            )
    path = folder / HEADS
    copy_tensors(path, _check_base(path, base), heads.state_dict())


def load_all(
    folder: Path,
    encoder: nn.Module,
    names: Iterable[str],
    heads: nn.ModuleDict,
    tasks: Mapping[str, Task],
    base: BaseInfo,
) -> None:
    """Load a run's adapters of these names and its heads, as `load_adapter` and `load_heads`.

    Refuses tensors that are not those saved, before anything is loaded.
    """
    folders = {name: adapter_place(folder, name) for name in names}
    _check_sha256(folder, [*(own / lora.WEIGHTS for own in folders.values()), folder / HEADS])
    for name, own in folders.items():
        load_adapter(own, encoder, name, base)
    load_heads(folder, heads, tasks, base)


def _check_sha256(folder: Path, files: Iterable[Path]) -> None:
    """Raise UserError unless `heads.json` names these files, with the sha256 of their tensors."""
    info = folder / HEADS_INFO
    stored = read_json(info).get("sha256")
    if stored is None:  # format 1
        return
    found = {str(file.relative_to(folder)): _sha256(read_tensors(file)[0]) for file in files}
    if found.keys() != stored.keys():
        listed, needed = ", ".join(sorted(stored)), ", ".join(sorted(found))
        raise UserError(f"{info}: sha256 names {listed} (expected, by its settings, {needed})")
    for name, sha256 in found.items():
        if sha256 != stored[name]:
            raise UserError(
                f"{folder / name}: its tensors have sha256 {sha256:.12} (expected "
                f"{stored[name]!r:.14}, as {info} says): damaged or replaced; copy the run again"
            )


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
