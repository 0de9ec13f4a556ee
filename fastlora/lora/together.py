"""Computes several layers with the same input, such as query, key and value, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora.kernels import Linear, Packed, Term, lora_grouped
from fastlora.kernels.ops import copies_of, is_small
from fastlora.lora.layer import PLAIN, LoRALinear

hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Product(NamedTuple):
    """The arguments of `lora_grouped` that compute exactly what a call of a layer computes."""

    weight: Tensor
    bias: Tensor | None
    terms: Sequence[Term] = ()
    seed: Tensor | None = None
    packed: Packed | None = None


def project_together(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Several layers of one input, side by side: x [..., in] -> [..., sum of out].

    If each is a linear layer, with or without adapters, whose call does nothing else, one product
    computes them all; otherwise each layer is called.
    """
    width = sum(getattr(layer, "out_features", 0) for layer in layers)
    if getattr(layers[0], "packed", None) is None and is_small(x, width):
        # With few rows, concatenating the weights takes longer than the product.
        return torch.cat([layer(x) for layer in layers], -1)
    products: list[Product] = []
    for layer in layers:
        column = sum(len(other.weight) for other in products)
        if (product := product_of(layer, x, column)) is None:
            break
        products.append(product)
    weights, biases = [p.weight for p in products], [p.bias for p in products if p.bias is not None]
    kinds = {(weight.dtype, weight.device) for weight in weights}
    if len(products) < len(layers) or len(biases) not in (0, len(layers)) or len(kinds) > 1:
        return torch.cat([layer(x) for layer in layers], -1)
    terms = [term for product in products for term in product.terms]
    seed = next((product.seed for product in products if product.seed is not None), None)

    def join() -> tuple[Tensor, Tensor | None, Packed]:
        return torch.cat(weights), torch.cat(biases) if biases else None, Packed()

    parts = weights + biases
    packed = None if any(part.requires_grad for part in parts) else products[0].packed
    copies = copies_of(x, packed, *parts)
    weight, bias, inner = copies.get("together", join)
    return lora_grouped(x, weight, bias, terms, seed, None if copies.kept is None else inner)


def product_of(layer: Any, x: Tensor, column: int = 0) -> Product | None:
    """The layer's part of a joint product, from this column on; None if its call does more."""
    if not isinstance(layer, nn.Linear):
        known = hasattr(layer, "product") and not has_hooks(layer)
        return layer.product(x, column) if known else None
    if not call_is_plain(layer):
        return None
    packed = layer.packed_for(x) if isinstance(layer, Linear) else None
    terms, seed = layer.terms(x, column) if isinstance(layer, LoRALinear) else ([], None)
    return Product(layer.weight, layer.bias, terms, seed, packed)


def call_is_plain(layer: nn.Linear) -> bool:
    """Whether a call of the layer is x W^T + b, with adapters or without, and nothing else."""
    ours, parameters = isinstance(layer, LoRALinear) and layer.base_is_plain, layer._parameters
    return bool(
        type(layer).forward in ((LoRALinear.forward,) if ours else PLAIN)
        and type(parameters.get("weight")) is nn.Parameter
        and "bias" in parameters
        and not has_hooks(layer)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call runs hooks or a forward that was set on the instance."""
    return any(hooks(vars(module))) or "forward" in vars(module) or _has_any_global_hook()
