"""Named tensors and settings on disk: written whole or not at all, checked before they are used.

Shared by adapters and heads. A file carries the fingerprints of the encoder and tokenizer that
its weights belong to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import UserError


@dataclass(frozen=True)
class BaseInfo:
    """The encoder and tokenizer that weights belong to: a name and two sha256."""

    name: str
    encoder_sha256: str
    tokenizer_sha256: str

    @property
    def facts(self) -> dict[str, str]:
        """What a file says about its base."""
        return {
            "fastlora_version": version("fastlora-bert"),
            "base_model": self.name,
            "encoder_sha256": self.encoder_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], base: BaseInfo) -> None:
    """Write a safetensors file, with the facts about ``base`` in its metadata."""
    owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    _write(path, save(owned, metadata={"format": "pt", **base.facts}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError names the file when it is not there or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} (expected an object)")
    return value


def read_tensors(path: Path, base: BaseInfo | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; UserError when its metadata names another base than ``base``.

    A file without our metadata, such as PEFT's, belongs to any base.
    """
    pickled = path.with_suffix(".bin")
    if pickled.exists() and not path.exists():
        raise UserError(
            f"{pickled}: a pickle, which is never read; save it again with PEFT's "
            "save_pretrained(folder), which writes safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
    for key, what in (("encoder_sha256", "base model"), ("tokenizer_sha256", "tokenizer")):
        if base and facts.get(key, base.facts[key]) != base.facts[key]:
            raise UserError(
                f"{path}: trained on another {what}, that of {facts.get('base_model')!r} (sha256 "
                f"{facts[key][:12]}; here {base.name!r}, {base.facts[key][:12]}); "
                "give the one it was trained on as --model"
            )
    return tensors


def copy_tensors(path: Path, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy ``found`` (read from ``path``) in place, all of it or, on UserError, nothing.

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
        if tensor.shape != into[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)} "
                f"(expected floating point {list(into[name].shape)})"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name!r} has values that are not finite")
    with torch.no_grad():
        for name, tensor in found.items():
            into[name].copy_(tensor)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
