"""LoRA adapters in PEFT's format and task heads on disk; loading is all or nothing.

Files are written into a folder that the caller makes atomic. They carry the fingerprints of the
encoder and tokenizer that their weights belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.bert.source import read_json, write_json
from fastlora.bert.weights import copy_tensors, read_tensors, write_tensors
from fastlora.config import TARGETS, LoraConfig
from fastlora.errors import UserError
from fastlora.lora import DEFAULT, LoRALinear, is_target
from fastlora.tasks import Task, task_from_table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEADS, _HEADS_INFO = "heads.safetensors", "heads.json"
_KEY = "base_model.model.{}.lora_{}.weight"
_MODULE = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")

# The types or values that PEFT's settings have in plain LoRA; any other setting must be unset.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA and LoftQ also change the base weights, which are not in the folder.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Notes for other tools.
_NOTES = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
# Without effect on their own, or already said by the names of the tensors.
_IDLE = {"exclude_modules", "inference_mode", "megatron_core", "qalora_group_size"}
_ANY = _NOTES | _IDLE | {"target_modules"}


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


def adapter_names(kind: str, tasks: Iterable[str]) -> list[str]:
    """A run's adapters: the shared one is named "default", others after their tasks."""
    return [DEFAULT] * (kind != "per-task") + (list(tasks) if kind != "shared" else [])


def adapter_place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in a run's folder: the shared one at its top, a task's below it."""
    return folder if adapter == DEFAULT else folder / adapter


def save_adapter(
    folder: Path, layers: Mapping[str, LoRALinear], adapter: str, base: BaseInfo
) -> None:
    """Write one adapter of ``layers`` (by module name in the encoder) as PEFT does.

    Our own facts go into the safetensors metadata. Raises UserError if no layer has ``adapter``.
    """
    settings, parameters = _adapter(layers, adapter)
    # Endings of names mean the same to PEFT here, but "output.dense" means two matrices.
    short = set(settings.targets) <= {"query", "key", "value"}
    modules = settings.targets if short else {_MODULE.sub(r"\1", key) for key in parameters}
    alpha = settings.alpha
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.base_model,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    write_tensors(folder / _WEIGHTS, parameters, **base.facts)
    write_json(folder / _CONFIG, config)


def read_settings(folder: Path) -> LoraConfig:
    """The settings to ``inject`` before ``load_adapter``, from a folder of ours or of PEFT.

    Which matrices are targets follows from the weights' names; the configuration gives the rest.
    Raises UserError naming whatever is not plain LoRA of one rank and alpha.
    """
    path = folder / _CONFIG
    config = read_json(path)
    if missing := {"peft_type", "r", "lora_alpha"} - config.keys():
        raise UserError(f"{path}: {min(missing)} is missing (expected PEFT's LoRA settings)")
    for key, value in config.items():
        plain = _PLAIN.get(key, (value,) if key in _ANY or not value else ())
        if value not in plain and type(value) not in plain:
            raise UserError(f"{path}: {key} is {value!r}, but only plain LoRA can be loaded")
    matches = map(_MODULE.fullmatch, read_tensors(folder / _WEIGHTS)[0])
    modules = sorted({match[1] for match in matches if match})
    if not modules:
        raise UserError(f"{folder / _WEIGHTS}: holds no LoRA weights")
    named = [t for t in TARGETS if any(is_target(module, t) for module in modules)]
    others = [m for m in modules if not any(is_target(m, target) for target in TARGETS)]
    try:
        return LoraConfig(
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0)),
            rslora=config.get("use_rslora", False),
            targets=(*named, *others),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def load_adapter(
    folder: Path, layers: Mapping[str, LoRALinear], adapter: str, base: BaseInfo
) -> None:
    """Copy an adapter of ours or of PEFT into ``layers``, all of it or, on UserError, nothing.

    Refuses: anything but plain LoRA, settings other than the layers', missing, unexpected,
    misshapen or non-finite tensors, and, where the file says so, another base model or tokenizer.
    """
    settings = read_settings(folder)
    built, parameters = _adapter(layers, adapter)
    # Dropout is training's business, and the names of the tensors say what the targets are.
    if replace(settings, dropout=built.dropout, targets=built.targets) != built:
        raise UserError(
            f"{folder / _CONFIG}: holds {settings}, but the model was built with {built}; "
            "build it with the adapter's own settings"
        )
    _load(folder / _WEIGHTS, parameters, base)


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
    _load(folder / _HEADS, heads.state_dict(), base)


def load_all(
    folder: Path,
    layers: Mapping[str, LoRALinear],
    names: Iterable[str],
    heads: nn.ModuleDict,
    tasks: Mapping[str, Task],
    base: BaseInfo,
) -> None:
    """`load_adapter` and `load_heads` of a run's adapter folder."""
    for name in names:
        load_adapter(adapter_place(folder, name), layers, name, base)
    load_heads(folder, heads, tasks, base)


def _adapter(
    layers: Mapping[str, LoRALinear], adapter: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's settings, and its parameters under PEFT's names."""
    settings, parameters = None, {}
    for module, layer in layers.items():
        if adapter in layer.settings:
            settings = layer.settings[adapter]
            parameters[_KEY.format(module, "A")] = layer.lora_A[adapter]
            parameters[_KEY.format(module, "B")] = layer.lora_B[adapter]
    if settings is None:
        raise UserError(f"the model has no adapter named {adapter!r}")
    return settings, parameters


def _load(path: Path, into: Mapping[str, Tensor], base: BaseInfo) -> None:
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
    copy_tensors(path, tensors, into)
