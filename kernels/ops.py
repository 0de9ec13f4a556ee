"""The LoRA operation: the public functions and the route that they take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.kernels import tuning
from fastlora.kernels.dropout import draw_seed, threshold
from fastlora.kernels.frozen import linear
from fastlora.kernels.library import lora, lora_eager
from fastlora.kernels.reference import Term
from fastlora.kernels.routes import ROUTES

_forced: list[str] = []


class Route(NamedTuple):
    """Which kernels run, and why."""

    name: str
    why: str


@lru_cache(maxsize=64)
def _detect(device: torch.device, dtype: torch.dtype, large: bool) -> Route:
    if device.type != "cuda":
        return Route("reference", f"PyTorch's own GEMMs on {device.type}, on packed frozen weights")
    if find_spec("triton") is None:
        return Route("reference", "Triton is not installed")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Route("reference", f"no kernel for {dtype}")
    from fastlora.kernels import turing

    capability = tuning.capability(device)
    if capability < 75:
        return Route("reference", f"Triton does not support sm_{capability}")
    if capability < 80 and dtype == torch.bfloat16:
        return Route("reference", f"no bf16 tensor cores on sm_{capability}")
    name = tuning.config(capability, dtype, tuning.SMALL if large else 1).route
    if capability == 75:
        if problem := turing.install():
            return Route("gemm", f"no Turing tensor cores in Triton kernels: {problem}")
        return Route(name, "Turing tensor cores through the compile-stage hook")
    return Route(name, f"the table of block sizes for sm_{capability}")


@torch.compiler.assume_constant_result
def route(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, large: bool = True
) -> Route:
    """The route that `lora_grouped` takes on a device, for many rows or few, and why.

    The environment variable FASTLORA_ROUTE (reference, gemm or triton) forces one; ValueError when
    it names no route, or one that cannot run here.
    """
    name = _forced[-1] if _forced else os.environ.get("FASTLORA_ROUTE", "")
    found = _detect(torch.device(device), dtype, large)  # on a T4, also installs the hook
    if not name:
        return found
    if name not in ROUTES:
        raise ValueError(f"FASTLORA_ROUTE is {name!r} (expected one of {', '.join(ROUTES)})")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (_forced or found.name != "reference" or name == "reference" or interpreted):
        raise ValueError(f"FASTLORA_ROUTE is {name!r}, but here: {found.why}")
    return Route(name, "forced" if _forced else "forced by FASTLORA_ROUTE")


@contextmanager
def forced_route(name: str) -> Iterator[None]:
    """Make `lora_grouped` take a route, for tests and benchmarks."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def lora_grouped(
    x: Tensor,  # [..., K] in any layout, floating point
    weight: Tensor,  # [N, K], frozen, in x's dtype (cast under autocast)
    bias: Tensor | None,  # [N], frozen
    terms: Sequence[Term],  # may overlap (they add up) and may be empty
    seed: Tensor | None = None,  # int64 [] of all masks; None draws one from torch's generator
) -> Tensor:
    """A frozen projection plus any number of low-rank terms on blocks of its output.

    Returns [..., N] in x's dtype. Gradients flow to x and to every lora_A and lora_B, which may be
    fp32 masters of a half-precision x. Raises ValueError when a shape does not fit.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, terms)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 or rows.stride(0) == 0:
        rows = rows.contiguous()
    if not terms:
        return linear(x, weight, bias)
    if seed is None and any(term.dropout_p > 0 for term in terms):
        seed = draw_seed(x.device)
    factors = [*(term.lora_A for term in terms), *(term.lora_B for term in terms)]
    places: list[int] = []
    for term in terms:
        start, stop, _ = slice(term.start, term.stop).indices(len(rows))
        drop = threshold(term.dropout_p)
        places += (term.column, drop, term.stream, start, max(start, stop))
    scales = [term.c for term in terms]
    large = torch.compiler.is_compiling() or len(rows) >= tuning.SMALL
    fixed = scales, places, route(x.device, x.dtype, large).name
    if torch.compiler.is_compiling():
        y, _ = lora(rows, bias, weight, factors, seed, *fixed)
    else:
        y, _ = lora_eager(rows, bias, weight, seed, fixed, *factors)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W0^T + b + scale / (1 - p) (m * x) A^T B^T for one projection and one adapter.

    Shapes as in `lora_grouped`; lora_A [r, K], lora_B [N, r].
    """
    return lora_grouped(x, weight, bias, [Term(lora_A, lora_B, scale, dropout_p)], seed)


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Packed query, key and value: x [..., H], weight [3H, H] -> [..., 3H].

    `adapters` maps any of "query", "key" and "value" to (lora_A [r, H], lora_B [H, r]); each draws
    its own mask.
    """
    width = weight.shape[0] // 3
    blocks = {"query": 0, "key": width, "value": 2 * width}
    if unknown := adapters.keys() - blocks.keys():
        raise ValueError(f"adapters has {min(unknown)!r} (expected some of {', '.join(blocks)})")
    terms = [
        Term(*adapters[name], scale, dropout_p, stream=column, column=column)
        for name, column in blocks.items()
        if name in adapters
    ]
    return lora_grouped(x, weight, bias, terms, seed)


def _check(x: Tensor, weight: Tensor, terms: Sequence[Term]) -> None:
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features (expected {K}, weight's)")
    for term in terms:
        A, B = term.lora_A, term.lora_B
        if A.shape[1] != K or A.shape[0] != B.shape[1]:
            found = f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}"
            raise ValueError(f"{found} (expected [r, {K}] and [N, r])")
        if (end := term.column + B.shape[0]) > N:
            raise ValueError(f"lora_B's rows reach column {end} of y (expected at most {N})")
