"""LoRA adapters in PEFT's format and task heads on disk, every check before the first write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.config import TARGETS, LoraConfig
from fastlora.errors import UserError
from fastlora.lora import LoRALinear, is_target
from fastlora.stored import (
    BaseInfo,
    copy_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fastlora.tasks import Task, task_from_table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEADS, _HEADS_INFO = "heads.safetensors", "heads.json"
_KEY = "base_model.model.{module}.lora_{matrix}.weight"
_KEY_PATTERN = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")

_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA and LoftQ also change the base weights, which are not in the folder.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "target_modules": (list, str),
}
# Said for other tools, or without effect on which numbers the adapter computes.
_INERT = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)


def save_adapter(
    folder: Path,
    layers: Mapping[str, LoRALinear],
    adapter: str,
    settings: LoraConfig,
    base: BaseInfo,
) -> None:
    """Write one adapter as a folder that PEFT loads, each file complete or not at all.

    ``layers`` are the LoRA layers by module name in the encoder; those without ``adapter`` are
    passed over. Our own facts go into the safetensors metadata.
    """
    alpha = settings.alpha
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _peft_targets(settings.targets),
        "bias": "none",
    }
    write_tensors(folder / _WEIGHTS, _parameters(layers, adapter), base)
    write_json(folder / _CONFIG, config)


def read_settings(folder: Path) -> LoraConfig:
    """The settings to ``inject`` before ``load_adapter``, from a folder of ours or of PEFT.

    Which matrices are targets follows from the weights' names; the configuration gives the rest.
    Raises UserError naming whatever is not plain LoRA of one rank and alpha.
    """
    return _read_adapter(folder, None)[0]


def load_adapter(
    folder: Path, layers: Mapping[str, LoRALinear], adapter: str, base: BaseInfo
) -> None:
    """Copy an adapter of ours or of PEFT into ``layers``, all of it or, on UserError, nothing.

    Refuses: anything but plain LoRA, settings other than the layers', missing, unexpected,
    misshapen or non-finite tensors, and, where the file says so, another base model or tokenizer.
    """
    settings, tensors = _read_adapter(folder, base)
    parameters = _parameters(layers, adapter)
    for layer in layers.values():
        here = layer.settings.get(adapter, settings)
        for name in ("r", "alpha", "rslora"):
            found, expected = getattr(settings, name), getattr(here, name)
            if found != expected:
                raise UserError(
                    f"{folder / _CONFIG}: {name} is {found}, but the model was built with "
                    f"{expected}; build it with the adapter's own settings"
                )
    copy_tensors(folder / _WEIGHTS, tensors, parameters)


def save_heads(
    folder: Path,
    heads: nn.ModuleDict,
    tasks: Mapping[str, Task],
    base: BaseInfo,
    extra: Mapping[str, Any],
) -> None:
    """Write ``heads.safetensors`` and ``heads.json`` (tasks, base model, ``extra`` settings)."""
    info = {
        **base.facts,
        "tasks": {name: task.to_table() for name, task in tasks.items()},
        "settings": dict(extra),
    }
    write_tensors(folder / _HEADS, heads.state_dict(), base)
    write_json(folder / _HEADS_INFO, info)


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
    stored, _ = read_heads(folder)
    for name in stored.keys() & tasks.keys():
        here = replace(tasks[name], files=stored[name].files)
        if stored[name] != here:
            raise UserError(
                f"{folder / _HEADS_INFO}: the head of {name!r} was trained for {stored[name]}, "
                f"but the task is defined here as {here}"
            )
    copy_tensors(folder / _HEADS, read_tensors(folder / _HEADS, base), heads.state_dict())


def _parameters(layers: Mapping[str, LoRALinear], adapter: str) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {}
    for module, layer in layers.items():
        if adapter in layer.settings:
            parameters[_KEY.format(module=module, matrix="A")] = layer.lora_A[adapter]
            parameters[_KEY.format(module=module, matrix="B")] = layer.lora_B[adapter]
    if not parameters:
        raise UserError(f"the model has no adapter named {adapter!r}")
    return parameters


def _peft_targets(targets: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules``: a list of name endings, or a regular expression."""
    if set(targets) <= {"query", "key", "value"}:
        return sorted(targets)
    if "ffn_output" not in targets:
        return sorted(TARGETS.get(target, target) for target in targets)
    # As an ending, "output.dense" would also mean attention.output.dense.
    endings = [re.escape(TARGETS.get(t, t)) for t in targets if t != "ffn_output"]
    endings.append(r"(?<!attention\.)output\.dense")
    return r"(?:.*\.)?(?:" + "|".join(endings) + ")"


def _read_adapter(folder: Path, base: BaseInfo | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    path = folder / _CONFIG
    config = read_json(path)
    if problem := _problem(config):
        raise UserError(f"{path}: {problem}")
    tensors = read_tensors(folder / _WEIGHTS, base)
    modules: dict[str, None] = {}
    for key in tensors:
        match = _KEY_PATTERN.fullmatch(key)
        if match is None:
            raise UserError(f"{folder / _WEIGHTS}: unexpected tensor {key!r} (not plain LoRA)")
        modules[match[1]] = None
    if not modules:
        raise UserError(f"{folder / _WEIGHTS}: holds no LoRA weights")
    try:
        settings = LoraConfig(
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0)),
            rslora=config.get("use_rslora", False),
            targets=_targets(list(modules), config["target_modules"]),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return settings, tensors


def _problem(config: Mapping[str, Any]) -> str | None:
    """What in a PEFT configuration is not plain LoRA, or not a configuration at all."""
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if key not in config:
            return f"{key} is missing (expected PEFT's configuration of a LoRA adapter)"
    for key, value in config.items():
        if key in _TYPES:
            if type(value) not in _TYPES[key]:
                expected = " or ".join(kind.__name__ for kind in _TYPES[key])
                return f"{key} is {value!r} (expected {expected})"
            continue
        plain = value in _PLAIN_LORA[key] if key in _PLAIN_LORA else key in _INERT or not value
        if not plain:
            return f"{key} is {value!r}, but only plain LoRA can be loaded"
    return None


def _targets(modules: list[str], listed: list[str] | str) -> tuple[str, ...]:
    targets = tuple(t for t in TARGETS if any(is_target(module, t) for module in modules))
    if all(any(is_target(module, t) for t in targets) for module in modules):
        return targets
    # Not BERT's matrices alone: name them as the configuration does.
    if isinstance(listed, list):
        return tuple(sorted(listed))
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))
