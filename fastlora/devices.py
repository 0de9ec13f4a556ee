"""The device that a command computes on, its clock, and errors when its memory runs out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fastlora.errors import RunError, UserError


def synchronized_time(device: torch.device) -> float:
    """The clock's time in seconds, once the device has finished all work queued so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Raise RunError with `advice` in place of an error that says that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "allocate memory" not in text:  # PyTorch's RuntimeError on a CPU
            raise
        raise RunError(f"out of memory on {device} ({text}); {advice}") from error


@contextmanager
def usual_modes() -> Iterator[None]:
    """Run a block in PyTorch's default modes, and restore the caller's modes at its end.

    The modes are the default dtype and device, autocast, `no_grad` and `inference_mode`.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))  # this also ends `no_grad`
        if torch.empty(0).device.type != "cpu":  # only if needed: it slows calls down
            stack.enter_context(torch.device("cpu"))
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def local_device(name: str) -> torch.device:
    """This process's device for "auto", "cpu", "cuda" or "cuda:N"; UserError if there is none."""
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name == "cuda" and available:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch("(cpu|cuda)(:[0-9]{1,2})?", name):
        raise UserError(f"device is {name!r} (expected auto, cpu, cuda or cuda:N)")
    device = torch.device(name)
    if device.type == "cuda":
        if not available:
            raise UserError(f"device is {name!r} but PyTorch finds no CUDA GPU; use --device cpu")
        if (count := torch.cuda.device_count()) <= device.index:
            raise UserError(f"device is '{device}' but PyTorch finds {count} CUDA GPUs here")
        torch.cuda.set_device(device)
    return device
