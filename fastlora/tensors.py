"""Tensors in safetensors files. Pickles are never read, and loading changes all tensors or none."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import UserError, in_place_of
from fastlora.files import require


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file with `metadata`, and create its folder if it does not exist.

    The file is not written atomically: use a folder of `atomic_folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copied, because safetensors refuses parameters that share storage, as query, key and value do.
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    # safetensors' save_file would write files that only their owner can read.
    path.write_bytes(save(copies, metadata={"format": "pt", **metadata}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; UserError if it is not one."""
    require(path)
    unreadable = (OSError, SafetensorError), UserError, f"{path}: cannot be read as safetensors: "
    with in_place_of(*unreadable), path.open("rb"), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return tensors, file.metadata() or {}


def copy_tensors(path: Path, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, read from `path`, into those of `into` with the same names.

    Raises UserError as `check_tensors` does, before anything is copied.
    """
    check_tensors(path, tensors, into)
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def check_tensors(path: Path, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `tensors`, read from `path`, can be copied into those of `into`.

    The message names a tensor that is missing, unexpected, misshapen, of integers or not finite.
    """
    for problem, names in (
        ("is missing", into.keys() - tensors.keys()),
        ("is unexpected: the model has no place for it", tensors.keys() - into.keys()),
    ):
        if names:
            more = f" ({len(names) - 1} more such)" if len(names) > 1 else ""
            raise UserError(f"{path}: tensor {min(names)!r} {problem}{more}")
    for name, tensor in tensors.items():
        integer = into[name].is_floating_point() and not tensor.is_floating_point()
        if tensor.shape != into[name].shape or integer:
            found = f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}"
            expected = f"floating point {list(into[name].shape)}"
            raise UserError(f"{path}: {found} (expected {expected})")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
