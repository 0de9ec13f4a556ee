"""The operation's autograd, and the operation as an operator for `torch.compile`.

Forward keeps x, u = c (m * x) A^T and the seed of the dropout mask, but neither the mask nor
the dropped x. Operators take flat lists only, so a call is passed as `_CALL` lists it: `factors` is
A and B of each term in turn, `reals` and `ints` the next two and the last four fields of `Term`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import reference
from fastlora.kernels.call import Call, Term
from fastlora.kernels.dropout import keep_mask, philox_keep
from fastlora.kernels.routes import implementation


def run(x: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """y [M, N] of x [M, K], differentiable by x, the bias and the factors."""
    if torch.compiler.is_compiling():
        reals = [value for term in call.terms for value in term[2:4]]
        ints = [value for term in call.terms for value in term[4:]]
        return lora(x, bias, call.weight, call.factors, call.seed, reals, ints, call.route)[0]
    if torch.is_grad_enabled():
        return _Eager.apply(x, bias, call, *call.factors)[0]
    return _forward(x, bias, call)[0]


def _forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """y [M, N], and the tensor that backward needs: [x | u] if it is a matrix, u if it is flat."""
    with torch._C._DisableAutocast():  # operations take the types they are given
        return implementation(call.route).forward(x, bias, call)


def _backward(
    grad: Tensor, x: Tensor | None, saved: Tensor, need_dx: bool, call: Call
) -> tuple[Tensor | None, list[Tensor]]:
    """dx [M, K] where it is needed, and each factor's gradient in the factor's type."""
    if grad.stride(-1) != 1 or grad.stride(0) == 0:
        grad = grad.contiguous()
    with torch._C._DisableAutocast():
        dx, parts = implementation(call.route).backward(grad, x, saved, call, need_dx)
    return dx, [part.to(f.dtype) for part, f in zip(parts, call.factors, strict=True)]


def _save(ctx: Any, x: Tensor, saved: Tensor, weight: Tensor, seed: Any, factors: Any) -> None:
    """Save what backward reads; x only if there are terms and `saved` does not contain it."""
    apart = x if factors and saved.dim() == 1 else None
    ctx.save_for_backward(apart, saved, weight, seed, *factors)


class _Eager(torch.autograd.Function):
    """The operation in eager mode, where an operator would add half a millisecond to a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, call: Call, *factors: Tensor) -> tuple:
        ctx.set_materialize_grads(False)
        y, saved = _forward(x, bias, call)
        _save(ctx, x, saved, call.weight, call.seed, factors)
        if saved.dim() == 1:
            ctx.mark_non_differentiable(saved)
        # The call keeps the factors, because hooks on saved tensors may return others, and they
        # are saved, too, so that PyTorch detects changes.
        ctx.rest = call._replace(changed=False)[1:]
        return y, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
        x, saved, weight, _, *factors = ctx.saved_tensors
        need_dx, need_bias = ctx.needs_input_grad[:2]
        dx, d_bias = None, None
        gradients: Sequence[Tensor | None] = [None] * len(factors)
        if grad is not None:
            functorch, call = torch._C._functorch, Call(weight, *ctx.rest)
            # `is_grads_batched` and `torch.func.vmap` compute many gradients at once.
            many = functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)
            if many or torch.is_grad_enabled():
                dx, *gradients = _differentiable(grad, x, saved, call)
            else:
                dx, gradients = _backward(grad, x, saved, need_dx, call)
            d_bias = grad.sum(0) if need_bias else None
        if grad_saved is not None:  # only when differentiating twice
            through = grad_saved[:, : weight.shape[1]]
            dx = through if dx is None else dx + through
        return dx, d_bias, None, *gradients


def _differentiable(grad: Tensor, x: Any, saved: Tensor, call: Call) -> Sequence[Tensor | None]:
    """The gradients of x and the factors, differentiable, and also for many gradients at once."""
    if not call.terms:
        return [grad @ call.weight]
    mask = keep_mask if call.route == "reference" else philox_keep
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), torch._C._DisableAutocast():
        # Where [x | u] is saved, its left part replaces x, also in the graph.
        x = saved[:, : call.weight.shape[1]] if saved.dim() == 2 else x
        # Views separate the inputs from their history, as x may depend on the factors.
        x, *factors = inputs = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (x, *call.factors)
        ]
        pairs = zip(call.terms, factors[::2], factors[1::2], strict=True)
        terms = [term._replace(lora_A=A, lora_B=B) for term, A, B in pairs]
        y = reference.add_terms(x @ call.weight.T, x, terms, call.seed, mask)
    return torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=differentiable)


_CALL = "Tensor weight, Tensor[] factors, Tensor? seed, float[] reals, SymInt[] ints, str route"
_FORWARD = f"(Tensor x, Tensor? bias, {_CALL}) -> (Tensor, Tensor)"
_BACKWARD = f"(Tensor grad, Tensor? x, Tensor saved, bool need_dx, {_CALL}) -> Tensor[]"


def _parse(weight: Tensor, factors: Any, seed: Any, reals: Any, ints: Any, route: str) -> Call:
    fields = factors[::2], factors[1::2], reals[::2], reals[1::2], *(ints[i::4] for i in range(4))
    return Call(weight, [Term(*term) for term in zip(*fields, strict=True)], seed, route=route)


@torch.library.custom_op("fastlora::lora", mutates_args=(), schema=_FORWARD)
def lora(x: Tensor, bias: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
    """`_forward` as an operator."""
    return _forward(x, bias, _parse(*call))


@torch.library.custom_op("fastlora::lora_backward", mutates_args=(), schema=_BACKWARD)
def lora_backward(grad: Tensor, x: Any, saved: Tensor, need_dx: bool, *call: Any) -> list[Tensor]:
    """`_backward` as an operator: the factors' gradients, then dx."""
    dx, gradients = _backward(grad, x, saved, need_dx, _parse(*call))
    # Gradients are parts of buffers, and an operator's results may share no memory.
    results = [part.clone(memory_format=torch.contiguous_format) for part in gradients]
    return results if dx is None else [*results, dx]


@lora.register_fake
def _fake_lora(x: Tensor, _bias: Any, *description: Any) -> tuple[Tensor, Tensor]:
    call, rows = _parse(*description), x.shape[0]
    saved = implementation(call.route).saved_shape(call, rows)
    return x.new_empty(rows, call.weight.shape[0]), x.new_empty(saved)


@lora_backward.register_fake
def _fake_backward(
    grad: Tensor, _x: Any, _saved: Any, need_dx: bool, weight: Tensor, factors: Any, *_: Any
) -> list[Tensor]:
    gradients = [factor.new_empty(factor.shape) for factor in factors]
    return gradients + ([grad.new_empty(grad.shape[0], weight.shape[1])] if need_dx else [])


def _traced_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, factors, seed, *ctx.fixed = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, x, output[1], weight, seed, factors)


def _traced_backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    x, saved, weight, seed, *factors = ctx.saved_tensors
    need_dx, need_bias = ctx.needs_input_grad[:2]
    results = lora_backward(grad, x, saved, need_dx, weight, factors, seed, *ctx.fixed)
    dx = results.pop() if need_dx else None
    return dx, grad.sum(0) if need_bias else None, None, results, None, None, None, None


lora.register_autograd(_traced_backward, setup_context=_traced_context)
