"""Runs PEFT's LoRA layers by the fused operation, as long as they are plain LoRA."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.interop.swap import Swapped, SwappedDropout, own_class, warn
from fastlora.kernels import MOST, Dropout, Linear, Term, lora_grouped
from fastlora.kernels.ops import is_small
from fastlora.lora.layer import LoRALinear
from fastlora.lora.together import Product, call_is_plain, has_hooks


def is_lora_layer(module: nn.Module) -> bool:
    """Whether it is a LoRA layer of PEFT, of any kind."""
    return any(f"{c.__module__}.{c.__name__}" == _LAYER for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether it is exactly PEFT's LoRA layer for linear layers, not a subclass of it."""
    kind = own_class(type(module))
    return f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.Linear"


_DROPOUTS = (nn.Dropout.forward, Dropout.forward, SwappedDropout.forward)
_LAYER = "peft.tuners.lora.layer.LoraLayer"


class PeftLinear(Swapped):
    """`peft.tuners.lora.Linear` that computes its active adapters in one fused operation.

    If a call is more than plain LoRA, PEFT's own forward runs.
    """

    out_features: int
    scaling: dict[str, float]
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        found: Product | str = ""
        if torch.compiler.is_compiling():
            warn(type(self).__name__)
        elif args or kwargs:
            found = f"a call with {', '.join(kwargs) or 'more inputs'}"
        elif not is_small(x, self.out_features):
            found = self.plan(x)
        if isinstance(found, Product):
            return lora_grouped(x, *found)
        if found:
            self.warn_fallback(found)
        return super().forward(x, *args, **kwargs)

    def product(self, x: Tensor, column: int) -> Product | None:
        """The layer's part of a joint product in `project_together`; None if its call does more."""
        found = self.plan(x, column)
        return found if isinstance(found, Product) else None

    def plan(self, x: Tensor | None = None, column: int = 0) -> Product | str:
        """The product that a call computes, from this column of a joint product on.

        If the call is more than plain LoRA, the reason as text. Without x, dtypes are not checked.
        """
        # Parts are read where PyTorch keeps them: its look-ups by name cost more than all the rest.
        parts: Any = self._modules
        base, disabled, merged = parts["base_layer"], self.disable_adapters, self.merged
        if self.fan_in_fan_out:
            return "fan_in_fan_out"
        if disabled and merged:
            return "merged adapters are disabled, and PEFT must unmerge them"
        linear = isinstance(base, nn.Linear) and not isinstance(base, LoRALinear)
        if not (linear and call_is_plain(base)):
            return f"its base layer, a {type(base).__name__}, does more than a plain linear layer"
        weight, lora_A = cast(Tensor, base._parameters["weight"]), parts["lora_A"]._modules
        terms: list[Term] = []
        types = {weight.dtype}
        for name in () if disabled or merged else self.active_adapters:
            if name not in lora_A:
                continue
            variants = getattr(self, "lora_variant", None) or getattr(self, "use_dora", {})
            if variant := variants.get(name):
                kind = "DoRA" if variant is True else type(variant).__name__
                return f"adapter {name!r} is not plain LoRA but {kind}"
            if not isinstance(scale := self.scaling[name], (int, float)):
                return f"adapter {name!r} has a scale that is no number"
            A, B = lora_A[name], parts["lora_B"]._modules[name]
            if not (call_is_plain(A) and call_is_plain(B)):
                return f"adapter {name!r} has hooks on its factors, or they are sharded"
            A, B = A._parameters, B._parameters
            if A["bias"] is not None or B["bias"] is not None:
                return f"adapter {name!r} has biases"
            if (p := _rate(parts["lora_dropout"]._modules[name])) < 0:
                return f"adapter {name!r} has an unknown kind of dropout, or a rate near 1"
            # One seed serves all terms of a product: their masks differ by adapter and column.
            stream = column * 64 + len(terms)
            terms.append(Term(A["weight"], B["weight"], scale, p, stream, column=column))
            types.add(A["weight"].dtype)
        if x is not None and types != {x.dtype}:
            autocast = torch.is_autocast_enabled(x.device.type)
            if x.dtype == torch.float64 or not autocast:
                return "mixed types without autocast"
        packed = base.packed_for(x) if x is not None and isinstance(base, Linear) else None
        return Product(weight, base._parameters["bias"], terms, packed=packed)


def _rate(dropout: nn.Module) -> float:
    """The dropout rate now; negative for a module that we do not know."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout).forward not in _DROPOUTS or has_hooks(dropout):
        return -1.0
    p = float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]
    return p if p <= MOST else -1.0
