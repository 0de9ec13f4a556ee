"""The self-check: before kernels are used on a device, they are compared with plain PyTorch there.

They may never have run on such a GPU. So at their first use, small problems are computed by them,
by plain PyTorch in the same dtype, and in fp64 on the CPU. Their error may be twice that of plain
PyTorch, for gradients three times; a wrong mask makes it much larger. A file notes that they passed
for later processes; a failure is not noted, because its cause may be gone by then.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fastlora.files import cache_folder
from fastlora.kernels.call import Call, Term
from fastlora.kernels.dropout import philox_keep
from fastlora.kernels.reference import add_terms
from fastlora.kernels.triton import tuning

# K, columns of query, dropout rate, and the part of the rows that an adapter leaves to another.
PROBLEMS = ((192, 64, 0.0, 0.0), (192, 64, 0.1, 0.0), (133, 72, 0.5, 0.3))
_lock = Lock()
_found: dict[tuple[torch.device, torch.dtype], str] = {}


def problem(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernels on a device, or ""."""
    key = device, dtype
    if key not in _found and is_capturing(device):
        return "it cannot run while a CUDA graph is captured (call the model once before that)"
    with _lock:
        if key not in _found:
            # In a new thread, none of the caller's modes hold: autocast, inference mode, tracing.
            with ThreadPoolExecutor(1) as thread:
                _found[key] = thread.submit(_check, device, dtype).result()
        return _found[key]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check(device: torch.device, dtype: torch.dtype) -> str:
    """`problem`, by the file of an earlier check or by a check."""
    chip = tuning.capability(device)
    # Both numbers of rows, if they are computed in different blocks.
    sizes = {tuning.config(chip, dtype, rows): rows for rows in (tuning.SMALL + 6, 70)}
    try:
        file = _file(device, f"{dtype} {sizes}")
        if file.is_file():
            return ""
        for rows, numbers in product(sizes.values(), PROBLEMS):
            if wrong := _disagreement(device, dtype, rows, *numbers):
                return f"{wrong} ({dtype}, {rows} rows, dropout {numbers[2]})"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({dtype})"
    with suppress(OSError):  # if it cannot be written, later processes check again
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return ""


def _file(device: torch.device, settings: str) -> Path:
    """The file of a check that was passed, named by all that its result depends on."""
    import triton

    facts: list[object] = [device.type, settings, torch.__version__, triton.__version__]
    facts += [source.read_text() for source in sorted(Path(tuning.__file__).parent.glob("*.py"))]
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), torch._C._cuda_getDriverVersion()]  # type: ignore
        with suppress(OSError):  # the driver's full version; under Windows there is no such file
            facts.append(Path("/proc/driver/nvidia/version").read_text())
    return cache_folder() / "self_checks" / sha256(repr(facts).encode()).hexdigest()


def _disagreement(device: torch.device, dtype: torch.dtype, *numbers: Any) -> str:
    """The first result of the kernels whose error is too large, or ""."""
    # Ours come first: memory that a kernel leaves unwritten could hold plain PyTorch's results.
    ours = _results("gemm", device, dtype, *numbers)
    theirs = _results("", device, dtype, *numbers)
    exact = _results("", torch.device("cpu"), torch.float64, *numbers)
    errors, rounding = (
        [float((a - b).abs().max() / b.abs().max()) for a, b in zip(side, exact, strict=True)]
        for side in (ours, theirs)
    )
    for name, error in zip(("y", "dx", "dA", "dB", "dA", "dB"), errors, strict=True):
        limit = (2 if name == "y" else 3) * (max(rounding) + torch.finfo(dtype).eps / 4)
        if not error <= limit:  # an error that is not a number, too
            return f"{name} has a relative error of {error:.1e}, expected at most {limit:.1e}"
    return ""


def _results(
    route: str, device: torch.device, dtype: torch.dtype,
    M: int, K: int, width: int, p: float, part: float,
) -> list[Tensor]:  # fmt: skip
    """y, dx, and dA and dB of two adapters, in fp64 on the CPU; without a route by PyTorch."""
    from fastlora.kernels.autograd import run

    draw, cut = torch.Generator("cpu").manual_seed(0), int(part * M)
    shapes = [(M, 3 * width), (3 * width, K), (M, K), (8, K), (width, 8), (11, K), (width, 11)]
    made = [torch.randn(s, generator=draw, dtype=torch.float64, device="cpu") for s in shapes]
    grad, weight, *leaves = [(t / t.shape[1] ** 0.5).to(device, dtype) for t in made]
    x, A, B, C, D = (leaf.requires_grad_() for leaf in leaves)
    terms = [Term(A, B, 2.0, p, 1, 0, M - cut), Term(C, D, 2.0, p, 2, cut, M, 2 * width)]
    seed = torch.tensor(0x1234_5678_9ABC_DEF0, device=device)
    if route:
        y = run(x, None, Call(weight, terms, seed, route=route))
    else:
        y = add_terms(x @ weight.T, x, terms, seed, philox_keep)
    return [t.double().cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, grad))]
