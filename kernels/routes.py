"""Which route computes a call, and why. All routes have the same inputs and gradients.

reference   PyTorch's own products (cpu/route.py)
gemm        Triton kernels around the vendor's GEMM (triton/route.py)
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastlora.kernels import selfcheck
from fastlora.kernels.cpu import route as cpu_route
from fastlora.kernels.triton import tuning

ROUTES = ("reference", "gemm")
forced: ContextVar[str] = ContextVar("forced route", default="")
_warn_once = lru_cache(maxsize=64)(warnings.warn)


class Route(NamedTuple):
    """Which kernels run, and why."""

    name: str
    why: str


def implementation(name: str) -> Any:
    """The module with `saved_shape`, `forward` and `backward`; Triton is imported on first use."""
    if name == "reference":
        return cpu_route
    from fastlora.kernels.triton import route as triton_route

    return triton_route


@lru_cache(maxsize=64)
def _detect(device: torch.device, dtype: torch.dtype) -> Route:
    capability = tuning.capability(device)
    if not capability:
        return Route("reference", f"PyTorch's own GEMMs on {device.type}")
    if dtype not in tuning.DTYPE_NAMES:
        return Route("reference", f"no kernel for {dtype}")
    try:
        from fastlora.kernels.triton import turing
    except Exception as error:  # a damaged installation may raise anything
        return Route("reference", f"Triton cannot be imported: {error}")
    if capability < 75:
        return Route("reference", f"Triton does not support sm_{capability}")
    if capability < 80 and dtype == torch.bfloat16:
        return Route("reference", f"no bf16 tensor cores on sm_{capability}")
    if capability == 75 and (problem := turing.problem()):
        return Route("gemm", f"no Turing tensor cores in Triton kernels: {problem}")
    return Route("gemm", f"Triton kernels for sm_{capability}")


@torch.compiler.assume_constant_result
def route(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Route:
    """The route that `lora_grouped` takes on a device, and why.

    The environment variable FASTLORA_ROUTE (reference or gemm) forces one; ValueError if it cannot
    run here or fails its self-check. By default the reference replaces kernels that fail.
    """
    device, name = torch.device(device), forced.get() or os.environ.get("FASTLORA_ROUTE", "")
    if name not in ("", *ROUTES):
        raise ValueError(f"FASTLORA_ROUTE is {name!r} (expected {' or '.join(ROUTES)})")
    if forced.get():
        return Route(name, "forced")
    chosen = _detect(device, dtype)
    if name:
        runs = name == "reference" or chosen.name != "reference"
        if not runs and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"FASTLORA_ROUTE is {name!r}, but here: {chosen.why}")
        chosen = Route(name, "forced by FASTLORA_ROUTE")
    checked = chosen.name != "reference" and dtype in tuning.DTYPE_NAMES
    if not checked or os.environ.get("FASTLORA_SELF_CHECK") == "0":
        return chosen
    if not (problem := selfcheck.problem(device, dtype)):
        return Route(chosen.name, f"{chosen.why}; self-check passed")
    why = f"Triton's kernels failed their self-check on {device}: {problem}"
    if name:
        raise ValueError(f"FASTLORA_ROUTE is {name!r}, but {why}")
    advice = "computing in plain PyTorch; please report this with what `fastlora doctor` prints"
    _warn_once(f"fastlora: {why}; {advice}", RuntimeWarning)
    return Route("reference", why)


@contextmanager
def forced_route(name: str) -> Iterator[None]:
    """Make `lora_grouped` take a route in this thread, for tests and benchmarks."""
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)
