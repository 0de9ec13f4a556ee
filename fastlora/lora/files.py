"""Adapters on disk in PEFT's format, for any module; loading is all or nothing.

An adapter's folder holds `adapter_config.json` and `adapter_model.safetensors`: the factors under
PEFT's names, and all other trained modules (heads) as PEFT's `modules_to_save`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError, in_place_of
from fastlora.files import read_json, write_json
from fastlora.lora.config import TARGETS, LoraConfig, check, ends_with, is_target
from fastlora.lora.layer import DEFAULT, LoRALinear, lora_layers, lora_parameters
from fastlora.lora.model import inject
from fastlora.lora.routing import adapter_names, check_names
from fastlora.tensors import check_tensors, copy_tensors, read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OURS = re.compile(r"\.(lora_[AB]\.[^.]+|base_weight)$")  # an adapter's entries in a state dict

# The types or values that PEFT's settings have in plain LoRA; any other setting must be unset.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (list,),
    # PiSSA, OLoRA, CorDA and LoftQ also change the base weights, which are not in the folder.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Arguments of `LoraConfig`, which checks them.
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
# Notes for other tools; then what has no effect of its own or is implied by the tensors' names.
_NOTES = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
_IDLE = {"exclude_modules", "inference_mode", "megatron_core", "qalora_group_size"}
_ANY = _READ | _NOTES | _IDLE | {"target_modules"}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    base_model: str = "",
    heads: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter (by default the only one) and, with `heads`, all else that is trainable.

    `base_model` is the name or path of the base for PEFT's `base_model_name_or_path`; `metadata`
    goes into the safetensors file. Raises UserError for an unknown adapter, and for a trainable
    parameter for which the format has no place, such as a bias of an adapted layer.
    """
    layers, folder = lora_layers(model), Path(folder)
    known = adapter_names(layers.values())
    name: Any = known[0] if adapter is None and len(known) == 1 else adapter
    check_names(layers.values(), (name,))
    own = {module: layer for module, layer in layers.items() if name in layer.settings}
    if wrapped := [m for m in own if not m or m.split(".")[0] in ("module", "_orig_mod")]:
        whole = "expected the model itself: not one layer, nor wrapped as by torch.compile or DDP"
        raise UserError(f"layer {wrapped[0]!r} has no name in PEFT's format ({whole})")
    tensors = _factors(own, name)
    modules = _trained_modules(model) if heads else []
    for module in modules:
        state = model.get_submodule(module).state_dict()
        tensors |= {f"{_ROOT}{module}.{key}": value for key, value in state.items()}
    config = _peft_config(model, own, name)
    config |= {"base_model_name_or_path": base_model or None, "modules_to_save": modules or None}
    # A sharded parameter is gathered, in which all processes must take part.
    tensors = {k: getattr(t, "full_tensor", lambda t=t: t)() for k, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder) as building:
        write_tensors(Path(building, WEIGHTS), tensors, **(metadata or {}))
        write_json(Path(building, CONFIG), config)
        for file in (WEIGHTS, CONFIG):
            os.replace(Path(building, file), folder / file)


def load_adapter(model: nn.Module, folder: str | Path, adapter: str = DEFAULT) -> None:
    """Load an adapter of fastlora or PEFT and the heads saved with it; UserError changes nothing.

    If the model does not have this adapter, `inject` adds it, and loaded heads become trainable.
    Refuses settings that are not plain LoRA or not the model's, and what `check_tensors` refuses.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder / WEIGHTS)[0]
    own = {n: m for n, m in lora_layers(model).items() if adapter in m.settings}
    for module, layer in own.items():
        theirs, ours = config.for_layer(module), layer.settings[adapter]
        if adapter in layer.merged:
            raise UserError(f"{folder}: adapter {adapter!r} is merged; unmerge it first")
        if not replace(theirs, dropout=ours.dropout).same_adapter(ours):
            raise UserError(f"{folder / CONFIG}: has {theirs}, but the model was built with {ours}")
    factors, heads = _factors(own, adapter), _heads(model, folder, tensors)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = [] if own else _modules(tensors)
    for module in modules:  # placeholders for the factors that `inject` will make
        if module not in linears:
            raise UserError(f"{folder / WEIGHTS}: {module!r} is no linear layer of the model")
        linear, r = linears[module], config.for_layer(module).r
        for side, shape in (("A", (r, linear.in_features)), ("B", (linear.out_features, r))):
            stand_in = torch.empty(shape, device=linear.weight.device)
            factors[f"{_ROOT}{module}.lora_{side}.weight"] = stand_in
    if any(tensor.is_meta for tensor in (*factors.values(), *heads.values())):
        raise UserError(f"{folder / WEIGHTS}: the model lies on the meta device, or is offloaded")
    check_tensors(folder / WEIGHTS, tensors, factors | heads)
    if not own:
        # Anchored, because a bare name also matches longer names that end in it.
        targets = tuple(f"^{re.escape(module)}$" for module in modules)
        new = [t for t in heads.values() if isinstance(t, nn.Parameter) and t.is_floating_point()]
        own = inject(model, {adapter: replace(config, targets=targets)}, train=new)
    copy_tensors(folder / WEIGHTS, tensors, _factors(own, adapter) | heads)


def read_config(folder: Path) -> LoraConfig:
    """The settings of an adapter folder, with the targets that the weights' names show.

    Raises UserError that names a setting which is not plain LoRA.
    """
    path = folder / CONFIG
    config = {key: value for key, value in read_json(path).items() if value is not None}
    if missing := {"peft_type", "r", "lora_alpha"} - config.keys():
        raise UserError(f"{path}: {min(missing)} is missing (expected PEFT's LoRA settings)")
    for key, value in config.items():
        plain = _PLAIN.get(key, (value,) if key in _ANY or not value else ())
        if value not in plain and type(value) not in plain:
            raise UserError(f"{path}: {key} is {value!r}, but only plain LoRA can be loaded")
    modules = _modules(tensors := read_tensors(folder / WEIGHTS)[0])
    if not modules:
        raise UserError(f"{folder / WEIGHTS}: holds no LoRA weights")
    named = [t for t in TARGETS if any(is_target(module, t) for module in modules)]
    others = [m for m in modules if not any(is_target(m, target) for target in TARGETS)]
    with in_place_of(UserError, UserError, f"{path}: "):
        settings = {"lora_dropout": 0.0} | {key: config[key] for key in _READ & config.keys()}
        found = LoraConfig(**settings, targets=(*named, *others))
        for module in modules:  # checked before a wrong rank takes memory
            A, r = tensors.get(f"{_ROOT}{module}.lora_A.weight"), found.for_layer(module).r
            check(A is None or A.shape[:1] == (r,), "r", r, f"that of the weights of {module!r}")
    return found


def _modules(tensors: Iterable[str]) -> list[str]:
    """The layers that tensors of these names adapt."""
    return sorted({match[1] for match in map(_FACTOR.fullmatch, tensors) if match})


def _factors(layers: Mapping[str, LoRALinear], adapter: str) -> dict[str, Tensor]:
    """An adapter's factors under PEFT's names."""
    return {
        f"{_ROOT}{module}.{side}.weight": getattr(layer, side)[adapter]
        for module, layer in layers.items()
        for side in ("lora_A", "lora_B")
    }


def _heads(model: nn.Module, folder: Path, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, by PEFT's names, that the folder's `modules_to_save` replace."""
    state = model.state_dict(keep_vars=True).items()
    places = {_ROOT + name: value for name, value in state if not _OURS.search(name)}
    whole: dict[str, Tensor] = {}
    for head in read_json(folder / CONFIG).get("modules_to_save") or ():
        # PEFT compares ends of names, so its "classifier" also means "pre_classifier".
        names = [name for name, _ in model.named_modules() if name.endswith(str(head))]
        meant = [{k: v for k, v in places.items() if k.startswith(f"{_ROOT}{n}.")} for n in names]
        for module in [m for m in meant if m.keys() & saved.keys()] or meant[:1]:
            whole |= module
    return whole


def _trained_modules(model: nn.Module) -> list[str]:
    """The largest modules that are no adapters and whose parameters are all trainable.

    Raises UserError for a trainable parameter outside of them.
    """
    trained = {p for p in model.parameters() if p.requires_grad} - lora_parameters(model)
    found: list[str] = []
    for name, module in model.named_modules():
        own = {*module.parameters()}
        if name and own and own <= trained and not name.startswith(tuple(f"{f}." for f in found)):
            found.append(name)
    inside = tuple(f"{name}." for name in found)
    for name, parameter in model.named_parameters():
        if parameter in trained and not name.startswith(inside):
            what = f"parameter {name!r} is trainable, but neither in an adapter nor in a module"
            raise UserError(f"{what} that is trainable as a whole: PEFT has no place for it")
    return found


def _peft_config(model: nn.Module, layers: Mapping[str, LoRALinear], adapter: str) -> dict:
    settings = {module: layer.settings[adapter] for module, layer in layers.items()}
    if len({s.rslora for s in settings.values()}) > 1:
        raise UserError(f"adapter {adapter!r} has rslora on some layers only; PEFT has it on all")
    first = next(iter(settings.values()))
    r = Counter(s.r for s in settings.values()).most_common(1)[0][0]
    alpha = Counter(s.alpha for s in settings.values()).most_common(1)[0][0]
    # Ends of names if PEFT finds exactly these modules by them, otherwise whole names.
    ends = set(first.targets or ())
    meant = {name for name, _ in model.named_modules() if ends_with(name, *ends)}
    # Anchored, because PEFT also matches a bare name with longer names that end in it.
    exact = {f"^{re.escape(module)}": own for module, own in settings.items()}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": sorted(ends if meant == layers.keys() else layers),
        "rank_pattern": {n: s.r for n, s in exact.items() if s.r != r},
        "alpha_pattern": {n: s.alpha for n, s in exact.items() if s.alpha != alpha},
        "bias": "none",
    }
