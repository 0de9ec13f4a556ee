"""Tensors on disk, as safetensors only: nothing is unpickled, and loading is all or nothing."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import UserError
from fastlora.files import require


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write a safetensors file, with `facts` in its metadata, and its folder if need be.

    The file is not atomic: write into a folder that is moved in place when it is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses parameters that share storage, as query, key and value do.
    owned = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    # Not save_file, whose files nobody but their owner may read.
    path.write_bytes(save(owned, metadata={"format": "pt", **facts}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; UserError if it is not one."""
    require(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def copy_tensors(path: Path, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy `found` (read from `path`) in place, all of it or, as `check_tensors`, nothing."""
    check_tensors(path, found, into)
    with torch.no_grad():
        for name, tensor in found.items():
            into[name].copy_(tensor)


def check_tensors(path: Path, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `found` (read from `path`) fits, tensor by tensor.

    Refuses missing, unexpected, misshapen, integer and non-finite tensors by name.
    """
    for problem, names in (
        ("is missing", into.keys() - found.keys()),
        ("is unexpected: the model has no place for it", found.keys() - into.keys()),
    ):
        if names:
            more = f" ({len(names) - 1} more such)" if len(names) > 1 else ""
            raise UserError(f"{path}: tensor {min(names)!r} {problem}{more}")
    for name, tensor in found.items():
        integer = into[name].is_floating_point() and not tensor.is_floating_point()
        if tensor.shape != into[name].shape or integer:
            raise UserError(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)} "
                f"(expected floating point {list(into[name].shape)})"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
