"""The operation as a registered operator, for `torch.compile`, `opcheck` and tracing.

Operators take flat lists only: what a call fixes beside its tensors travels as `scales` and
`places`, five integers a term.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.kernels.grouped import Shape, rank_offsets
from fastlora.kernels.routes import ROUTES, Call

_NOTHING = nullcontext()


class Facts(NamedTuple):
    """What a call fixes beside its tensors."""

    shapes: tuple[Shape, ...]
    ranges: tuple[tuple[int, int], ...]
    route: str


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which PyTorch's operations take the types they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def make_call(weight: Tensor, seed: Tensor | None, facts: Facts, factors: Sequence[Tensor]) -> Call:
    """The routes' call; `factors` are all A, then all B."""
    half = len(factors) // 2
    return Call(weight, factors[:half], factors[half:], seed, facts.shapes, facts.ranges)


def kept_input(x: Tensor, saved: Tensor, facts: Facts) -> Tensor | None:
    """What to save of x: nothing where route "gemm" saved [x | u], which is wider than u."""
    extended = saved.dim() == 2 and saved.shape[1] > rank_offsets(facts.shapes)[-1]
    return None if extended else x


def run_forward(x: Tensor, bias: Tensor | None, call: Call, route: str) -> tuple[Tensor, Tensor]:
    """y [M, N], and what backward needs."""
    with without_autocast(x):
        return ROUTES[route].forward(x, bias, call)


def run_backward(
    grad: Tensor, x: Tensor | None, saved: Tensor, call: Call, route: str, need_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx [M, K] where needed, and the buffers of all dA and all dB."""
    if grad.stride(-1) != 1 or grad.stride(0) == 0:
        grad = grad.contiguous()
    with without_autocast(grad):
        return ROUTES[route].backward(grad, x, saved, call, need_dx)


def split_gradients(dA: Tensor, dB: Tensor, call: Call, route: str, grad: Tensor) -> list[Tensor]:
    """Each factor's gradient, in the factor's type."""
    parts = ROUTES[route].split(dA, dB, call, len(grad))
    return [part.to(f.dtype) for part, f in zip(parts, (*call.A, *call.B), strict=True)]


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: list[Tensor],
    seed: Tensor | None,
    facts: Facts,
) -> Tensor:
    """y [M, N] through the registered operator."""
    pairs = zip(facts.shapes, facts.ranges, strict=True)
    places = [n for s, ends in pairs for n in (s.column, s.threshold, s.stream, *ends)]
    scales = [shape.scale for shape in facts.shapes]
    return lora(x, weight, bias, factors, seed, scales, places, facts.route)[0]


def _facts(
    factors: Sequence[Tensor], scales: Sequence[float], places: Sequence[int], route: str
) -> Facts:
    shapes, ranges = [], []
    for i, (scale, B) in enumerate(zip(scales, factors[len(scales) :], strict=True)):
        column, drop, stream, *ends = places[5 * i : 5 * i + 5]
        shapes.append(Shape(B.shape[1], B.shape[0], column, scale, drop, stream))
        ranges.append((ends[0], ends[1]))
    return Facts(tuple(shapes), tuple(ranges), route)


@torch.library.custom_op("fastlora::lora", mutates_args=())
def lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    seed: Tensor | None,
    scales: Sequence[float],
    places: Sequence[int],
    route: str,
) -> tuple[Tensor, Tensor]:
    """See `routes.py`: y, and what backward needs."""
    made = make_call(weight, seed, _facts(factors, scales, places, route), factors)
    return run_forward(x, bias, made, route)


@lora.register_fake
def _fake_lora(
    x: Tensor, weight: Tensor, _bias: Any, factors: Any, seed: Any, *facts: Any
) -> tuple[Tensor, Tensor]:
    made = make_call(weight, seed, _facts(factors, *facts), factors)
    saved = ROUTES[facts[-1]].shapes(made, x.shape[0]).saved
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(saved)


@torch.library.custom_op("fastlora::lora_backward", mutates_args=())
def lora_backward(
    grad: Tensor,
    x: Tensor | None,
    saved: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    seed: Tensor | None,
    scales: Sequence[float],
    places: Sequence[int],
    route: str,
    need_dx: bool,
) -> list[Tensor]:
    """The buffers of all dA and all dB, and dx where it is needed."""
    made = make_call(weight, seed, _facts(factors, scales, places, route), factors)
    dx, dA, dB = run_backward(grad, x, saved, made, route, need_dx)
    return [dA, dB] if dx is None else [dA, dB, dx]


@lora_backward.register_fake
def _fake_backward(
    grad: Tensor, _x: Any, _saved: Any, weight: Tensor, factors: Any, seed: Any, *facts: Any
) -> list[Tensor]:
    *flat, need_dx = facts
    made = make_call(weight, seed, _facts(factors, *flat), factors)
    shapes = ROUTES[flat[-1]].shapes(made, grad.shape[0])
    dtype = grad.dtype if flat[-1] == "reference" else torch.float32
    gradients = [grad.new_empty(shape, dtype=dtype) for shape in (shapes.dA, shapes.dB)]
    return gradients + ([grad.new_empty(grad.shape[0], weight.shape[1])] if need_dx else [])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, factors, seed, *ctx.flat = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = kept_input(x, output[1], _facts(factors, *ctx.flat))
    ctx.save_for_backward(kept, output[1], weight, seed, *factors)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    kept, saved, weight, seed, *factors = ctx.saved_tensors
    if grad is None:
        return None, None, None, [None] * len(factors), None, None, None, None
    need_dx = ctx.needs_input_grad[0]
    dA, dB, *dx = lora_backward(grad, kept, saved, weight, factors, seed, *ctx.flat, need_dx)
    made = make_call(weight, seed, _facts(factors, *ctx.flat), factors)
    gradients = split_gradients(dA, dB, made, ctx.flat[-1], grad)
    return dx[0] if need_dx else None, None, None, gradients, None, None, None, None


lora.register_autograd(_backward, setup_context=_setup_context)
