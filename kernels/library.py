"""The operation's autograd, and the operation as an operator for `torch.compile` and tracing.

Saved for backward are x, u = c (m * x) A^T and the dropout mask's seed; neither the mask nor the
dropped x. Operators take flat lists only, so a call's facts travel as `_FACTS` says: `factors` are
all A, then all B; `scales` the c of each term; `places` five integers a term (first column,
threshold, stream, first row, end).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.kernels.grouped import Shape, padded
from fastlora.kernels.routes import ROUTES, Call


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which PyTorch's operations take the types they are given."""
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _parse(
    weight: Tensor,
    factors: Sequence[Tensor],
    seed: Tensor | None,
    scales: Sequence[float],
    places: Sequence[int],
    route: str,
) -> tuple[Any, Call]:
    """A route, and what it is called with."""
    half, shapes, ranges = len(scales), [], []
    for i, (scale, B) in enumerate(zip(scales, factors[half:], strict=True)):
        column, drop, stream, start, stop = places[5 * i : 5 * i + 5]
        shapes.append(Shape(B.shape[1], B.shape[0], column, scale, drop, stream))
        ranges.append((start, stop))
    call = Call(weight, factors[:half], factors[half:], seed, tuple(shapes), tuple(ranges))
    return ROUTES[route], call


def _forward(x: Tensor, bias: Tensor | None, *facts: Any) -> tuple[Tensor, Tensor]:
    """y [M, N], and what backward needs (see `routes.py`)."""
    route, call = _parse(*facts)
    with _without_autocast(x):
        return route.forward(x, bias, call)


def _backward(
    grad: Tensor, x: Tensor | None, saved: Tensor, need_dx: bool, *facts: Any
) -> list[Tensor]:
    """Each factor's gradient, in the factor's type, and dx [M, K] where it is needed."""
    if grad.stride(-1) != 1 or grad.stride(0) == 0:
        grad = grad.contiguous()
    route, call = _parse(*facts)
    with _without_autocast(grad):
        dx, parts = route.backward(grad, x, saved, call, need_dx)
    found = [part.to(f.dtype) for part, f in zip(parts, (*call.A, *call.B), strict=True)]
    return found if dx is None else [*found, dx]


def _unshared_backward(*arguments: Any) -> list[Tensor]:
    found, factors = _backward(*arguments), arguments[5]
    # Gradients are parts of buffers, and an operator's results may share no memory.
    fresh = [part.clone(memory_format=torch.contiguous_format) for part in found[: len(factors)]]
    return fresh + found[len(factors) :]


_FACTS = "Tensor weight, Tensor[] factors, Tensor? seed, float[] scales, SymInt[] places, str route"
lora = torch.library.custom_op(
    "fastlora::lora",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_FACTS}) -> (Tensor, Tensor)",
)
lora_backward = torch.library.custom_op(
    "fastlora::lora_backward",
    _unshared_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, Tensor saved, bool need_dx, {_FACTS}) -> Tensor[]",
)


@lora.register_fake
def _fake_lora(x: Tensor, _bias: Any, *facts: Any) -> tuple[Tensor, Tensor]:
    (route, call), rows = _parse(*facts), x.shape[0]
    return x.new_empty(rows, call.weight.shape[0]), x.new_empty(route.saved_shape(call, rows))


@lora_backward.register_fake
def _fake_backward(
    grad: Tensor, _x: Any, _saved: Any, need_dx: bool, weight: Tensor, factors: Any, *_: Any
) -> list[Tensor]:
    gradients = [factor.new_empty(factor.shape) for factor in factors]
    return gradients + ([grad.new_empty(grad.shape[0], weight.shape[1])] if need_dx else [])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, factors, seed, *ctx.fixed = inputs
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    # Route "gemm" saves [x | u] where it can, which is wider than u.
    width = sum(padded(A.shape[0]) for A in factors[: len(factors) // 2])
    has_x = saved.dim() == 2 and saved.shape[1] > width
    ctx.save_for_backward(None if has_x else x, saved, weight, seed, *factors)


def _gradients(ctx: Any, grad: Tensor | None, run: Callable[..., list]) -> tuple[Any, list]:
    """dx or None, and each factor's gradient."""
    x, saved, weight, seed, *factors = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(factors)
    need_dx = ctx.needs_input_grad[0]
    found = run(grad, x, saved, need_dx, weight, factors, seed, *ctx.fixed)
    return found.pop() if need_dx else None, found


def _traced_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    dx, gradients = _gradients(ctx, grad, lora_backward)
    return dx, None, None, gradients, None, None, None, None


lora.register_autograd(_traced_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without the operator, which would add half a millisecond.

    `apply(x, bias, weight, seed, (scales, places, route), *factors)`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Any, weight: Tensor, seed: Any, fixed: tuple, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = x, bias, weight, factors, seed, *fixed
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
        dx, gradients = _gradients(ctx, grad, _backward)
        return dx, None, None, None, None, *gradients


lora_eager = _Eager.apply
