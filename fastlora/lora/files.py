"""Adapters on disk in PEFT's format, for any module; loading is all or nothing.

An adapter's folder holds `adapter_config.json` and `adapter_model.safetensors`: the factors under
PEFT's names, and what else was trained (heads) whole, as PEFT's `modules_to_save`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.files import read_json, write_json
from fastlora.lora.config import TARGETS, LoraConfig, is_target
from fastlora.lora.layer import DEFAULT, LoRALinear, lora_layers, lora_parameters
from fastlora.lora.model import inject
from fastlora.lora.routing import adapter_names
from fastlora.tensors import check_tensors, read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OURS = re.compile(r"\.(lora_[AB]\.[^.]+|base_weight)$")  # in a state dict, of adapters

# The types or values that PEFT's settings have in plain LoRA; any other setting must be unset.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "bias": ("none",),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "modules_to_save": (list,),
    # PiSSA, OLoRA, CorDA and LoftQ also change the base weights, which are not in the folder.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Notes for other tools.
_NOTES = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
# Without effect on their own, or already said by the names of the tensors.
_IDLE = {"exclude_modules", "inference_mode", "megatron_core", "qalora_group_size"}
_ANY = _NOTES | _IDLE | {"target_modules"}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    base_model: str = "",
    heads: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter (by default the only one) and, with `heads`, what else trains, as PEFT does.

    `base_model` is the name or path of the base for PEFT's `base_model_name_or_path`; `metadata`
    goes into the safetensors file. Raises UserError for an unknown adapter, and for a trainable
    parameter that the format has no place for, as a bias of an adapted layer.
    """
    layers, folder = lora_layers(model), Path(folder)
    known = adapter_names(layers.values())
    name = known[0] if adapter is None and len(known) == 1 else adapter
    own = {module: layer for module, layer in layers.items() if name in layer.settings}
    if wrapped := [m for m in own if not m or m.split(".")[0] in ("module", "_orig_mod")]:
        raise UserError(
            f"layer {wrapped[0]!r} has no name in PEFT's format (expected the model itself, not a "
            "single layer, nor what DistributedDataParallel or torch.compile made of it)"
        )
    if name is None or not own:
        there = ", ".join(map(repr, known)) or "none"
        raise UserError(f"the model has no adapter named {name!r} (its adapters: {there})")
    tensors: dict[str, Tensor] = {}
    for module, layer in own.items():
        tensors[f"{_ROOT}{module}.lora_A.weight"] = layer.lora_A[name]
        tensors[f"{_ROOT}{module}.lora_B.weight"] = layer.lora_B[name]
    modules = _trained_modules(model) if heads else []
    for module in modules:
        state = model.get_submodule(module).state_dict()
        tensors |= {f"{_ROOT}{module}.{key}": value for key, value in state.items()}
    config = _peft_config(model, own, name)
    config |= {"base_model_name_or_path": base_model or None}
    if modules:
        config["modules_to_save"] = modules
    # A sharded parameter is gathered: all processes take part.
    tensors = {k: getattr(t, "full_tensor", lambda t=t: t)() for k, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    parts = {file: folder / f".{file}.{os.getpid()}" for file in (WEIGHTS, CONFIG)}
    try:
        write_tensors(parts[WEIGHTS], tensors, **(metadata or {}))
        write_json(parts[CONFIG], config)
        for file, part in parts.items():
            os.replace(part, folder / file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def load_adapter(model: nn.Module, folder: str | Path, adapter: str = DEFAULT) -> None:
    """Load an adapter of ours or of PEFT, and the heads saved with it; on UserError, nothing.

    A model without this adapter gets it by `inject`; heads stay trainable. Refuses anything but
    plain LoRA, settings other than the model's, and missing, unexpected, misshapen or non-finite
    tensors.
    """
    folder = Path(folder)
    config, tensors, state = read_config(folder), read_tensors(folder / WEIGHTS)[0], {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    own = {n: m for n, m in lora_layers(model).items() if adapter in m.settings}
    modules = list(own) or _modules(tensors)
    for module in modules:
        if module not in linears:
            raise UserError(f"{folder / WEIGHTS}: {module!r} is no linear layer of the model")
        linear, r = linears[module], config.of_layer(module).r
        for side, shape in (("A", (r, linear.in_features)), ("B", (linear.out_features, r))):
            device = "meta" if linear.weight.is_meta else "cpu"
            state[f"{module}.lora_{side}.weight"] = torch.empty(shape, device=device)
    for module in own:
        _check_settings(folder / CONFIG, config.of_layer(module), own[module], adapter)
    factors, heads = set(state), read_json(folder / CONFIG).get("modules_to_save") or []
    everything = model.state_dict(keep_vars=True)
    whole = [key for key in tensors if not _FACTOR.fullmatch(key)]
    for head in heads:
        # PEFT compares the ends of names, so that its "classifier" is "pre_classifier", too.
        meant = [name for name, _ in model.named_modules() if name.endswith(str(head))]
        there = [m for m in meant if any(key.startswith(f"{_ROOT}{m}.") for key in whole)]
        for module in there or meant[:1]:
            inside = [n for n in everything if n.startswith(f"{module}.") and not _OURS.search(n)]
            state |= {name: everything[name] for name in inside}
    if any(value.is_meta for value in state.values()):
        raise UserError(f"{folder / WEIGHTS}: the model lies on the meta device, or is offloaded")
    check_tensors(folder / WEIGHTS, tensors, {_ROOT + name: value for name, value in state.items()})
    trained = [name for name in state if name not in factors]
    if not own:
        exact = replace(config, targets=tuple(map(re.escape, modules)))
        parameters = [name for name in trained if isinstance(state[name], nn.Parameter)]
        own = inject(model, {adapter: exact}, train=parameters)
    for module in modules:
        state[f"{module}.lora_A.weight"] = own[module].lora_A[adapter]
        state[f"{module}.lora_B.weight"] = own[module].lora_B[adapter]
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[_ROOT + name])


def read_config(folder: Path) -> LoraConfig:
    """An adapter's settings, from a folder of ours or of PEFT, for `inject`.

    The targets follow from the weights' names; the configuration gives the rest. Raises UserError
    naming whatever is not plain LoRA.
    """
    path = folder / CONFIG
    config = read_json(path)
    if missing := {"peft_type", "r", "lora_alpha"} - config.keys():
        raise UserError(f"{path}: {min(missing)} is missing (expected PEFT's LoRA settings)")
    for key, value in config.items():
        plain = _PLAIN.get(key, (value,) if key in _ANY or not value else ())
        if value is not None and value not in plain and type(value) not in plain:
            raise UserError(f"{path}: {key} is {value!r}, but only plain LoRA can be loaded")
    modules = _modules(read_tensors(folder / WEIGHTS)[0])
    if not modules:
        raise UserError(f"{folder / WEIGHTS}: holds no LoRA weights")
    named = [t for t in TARGETS if any(is_target(module, t) for module in modules)]
    others = [m for m in modules if not any(is_target(m, target) for target in TARGETS)]
    try:
        return LoraConfig(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            rslora=config.get("use_rslora") or False,
            targets=(*named, *others),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _modules(tensors: Iterable[str]) -> list[str]:
    """The layers that tensors of these names adapt."""
    return sorted({match[1] for match in map(_FACTOR.fullmatch, tensors) if match})


def _check_settings(path: Path, theirs: LoraConfig, layer: LoRALinear, adapter: str) -> None:
    """Raise UserError unless the model's adapter is as the file has it; dropout does not matter."""
    ours = layer.settings[adapter]
    if adapter in layer.merged:
        raise UserError(f"{path}: adapter {adapter!r} is merged; unmerge it first")
    if not replace(theirs, dropout=ours.dropout).is_like(ours):
        raise UserError(
            f"{path}: holds {theirs}, but the model was built with {ours}; build it with the "
            "adapter's own settings"
        )


def _trained_modules(model: nn.Module) -> list[str]:
    """The largest modules that train whole, and are no adapters.

    Raises UserError for a trainable parameter outside of them.
    """
    factors = {id(p) for layer in lora_layers(model).values() for p in lora_parameters(layer)}
    left = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors}
    found: list[str] = []
    for name, module in model.named_modules():
        own = list(module.parameters())
        whole = own and all(p.requires_grad and id(p) not in factors for p in own)
        if name and whole and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
            left = {n: p for n, p in left.items() if not n.startswith(f"{name}.")}
    if left:
        raise UserError(
            f"parameter {next(iter(left))!r} trains, but is neither in an adapter nor in a module "
            "that trains whole: PEFT's format has no place for it"
        )
    return found


def _peft_config(
    model: nn.Module, layers: Mapping[str, LoRALinear], adapter: str
) -> dict[str, Any]:
    settings = {module: layer.settings[adapter] for module, layer in layers.items()}
    if len({s.rslora for s in settings.values()}) > 1:
        raise UserError(f"adapter {adapter!r} has rslora on some layers only; PEFT has it on all")
    first = next(iter(settings.values()))
    r = Counter(s.r for s in settings.values()).most_common(1)[0][0]
    alpha = Counter(s.alpha for s in settings.values()).most_common(1)[0][0]
    # The ends of names where PEFT finds the same modules by them, else whole names.
    ends = set(first.targets or ())
    meant = {n for n, _ in model.named_modules() if any(f".{n}".endswith(f".{e}") for e in ends)}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": sorted(ends if meant == layers.keys() else layers),
        # Anchored, for PEFT would take a bare name as the end of other names, too.
        "rank_pattern": {f"^{re.escape(n)}": s.r for n, s in settings.items() if s.r != r},
        "alpha_pattern": {
            f"^{re.escape(n)}": s.alpha for n, s in settings.items() if s.alpha != alpha
        },
        "bias": "none",
    }
