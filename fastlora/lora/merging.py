"""Merging of adapters into the weights and unmerging, in memory and in `save_pretrained`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.lora.layer import LoRALinear, lora_layers
from fastlora.lora.routing import active_adapters, check_names


@torch.no_grad()
def merge(model: nn.Module, *adapters: str) -> None:
    """Fold adapters (by default the active ones) into the weights of the layers that have them.

    The sum is taken in fp32 or wider and rounded once. The state dict of a merged model has the
    merged `weight`, and W0 as `base_weight`; loading it into an unmerged model loads W0.

    Raises UserError, with nothing changed, for an unknown name, where something is merged already,
    where a layer's forward is not that of `nn.Linear`, and where a sum is not finite.
    """
    layers = lora_layers(model)
    check_names(layers.values(), adapters)
    weights = {}
    for name, layer in layers.items():
        chosen = dict.fromkeys(adapters or active_adapters(layer))
        own = [adapter for adapter in chosen if adapter in layer.settings]
        if own and layer.merged:
            merged = " and ".join(layer.merged)
            raise UserError(f"adapter {merged} is merged already: unmerge it first")
        W = layer._parameters.get("weight")  # an offloaded one is on the meta device
        if own and not (layer.base_is_plain and type(W) is nn.Parameter and not W.is_meta):
            raise UserError(
                f"layer {name!r} cannot be merged: {layer.base_class.__name__} is not a plain "
                "linear layer whose weight is in memory"
            )
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
    for layer in merged_layers(model):
        (parameter,), W0 = layer.base_parameter, layer.base_weight
        if (parameter.dtype, parameter.device) != (W0.dtype, W0.device):  # the layer has moved
            parameter.data = W0
        for factor in layer.frozen_by_merge:
            factor.requires_grad_(True)
        layer.weight, layer.merged = parameter, ()
        del layer.base_parameter, layer.frozen_by_merge, layer.base_weight


def merged_layers(model: nn.Module) -> list[LoRALinear]:
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


def save_pretrained(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """transformers' `save_pretrained` with the active adapters merged into what is written.

    Any reader of the folder gets the trained weights. A model with adapters that loads it, as in a
    resumed Trainer, gets W0 and the adapters back.
    """
    if keywords.get("state_dict") is not None:
        raise UserError("save_pretrained got a state_dict, into which no adapter can be merged")
    check_tied(module)
    save = partial(type(module).save_pretrained, module, *arguments, **keywords)  # type: ignore
    if merged_layers(module) or not any(map(active_adapters, lora_layers(module).values())):
        return save()
    merge(module)
    try:
        return save()
    finally:
        unmerge(module)


def check_tied(module: nn.Module) -> None:
    """Raise a UserError where a merged weight would be saved as the one that W0 is tied to."""
    owned = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for name, layer in lora_layers(module).items():
        # The W0 of a merged layer is not among the model's parameters.
        others = owned[id(layer.base_parameter[0])] if layer.merged else owned[id(layer.weight)] - 1
        if others > 0:
            raise UserError(
                f"the weight of {name!r} is tied to another, and merging would break the tie: the "
                "other would be saved (expected save_adapter, or targets without this layer)"
            )
