"""LoRA on a whole model: which layers get it, which adapters act, merging, and the report.

`inject` turns linear layers into LoRALinear in place, so that hooks, ties and other references to
them stay valid. It checks everything first: when it raises, nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from zlib import crc32

from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Linear, Packed
from fastlora.lora.config import LoraConfig
from fastlora.lora.layer import DEFAULT, LoRALinear, draw_number, lora_layers, lora_parameters
from fastlora.lora.merging import check_tied, merge, merged_layers, save_pretrained, unmerge
from fastlora.lora.routing import Choice, Segment, adapter_names, by_rows, check_names, scope
from fastlora.lora.targets import check_layer, check_model, target_names, trained_parameters

# Attributes that `inject` sets: which parameters were trainable before, and a parent's settings.
_BEFORE, _NESTED = "_trained_before_inject", "_nested_before_inject"


def inject(
    model: nn.Module,
    config: LoraConfig | Mapping[str, LoraConfig],
    *,
    train: Sequence[str] = (),
) -> dict[str, LoRALinear]:
    """Freeze `model` and put LoRA on its target linear layers, in place.

    `model` is any module; `config` are one adapter's settings, or {adapter name: settings}. Modules
    or parameters named in `train` (or by the end of their names) stay trainable. On a model that
    already has adapters, new ones are added; an adapter that a layer already has with the same
    settings is kept, and trainable parameters stay trainable. A single adapter is active; of
    several, choose by `set_adapter` or `use_adapter`. Pass the whole model that you will save:
    `save_pretrained` of a module that contains it would write W0.

    Returns the layers of these adapters by module name. Raises UserError, with nothing changed, for
    a target that matches nothing or cannot be adapted, and for a model whose parameters are
    distributed already.
    """
    configs = dict(config) if isinstance(config, Mapping) else {DEFAULT: config}
    check_model(model, configs)
    kept = trained_parameters(model, train)
    plan = [
        (name, adapter, settings.for_layer(name))
        for adapter, settings in configs.items()
        for name in target_names(model, settings, kept)
    ]
    for name, adapter, settings in plan:
        check_layer(model, name, adapter, settings)
    layers, seed = lora_layers(model), draw_number()
    known = adapter_names(layers.values())
    injected: dict[str, LoRALinear] = {}
    added: list[tuple[LoRALinear, str]] = []
    try:
        for name, adapter, settings in plan:
            layer: Any = model.get_submodule(name)
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear.from_linear(layer, crc32(name.encode()))
            injected[name] = layer
            if adapter not in layer.settings:
                layer.add_adapter(adapter, settings, seed)
                added.append((layer, adapter))
    except Exception as error:  # for example, a subclass may refuse new attributes
        for layer, adapter in added:
            for place in (layer.settings, layer.streams, layer.lora_A, layer.lora_B):
                place.pop(adapter)
        for name in injected.keys() - layers.keys():
            injected[name].to_linear()
        raise UserError(f"{type(model).__name__} takes no adapters: {error}") from error
    if _BEFORE not in vars(model):
        vars(model)[_BEFORE] = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in {*model.parameters()} - lora_parameters(model):
            parameter.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
    changed, active = injected, next((layer.active for layer in layers.values()), None)
    if configs.keys() - {*known}:  # with a new name, none is chosen any more
        changed = lora_layers(model)
        every = adapter_names(changed.values())
        active = every if len(every) == 1 else None
    for layer in changed.values():
        layer.active = active
    _guard_parents(model)
    return injected


def eject(model: nn.Module) -> nn.Module:
    """Undo `inject`: the original layers, bit for bit, and what trained before trains again.

    Returns the model. Raises UserError, with nothing changed, where a layer was parametrised,
    sharded or patched since, and within `use_adapter`.
    """
    _check_removable(model)
    unmerge(model)
    return _without_lora(model)


def merge_and_unload(model: nn.Module, *adapters: str) -> nn.Module:
    """Merge adapters (by default the active ones) and leave plain layers.

    What is merged already stays, and nothing is added to it. Returns the model. Raises UserError
    as `merge` and `eject`, and for a tied weight, which `save_pretrained` would lose.
    """
    _check_removable(model)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            check_tied(module)
    if not merged_layers(model):
        merge(model, *adapters)
    return _without_lora(model)


def set_adapter(model: nn.Module, *adapters: str) -> None:
    """Activate adapters from now on: several add up, no name means none. UserError if unknown."""
    layers, names = lora_layers(model).values(), tuple(dict.fromkeys(adapters))
    check_names(layers, names)
    for layer in layers:
        layer.was_scoped |= layer.active not in (None, names)
        layer.active = names


def use_adapter(
    model: nn.Module | Iterable[LoRALinear],
    *adapters: str,
    rows: Sequence[str | Segment | None] | None = None,
    seed: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Activate adapters in a block of code, in this thread: several add up, no name means none.

    `rows` says instead which adapter each row of the leading dimension uses (None for none), or
    lists segments of rows. `seed` (int64 []) is the seed of all dropout masks. A non-reentrant
    checkpoint in the block is recomputed with the same choice. UserError for an unknown name.
    """
    layers = tuple(lora_layers(model).values() if isinstance(model, nn.Module) else model)
    choice = Choice(tuple(dict.fromkeys(adapters))) if rows is None else by_rows(rows)
    if rows is not None and adapters:
        raise UserError(f"rows and {', '.join(adapters)} are given (expected one of the two)")
    check_names(layers, choice.names)
    return scope(layers, choice._replace(seed=seed))


def pack(model: nn.Module) -> None:
    """Let a model's frozen linear layers keep packed copies of their weights.

    Use it only if you know when the weights change: after a write that PyTorch does not count
    (through `.data`, NumPy or a collective operation), call `pack` again.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.packed = Packed()


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Number of parameters by bucket: "lora", "other trainable", "frozen"."""
    factors, report = lora_parameters(model), {"lora": 0, "other trainable": 0, "frozen": 0}
    for parameter in model.parameters():
        bucket = "lora" if parameter in factors else "other trainable"
        report[bucket if parameter.requires_grad else "frozen"] += parameter.numel()
    return report


def _without_lora(model: nn.Module) -> nn.Module:
    for layer in lora_layers(model).values():
        layer.to_linear()
    for module in model.modules():
        vars(module).update(vars(module).pop(_NESTED, {}))
        if isinstance(vars(module).get("save_pretrained"), partial):
            del module.save_pretrained
        if trained := vars(module).pop(_BEFORE, None):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    return model


def _guard_parents(model: nn.Module) -> None:
    """Keep the modules around the LoRA layers from bypassing them."""
    for module in model.modules():
        if isinstance(module, LoRALinear) or not lora_layers(module):
            continue
        if isinstance(module, nn.TransformerEncoder) and _NESTED not in vars(module):
            # With nested tensors it would read the layers' weights and not call the layers.
            vars(module)[_NESTED] = {"use_nested_tensor": module.use_nested_tensor}
            module.use_nested_tensor = False
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = partial(save_pretrained, module)  # type: ignore


def _check_removable(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        if reason := layer.why_not_removable():
            raise UserError(f"layer {name!r} cannot be turned back: {reason}")
