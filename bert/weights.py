"""The encoder's folder in Hugging Face layout, and fingerprints of its weights."""

import hashlib
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel, Parts
from fastlora.bert.source import TOKENIZER_FILES, Source
from fastlora.errors import UserError
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
# Buffers that old versions of transformers saved with the parameters.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def load_encoder(source: Source, parts: Parts | None = None) -> tuple[BertModel, list[str]]:
    """Build the encoder of ``source`` with its weights in fp32, in evaluation mode.

    Accepts "bert." prefixes, LayerNorm.gamma/beta, pre-training heads (cls.*, ignored) and a
    missing pooler, which is drawn from normal(0, 0.02), always the same. Returns the model and a
    note for each such liberty. Raises UserError as ``copy_tensors`` does.
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
            raise UserError(f"{path}: tensor {name!r} is there twice, once as {raw_name!r}")
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
    weights = {name: weight.float() for name, weight in _base_weights(model).items()}
    write_tensors(folder / "model.safetensors", weights)
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


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in sorted(model.named_parameters()) if "lora_" not in n}
