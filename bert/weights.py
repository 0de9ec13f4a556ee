"""Tensors on disk, as safetensors only: strict loading, the encoder's folder, fingerprints."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel, Parts
from fastlora.bert.source import TOKENIZER_FILES, InputError, Source, require

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
# Buffers that old versions of transformers saved with the parameters.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def load_encoder(source: Source, parts: Parts | None = None) -> tuple[BertModel, list[str]]:
    """Build the encoder of ``source`` with its weights in fp32, in evaluation mode.

    Accepts "bert." prefixes, LayerNorm.gamma/beta, pre-training heads (cls.*, ignored) and a
    missing pooler, which is drawn from normal(0, 0.02), always the same. Returns the model and a
    note for each such liberty. Raises InputError as ``copy_tensors`` does.
    """
    path = source.folder / "model.safetensors"
    model = BertModel(BertConfig.from_json(source.folder / "config.json"), parts or Parts())
    raw, _ = read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for raw_name, tensor in raw.items():
        name = raw_name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors:
            raise InputError(f"{path}: tensor {name!r} is there twice, once as {raw_name!r}")
        if name not in _BUFFERS and not name.startswith("cls."):
            tensors[name] = tensor
    heads = sum(name.startswith("cls.") for name in raw)
    notes = [f"ignored the {heads} tensors of the pre-training heads (cls.*)"] if heads else []
    # Half a pooler is a broken file: the copy names the missing half.
    if not any(name in tensors for name in _POOLER):
        size = model.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        tensors[_POOLER[0]] = torch.empty(size, size).normal_(0, 0.02, generator=generator)
        tensors[_POOLER[1]] = torch.zeros(size)
        notes.append("the checkpoint has no pooler: initialised from normal(0, 0.02)")
    copy_tensors(path, tensors, model.state_dict())
    return model.eval(), notes


def save_encoder(model: BertModel, folder: Path, tokenizer_source: Path) -> None:
    """Write what ``transformers.BertModel.from_pretrained`` loads into a folder.

    That is the base weights (adapters must be merged first, LoRA parameters are left out), the
    configuration, and the tokenizer files found in ``tokenizer_source``.
    """
    write_tensors(folder / "model.safetensors", _base_weights(model))
    model.config.to_json(folder / "config.json")
    for name in TOKENIZER_FILES:
        if (file := tokenizer_source / name).exists():
            shutil.copyfile(file, folder / name)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the base weights, LoRA parameters left out.

    Take it of the fp32 weights as loaded: a cast or merged model has another fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_weights(model).items():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write a safetensors file in fp32, with ``facts`` in its metadata, and its folder if need be.

    The file is not atomic: write into a folder that is moved in place when it is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses parameters that share storage, as query, key and value do.
    owned = {k: t.detach().to("cpu", torch.float32, copy=True) for k, t in tensors.items()}
    # Not save_file, whose files nobody but their owner may read.
    path.write_bytes(save(owned, metadata={"format": "pt", **facts}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; InputError if it is not one."""
    require(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def copy_tensors(path: Path, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy ``found`` (read from ``path``) in place, all of it or, on InputError, nothing.

    Refuses missing, unexpected, misshapen, integer and non-finite tensors by name.
    """
    for problem, names in (
        ("is missing", into.keys() - found.keys()),
        ("is unexpected: the model has no place for it", found.keys() - into.keys()),
    ):
        if names:
            more = f" ({len(names) - 1} more such)" if len(names) > 1 else ""
            raise InputError(f"{path}: tensor {min(names)!r} {problem}{more}")
    for name, tensor in found.items():
        if tensor.shape != into[name].shape or not tensor.is_floating_point():
            raise InputError(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)} "
                f"(expected floating point {list(into[name].shape)})"
            )
        if not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} has values that are not finite")
    with torch.no_grad():
        for name, tensor in found.items():
            into[name].copy_(tensor)


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in sorted(model.named_parameters()) if "lora_" not in n}
