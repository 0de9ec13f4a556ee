"""The operation's autograd, and the operation as an operator for `torch.compile`.

Saved for backward are x, u = c (m * x) A^T and the dropout mask's seed; neither the mask nor the
dropped x. Operators take flat lists only, so what describes a call travels as `_DESCRIPTION` says:
`factors` are all A, then all B; `scales` the c of each term; `places` five integers a term (first
column, threshold, stream, first row, end).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import reference
from fastlora.kernels.call import Call, Shape, padded
from fastlora.kernels.dropout import LANES, keep_mask, philox_keep
from fastlora.kernels.routes import implementation

# The packed forms of the weight, who keeps what a CUDA graph reads, and, in backward, whether the
# factors come through hooks; see `Call`.
Owned = tuple[dict | None, Callable[..., None] | None, bool]


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
    owned: Owned = (None, None, False),
) -> tuple[Any, Call]:
    """A route's implementation, and what it is called with."""
    half, shapes, ranges = len(scales), [], []
    for i, (scale, B) in enumerate(zip(scales, factors[half:], strict=True)):
        column, drop, stream, start, stop = places[5 * i : 5 * i + 5]
        shapes.append(Shape(B.shape[1], B.shape[0], column, scale, drop, stream))
        ranges.append((start, stop))
    layout = tuple(shapes), tuple(ranges)
    forms, keep, hooked = owned
    call = Call(weight, factors[:half], factors[half:], seed, *layout, forms, keep, hooked)
    return implementation(route), call


def run_forward(x: Tensor, bias: Tensor | None, *description: Any) -> tuple[Tensor, Tensor]:
    """y [M, N], and what backward needs (see the routes)."""
    route, call = _parse(*description)
    with _without_autocast(x):
        return route.forward(x, bias, call)


def _backward(
    grad: Tensor, x: Tensor | None, saved: Tensor, need_dx: bool, *description: Any
) -> list[Tensor]:
    """Each factor's gradient, in the factor's type, and dx [M, K] where it is needed."""
    if grad.stride(-1) != 1 or grad.stride(0) == 0:
        grad = grad.contiguous()
    route, call = _parse(*description)
    with _without_autocast(grad):
        dx, parts = route.backward(grad, x, saved, call, need_dx)
    gradients = [part.to(f.dtype) for part, f in zip(parts, (*call.A, *call.B), strict=True)]
    return gradients if dx is None else [*gradients, dx]


def _unshared_backward(*arguments: Any) -> list[Tensor]:
    gradients, factors = _backward(*arguments), arguments[5]
    # Gradients are parts of buffers, and an operator's results may share no memory.
    fresh = [part.clone(memory_format=torch.contiguous_format) for part in gradients]
    return fresh[: len(factors)] + gradients[len(factors) :]


_DESCRIPTION = (
    "Tensor weight, Tensor[] factors, Tensor? seed, float[] scales, SymInt[] places, str route"
)
lora = torch.library.custom_op(
    "fastlora::lora",
    run_forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_DESCRIPTION}) -> (Tensor, Tensor)",
)
lora_backward = torch.library.custom_op(
    "fastlora::lora_backward",
    _unshared_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, Tensor saved, bool need_dx, {_DESCRIPTION}) -> Tensor[]",
)


@lora.register_fake
def _fake_lora(x: Tensor, _bias: Any, *description: Any) -> tuple[Tensor, Tensor]:
    (route, call), rows = _parse(*description), x.shape[0]
    return x.new_empty(rows, call.weight.shape[0]), x.new_empty(route.saved_shape(call, rows))


@lora_backward.register_fake
def _fake_backward(
    grad: Tensor, _x: Any, _saved: Any, need_dx: bool, weight: Tensor, factors: Any, *_: Any
) -> list[Tensor]:
    gradients = [factor.new_empty(factor.shape) for factor in factors]
    return gradients + ([grad.new_empty(grad.shape[0], weight.shape[1])] if need_dx else [])


def _save(ctx: Any, x: Tensor, saved: Tensor, weight: Tensor, seed: Any, factors: Any) -> None:
    """Keep for backward what it reads; `ctx.width` is the number of x's columns in `saved`."""
    ctx.set_materialize_grads(False)
    u_width = sum(padded(A.shape[0]) for A in factors[: len(factors) // 2])
    # Route "gemm" saves [x | u] where it can; without terms, backward reads no x.
    ctx.width = saved.shape[1] - u_width if saved.dim() == 2 else 0
    apart = x if factors and ctx.width == 0 else None
    ctx.save_for_backward(apart, saved, weight, seed, *factors)


def _traced_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, factors, seed, *ctx.fixed = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, x, output[1], weight, seed, factors)


def _traced_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    x, saved, weight, seed, *factors = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    need_dx, need_bias = ctx.needs_input_grad[:2]
    found = lora_backward(grad, x, saved, need_dx, weight, factors, seed, *ctx.fixed)
    dx = found.pop() if need_dx else None
    return dx, grad.sum(0) if need_bias else None, None, found, None, None, None, None


lora.register_autograd(_traced_backward, setup_context=_traced_context)


class _Eager(torch.autograd.Function):
    """The same without the operator, which would add half a millisecond.

    `apply(x, bias, weight, seed, (scales, places, route), owned, *factors)`. Backward is
    differentiable: with `create_graph`, it is the reference's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Any,
        weight: Tensor,
        seed: Any,
        fixed: tuple,
        owned: Owned,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, saved = run_forward(x, bias, weight, factors, seed, *fixed, owned)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        ctx.fixed, ctx.owned = fixed, (*owned[:2], hooks is not None)
        _save(ctx, x, saved, weight, seed, factors)
        if ctx.width == 0:
            ctx.mark_non_differentiable(saved)
        return y, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
        x, saved, weight, seed, *factors = ctx.saved_tensors
        need_dx, need_bias = ctx.needs_input_grad[:2]
        dx: Tensor | None = None
        d_factors: list[Any] = [None] * len(factors)
        if grad is None:
            pass
        elif torch.is_grad_enabled() or _is_batch(grad):
            # Where [x | u] is saved, its left part stands for x, in the graph, too.
            with torch.enable_grad():
                x = saved[:, : ctx.width] if x is None and ctx.width else x
            needed = need_dx, *ctx.needs_input_grad[6:]
            dx, *d_factors = _differentiable(grad, x, weight, seed, factors, ctx.fixed, needed)
        else:
            fixed = *ctx.fixed, ctx.owned
            d_factors = _backward(grad, x, saved, need_dx, weight, factors, seed, *fixed)
            dx = d_factors.pop() if need_dx else None
        if grad_saved is not None and need_dx:  # only of a gradient's gradient
            part = grad_saved[:, : ctx.width]
            dx = part if dx is None else dx + part
        d_bias = grad.sum(0) if need_bias and grad is not None else None
        return dx, d_bias, None, None, None, None, *d_factors


def _differentiable(
    grad: Tensor,
    x: Any,
    weight: Tensor,
    seed: Tensor | None,
    factors: Sequence[Tensor],
    fixed: tuple,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and the factors where needed, as functions that autograd knows.

    They also serve a batch of gradients at once, which no fused form takes.
    """
    scales, places, route = fixed
    if not any(needed):
        return [None] * len(needed)
    half = len(scales)
    if not half:
        return [grad @ weight if needed[0] else None]
    mask = keep_mask if route == "reference" else philox_keep
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), _without_autocast(grad):
        # Other names for them: x may depend on the factors, as where two layers share an adapter,
        # and what flows through it is not this function's part of their gradient.
        x, *factors = (t.view_as(t) for t in (x, *factors))
        terms = [
            reference.Term(
                A, B, c * (LANES - drop) / LANES, drop / LANES, stream, start, stop, column
            )
            for A, B, c, (column, drop, stream, start, stop) in zip(
                factors[:half], factors[half:], scales, _by_fives(places), strict=True
            )
        ]
        y = reference.lora_grouped(x, weight, None, terms, seed, mask)
    leaves = [leaf for leaf, need in zip((x, *factors), needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=differentiable))
    return [next(found) if need else None for need in needed]


def _is_batch(grad: Tensor) -> bool:
    """Whether this stands for many gradients, by `is_grads_batched` or `torch.func.vmap`."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def _by_fives(places: Sequence[int]) -> list[Sequence[int]]:
    return [places[i : i + 5] for i in range(0, len(places), 5)]


lora_eager = _Eager.apply
