"""Encoder weights on disk: strict loading, saving in Hugging Face layout, fingerprints."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.bert.source import TOKENIZER_FILES, CheckpointError, Source

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
# Buffers that old versions of transformers saved with the parameters.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def load_encoder(
    source: Source, dropout: type[nn.Dropout] = nn.Dropout, seed: int = 0
) -> tuple[BertModel, list[str]]:
    """Build the encoder of ``source`` with its weights in fp32, in evaluation mode.

    Accepts "bert." prefixes, LayerNorm.gamma/beta, pre-training heads (cls.*, ignored) and a
    missing pooler, which is drawn from normal(0, 0.02) with ``seed``. Returns the model and one
    note for each such liberty. Raises CheckpointError, naming the tensor, for anything else
    missing, unexpected or of another shape.
    """
    config = BertConfig.from_json(source.folder / "config.json")
    path = source.folder / "model.safetensors"
    try:
        tensors, notes = _normalise(load_file(path))
        model = BertModel(config, dropout=dropout)
        notes += _add_pooler(tensors, config, seed)
        _check(tensors, model)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Copies in place: the model packs query, key and value into storage of its own.
    model.load_state_dict(tensors)
    return model.eval(), notes


def save_encoder(model: BertModel, folder: Path, tokenizer_source: Path | None) -> None:
    """Write a folder that ``transformers.BertModel.from_pretrained`` loads.

    Holds the base weights (adapters must be merged first, LoRA parameters are left out), the
    configuration and, from ``tokenizer_source``, the tokenizer files. The folder appears
    complete or not at all. Raises CheckpointError if it exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; name a new folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    building.mkdir()
    try:
        tensors = {name: p.float().cpu().clone() for name, p in _base_weights(model)}
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        model.config.to_json(building / "config.json")
        for name in TOKENIZER_FILES:
            if tokenizer_source and (file := tokenizer_source / name).exists():
                shutil.copyfile(file, building / name)
        for file in building.iterdir():
            _flush(file)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the base weights, LoRA parameters left out.

    Take it of the fp32 weights as loaded: a cast or merged model has another fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_weights(model):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name:
            yield name, parameter.detach()


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _normalise(raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Bring tensor names to BertModel's own; drop pre-training heads and saved buffers."""
    tensors: dict[str, Tensor] = {}
    heads = []
    for raw_name, tensor in raw.items():
        if raw_name.startswith("cls."):
            heads.append(raw_name)
            continue
        name = raw_name.removeprefix("bert.")
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name in tensors:
            raise CheckpointError(f"tensor {name!r} is there twice, once as {raw_name!r}")
        if name not in _BUFFERS:
            tensors[name] = tensor
    notes = [f"ignored the {len(heads)} tensors of the pre-training heads (cls.*)"]
    return tensors, notes if heads else []


def _add_pooler(tensors: dict[str, Tensor], config: BertConfig, seed: int) -> list[str]:
    # Half a pooler is a broken file: the check names the missing half.
    if any(name in tensors for name in _POOLER):
        return []
    generator = torch.Generator().manual_seed(seed)
    size = config.hidden_size
    tensors[_POOLER[0]] = torch.empty(size, size).normal_(0, 0.02, generator=generator)
    tensors[_POOLER[1]] = torch.zeros(size)
    return [f"the checkpoint has no pooler: initialised from normal(0, 0.02), seed {seed}"]


def _check(tensors: dict[str, Tensor], model: BertModel) -> None:
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"tensor {missing[0]!r} is missing{_others(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"tensor {unknown[0]!r} belongs to no part of a BERT encoder{_others(unknown)}; "
            "save the bare encoder (transformers.BertModel) instead"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)} "
                f"(config.json asks for {list(expected[name].shape)})"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype} (expected floating point)")


def _others(names: list[str]) -> str:
    return f" ({len(names) - 1} more such)" if len(names) > 1 else ""
