"""LoRA on a whole model: which layers get it, which adapters act, merging, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from warnings import warn
from zlib import crc32

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Linear, Packed
from fastlora.lora import targets
from fastlora.lora.config import LoraConfig
from fastlora.lora.layer import DEFAULT, LoRALinear, draw_number, lora_layers, lora_parameters
from fastlora.lora.routing import Segment, active_adapters, adapter_names, check_names, pick, scope

# Attributes that `inject` sets: which parameters were trainable before, and a parent's settings.
_BEFORE, _NESTED = "_trained_before_inject", "_nested_before_inject"


def inject(
    model: nn.Module, config: LoraConfig | Mapping[str, LoraConfig], *, train: targets.Train = ()
) -> dict[str, LoRALinear]:
    """Freeze `model`, its heads too, and put LoRA on its target linear layers, in place.

    `model` is any module; `config` are one adapter's settings, or {adapter name: settings}. Modules
    or parameters named in `train` (or by the end of their names) stay trainable; a warning names a
    new head that does not. On a model that has adapters, new ones are added; one that a layer has
    with the same settings is kept, and trainable parameters stay trainable. A single adapter is
    active; of several, choose by `set_adapter` or `use_adapter`. Pass the whole model to be saved.

    Returns the layers of these adapters by module name. Raises UserError, with nothing changed, for
    a target that matches nothing or cannot be adapted, and for a distributed model.
    """
    configs = dict(config) if isinstance(config, Mapping) else {DEFAULT: config}
    targets.check_model(model, configs)
    kept = targets.trained_parameters(model, train)
    plan = [
        (name, adapter, settings.for_layer(name))
        for adapter, settings in configs.items()
        for name in targets.target_names(model, settings, kept)
    ]
    for name, adapter, settings in plan:
        targets.check_layer(model, name, adapter, settings)
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
    except Exception as error:
        for layer, adapter in added:
            for place in (layer.settings, layer.streams, layer.lora_A, layer.lora_B):
                place.pop(adapter)
        for name in lora_layers(model).keys() - layers.keys():
            model.get_submodule(name).to_linear()  # type: ignore[operator]
        raise UserError(f"{type(model).__name__} takes no adapters: {error}") from error
    if _BEFORE not in vars(model):
        vars(model)[_BEFORE] = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in {*model.parameters()} - lora_parameters(model):
            parameter.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
    heads = {name: m for name, m in model.named_children() if name in targets.NEW_HEADS}
    if new := [name for name, head in heads.items() if targets.is_untrained(head)]:
        what = f"inject froze {' and '.join(new)} of {type(model).__name__}, which looks random"
        warn(f"{what}; to train it, too: inject(model, config, train={tuple(new)})", stacklevel=2)
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


@torch.no_grad()
def merge(model: nn.Module, *adapters: str) -> None:
    """Fold adapters (by default the active ones) into the weights of the layers that have them.

    The sum is taken in fp32 or wider and rounded once. The state dict of a merged model has the
    merged `weight`, and W0 as `base_weight`; loading it into an unmerged model loads W0. UserError,
    with nothing changed, where that is impossible, and where a sum is not finite.
    """
    layers = lora_layers(model)
    check_names(layers.values(), adapters)
    weights = {}
    for name, layer in layers.items():
        chosen = dict.fromkeys(adapters or active_adapters(layer))
        own = [adapter for adapter in chosen if adapter in layer.settings]
        if own and layer.merged:
            raise UserError(f"adapter {' and '.join(layer.merged)} is merged already: unmerge it")
        W = layer._parameters.get("weight")  # an offloaded one is on the meta device
        if own and not (layer.base_is_plain and type(W) is nn.Parameter and not W.is_meta):
            why = f"{layer.base_class.__name__} is no plain linear layer with its weight in memory"
            raise UserError(f"layer {name!r} cannot be merged: {why}")
        if own:
            weights[name] = own, _merged_weight(layer, own)
            if not weights[name][1].isfinite().all() and layer.weight.isfinite().all():
                raise UserError(f"layer {name!r}: W0 + BA is not finite in {layer.weight.dtype}")
    if not weights:
        raise UserError(f"{type(model).__name__} has no active adapter to merge")
    for name, (own, weight) in weights.items():
        layer = layers[name]
        # W0, which may be tied, stays as it is. In a list, it is not registered as a parameter.
        layer.base_parameter = [layer.weight]  # type: ignore[list-item]
        layer.register_buffer("base_weight", layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        factors = [side[adapter] for side in (layer.lora_A, layer.lora_B) for adapter in own]
        layer.frozen_by_merge = [factor for factor in factors if factor.requires_grad]
        for factor in factors:  # an optimiser skips parameters without a gradient
            factor.requires_grad_(False).grad = None
        layer.merged = tuple(own)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: restore W0 bit for bit, and make trainable again what `merge` froze."""
    for layer in _merged_layers(model):
        (parameter,), W0 = layer.base_parameter, layer.base_weight
        if (parameter.dtype, parameter.device) != (W0.dtype, W0.device):  # the layer has moved
            parameter.data = W0
        for factor in layer.frozen_by_merge:
            factor.requires_grad_(True)
        layer.weight, layer.merged = parameter, ()
        del layer.base_parameter, layer.frozen_by_merge, layer.base_weight


def merge_and_unload(model: nn.Module, *adapters: str) -> nn.Module:
    """Merge adapters (by default the active ones) and leave plain layers.

    What is merged already stays, and nothing is added to it. Returns the model. Raises UserError
    as `merge` and `eject`, and for a tied weight, which `save_pretrained` would lose.
    """
    _check_removable(model)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            _check_tied(module)
    if not _merged_layers(model):
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
    choice = pick(adapters, rows, seed)
    check_names(layers, choice.names)
    return scope(layers, choice)


def pack(model: nn.Module) -> None:
    """Let a model's frozen linear layers keep packed copies of their weights.

    After a write that PyTorch does not count (see `Packed`), call `pack` again.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.packed = module.packed or Packed()
            module.packed.clear()  # and what captured CUDA graphs read stays with it


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
            module.save_pretrained = partial(_save_pretrained, module)  # type: ignore


def _check_removable(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        if reason := layer.why_not_removable():
            raise UserError(f"layer {name!r} cannot be turned back: {reason}")


def _merged_layers(model: nn.Module) -> list[LoRALinear]:
    """The layers that something is merged into."""
    return [layer for layer in lora_layers(model).values() if layer.merged]


def _merged_weight(layer: LoRALinear, names: Sequence[str]) -> Tensor:
    """W0 + sum of scale B A [out, in], in fp32 or wider, rounded to the weight's type once."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    weight = layer.weight.to(dtype)
    for name in names:
        A, B = layer.lora_A[name].to(dtype), layer.lora_B[name].to(dtype)
        weight = weight + layer.settings[name].scale * B @ A
    return weight.to(layer.weight.dtype)


def _save_pretrained(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """transformers' `save_pretrained` with the active adapters merged into what is written."""
    if keywords.get("state_dict") is not None:
        raise UserError("save_pretrained got a state_dict, into which no adapter can be merged")
    _check_tied(module)
    save = partial(type(module).save_pretrained, module, *arguments, **keywords)  # type: ignore
    if _merged_layers(module) or not any(map(active_adapters, lora_layers(module).values())):
        return save()
    merge(module)
    try:
        return save()
    finally:
        unmerge(module)


def _check_tied(module: nn.Module) -> None:
    """Raise a UserError where a merged weight would be saved as the one that W0 is tied to."""
    owned = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for name, layer in lora_layers(module).items():
        # The W0 of a merged layer is not among the model's parameters.
        others = owned[id(layer.base_parameter[0])] if layer.merged else owned[id(layer.weight)] - 1
        if others > 0:
            why = f"the weight of {name!r} is tied to another, which would be saved in its place"
            raise UserError(f"{why} (expected save_adapter, or targets without this layer)")
