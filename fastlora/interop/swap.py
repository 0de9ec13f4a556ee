"""Modules that are given a class of ours in place, and their own class back.

The new class is a subclass of the module's own, of the same name, so that whatever looks at the
module (its type, its parameters, its state dict, its place in the model) finds what it was.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Dropout, Linear

FEW = 16384  # elements from which the fast dropout is faster


class Swapped(nn.Module):
    """What all modules with a class of ours have in common."""

    swapped_from: type[nn.Module]

    def step_aside(self, reason: str) -> None:
        """Warn, once a model and reason, that a call takes the module's own way."""
        said = vars(self)["_said"]
        if reason not in said:
            said.add(reason)
            text = f"fastlora.accelerate steps aside in {type(self).__name__}: {reason}"
            warnings.warn(text, stacklevel=3)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no place where it could be found by its name.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_new, (type(self).__mro__[1], type(self).swapped_from), *rest)


class SwappedLinear(Swapped, Linear):
    """An `nn.Linear` of an accelerated encoder."""


class SwappedDropout(Swapped, Dropout):
    """An `nn.Dropout` of an accelerated encoder."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Drop elements of `input`, of few ones as PyTorch does."""
        if input.numel() < FEW:
            return nn.Dropout.forward(self, input)
        return super().forward(input)


@cache
def swapped_class(mixin: Any, base: Any) -> type[Swapped]:
    """The class of `base` with the methods of `mixin` before its own."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), {**names, "swapped_from": base})


def _new(mixin: Any, base: Any) -> Swapped:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: Any, said: set[str]) -> None:
    """Give a module the methods of a mixin; `said` is what its model has warned of."""
    if not isinstance(module, Swapped):
        module.__class__ = swapped_class(mixin, type(module))  # type: ignore[arg-type]
    vars(module)["_said"] = said


def swap_back(model: nn.Module) -> None:
    """Give all modules their own classes back; UserError where a class has changed since."""
    swapped = {n: m for n, m in model.named_modules() if isinstance(m, Swapped)}
    for name, module in swapped.items():
        if "swapped_from" not in vars(type(module)):
            raise UserError(
                f"module {name!r} cannot be restored: its class has become {type(module).__name__} "
                "since (parametrised or sharded); undo that first"
            )
    for module in swapped.values():
        module.__class__ = type(module).swapped_from  # type: ignore[assignment]
        vars(module).pop("_said", None)
