"""Changes modules' classes to classes of ours, in place, and back to their own.

The new class is a subclass of the module's own and has its name, so that `isinstance`, parameters,
state dicts and the place in the model stay what they were. Only `type(module)` changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Dropout, Linear, Packed

MIN_FAST_DROPOUT = 16384  # elements from which our dropout is faster
_FORWARDS = ("forward", "_old_forward")  # the second is that of Hugging Face accelerate's hooks


class Swapped(nn.Module):
    """Base class of all classes that `swap` gives to modules."""

    swapped_from: type[nn.Module]

    def warn_fallback(self, reason: str) -> None:
        """Warn that a call runs the module's own forward; once for each model and reason."""
        warned = vars(self)["_warned"]
        if reason not in warned:
            warned.add(reason)
            warn(type(self).__name__, reason)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find the class by its name.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_new, (type(self).__mro__[1], type(self).swapped_from), *rest)


@torch.compiler.assume_constant_result  # so it also warns while torch.compile traces
def warn(name: str, reason: str = "a compiled model uses the module's own forward") -> None:
    """Warn that a call of a module of this class runs the module's own forward."""
    text = f"fastlora.accelerate does not apply to a call of {name}, run as before: {reason}"
    warnings.warn(text, stacklevel=4)


class SwappedLinear(Swapped, Linear):
    """An `nn.Linear` of an accelerated encoder.

    If it has more inputs than outputs, it keeps packed copies of its frozen weight from its first
    large input on: on a CPU they take 0.72 to 0.85 of a product's time (mostly 0.92 to 0.98 for
    other shapes, which is not worth the memory). They are watched for changes of the weight.
    """

    def packed_for(self, input: Tensor) -> Packed | None:
        """The packed copies that a product with this input [..., in] uses."""
        if self.weight.requires_grad or not input.is_cpu:
            self.packed = None
        elif self.packed is None and self.in_features > self.out_features:
            rows = input.numel() // self.in_features
            self.packed = Packed(watched=True) if rows >= 1.5 * self.out_features else None
        return self.packed


class SwappedDropout(Swapped, Dropout):
    """An `nn.Dropout` of an accelerated encoder."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Drop elements of `input`; if it has few elements, by PyTorch's own dropout."""
        if not self.training or input.numel() < MIN_FAST_DROPOUT:
            return torch.dropout(input, self.p, self.training)
        return super().forward(input)


@cache
def swapped_class(mixin: Any, base: Any) -> type[Swapped]:
    """A subclass of `base` whose methods are those of `mixin` first."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), {**names, "swapped_from": base})


def own_class(kind: type) -> type:
    """The class that a module of this class had before it was swapped."""
    return vars(kind).get("swapped_from", kind)


def _new(mixin: Any, base: Any) -> Swapped:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: Any, warned: set[str]) -> None:
    """Give a module the methods of a mixin; `warned` has the warnings that its model has given."""
    module.__class__ = swapped_class(mixin, type(module))  # type: ignore[arg-type]
    vars(module)["_warned"] = warned


def swap_back(modules: Iterable[nn.Module]) -> None:
    """Give modules their own classes back; UserError, with nothing changed, where that fails."""
    swapped = [module for module in modules if isinstance(module, Swapped)]
    for module in swapped:
        name, forward = type(module).__name__, vars(module).get("forward")
        if "swapped_from" not in vars(type(module)):
            why = "its class has changed since (it was parametrised or sharded)"
        elif not (forward is None or _is_ours(module, forward) or "_old_forward" in vars(module)):
            why = "its forward has been replaced since"
        else:
            continue
        raise UserError(f"a {name} cannot be restored: {why}; undo that first")
    for module in swapped:
        base = type(module).swapped_from
        for name in _FORWARDS:
            if _is_ours(module, vars(module).get(name)):
                vars(module)[name] = MethodType(base.forward, module)
        module.__class__ = base  # type: ignore[assignment]
        for name in ("_warned", "packed"):
            vars(module).pop(name, None)


def _is_ours(module: nn.Module, forward: Any) -> bool:
    """Whether this is our forward, bound to the module."""
    return getattr(forward, "__func__", None) is type(module).forward
