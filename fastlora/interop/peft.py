"""PEFT's LoRA layer through the fused operation, wherever it is plain LoRA."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.interop.swap import Swapped, SwappedDropout, own_class, say_compiled
from fastlora.kernels import MOST, Dropout, Linear, Term, lora_grouped
from fastlora.lora.layer import LoRALinear
from fastlora.lora.together import Product, has_hooks, is_bare


def is_lora_layer(module: nn.Module) -> bool:
    """Whether it is a LoRA layer of PEFT, of any kind."""
    return any(f"{c.__module__}.{c.__name__}" == _LAYER for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer around a linear layer, and no subclass of that."""
    kind = own_class(type(module))
    return f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.Linear"


_DROPOUTS = (nn.Dropout.forward, Dropout.forward, SwappedDropout.forward)
_LAYER = "peft.tuners.lora.layer.LoraLayer"


class PeftLinear(Swapped):
    """`peft.tuners.lora.Linear`, which adds up its active adapters in one operation.

    Where a call is more than plain LoRA, PEFT's own forward runs.
    """

    scaling: dict[str, float]
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            say_compiled(type(self).__name__)
            return super().forward(x, *args, **kwargs)
        if args or kwargs:
            found: Product | str = f"a call with {', '.join(kwargs) or 'more inputs'}"
        else:
            found = self.plan(x)
        if isinstance(found, str):
            self.step_aside(found)
            return super().forward(x, *args, **kwargs)
        return lora_grouped(x, *found)

    def product(self, x: Tensor, column: int) -> Product | None:
        """What `project_together` makes one product with others; None where a call is more."""
        found = self.plan(x, column)
        return found if isinstance(found, Product) else None

    def plan(self, x: Tensor | None = None, column: int = 0) -> Product | str:
        """What a call computes, from this column of a larger product on.

        Or, where it computes more than plain LoRA, why. Without x, types are not looked at.
        """
        # Parts are read where PyTorch keeps them: its look-ups by name cost more than all the rest.
        parts: Any = self._modules
        base, disabled, merged = parts["base_layer"], self.disable_adapters, self.merged
        if self.fan_in_fan_out:
            return "fan_in_fan_out"
        if disabled and merged:
            return "merged adapters are disabled, and PEFT unmerges them"
        if not isinstance(base, nn.Linear) or isinstance(base, LoRALinear) or not is_bare(base):
            kind = type(base).__name__
            return f"its base layer, a {kind}, is not a linear layer and nothing else"
        weight, lora_A = cast(Tensor, base._parameters["weight"]), parts["lora_A"]._modules
        terms: list[Term] = []
        types = {weight.dtype}
        for name in () if disabled or merged else self.active_adapters:
            if name not in lora_A:
                continue
            variants = getattr(self, "lora_variant", None) or getattr(self, "use_dora", {})
            if variant := variants.get(name):
                kind = "DoRA" if variant is True else type(variant).__name__
                return f"adapter {name!r} is no plain LoRA, but {kind}"
            if not isinstance(scale := self.scaling[name], (int, float)):
                return f"adapter {name!r} has a scale that is no number"
            A, B = lora_A[name], parts["lora_B"]._modules[name]
            if not (is_bare(A) and is_bare(B)):
                return f"adapter {name!r} has hooks on its factors, or they are sharded"
            A, B = A._parameters, B._parameters
            if A["bias"] is not None or B["bias"] is not None:
                return f"adapter {name!r} has biases"
            if (p := _rate(parts["lora_dropout"]._modules[name])) < 0:
                return f"adapter {name!r} has a dropout of its own kind, or near 1"
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
    """The probability to drop now; negative for a module that we do not know."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout).forward not in _DROPOUTS or has_hooks(dropout):
        return -1.0
    p = float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]
    return p if p <= MOST else -1.0
