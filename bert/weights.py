"""Reads and writes an encoder's folder in Hugging Face layout."""

from pathlib import Path

import torch
from torch import Tensor

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel, Parts
from fastlora.errors import UserError
from fastlora.tensors import copy_tensors, read_tensors, write_tensors

_HEADS = ("cls.", "lm_head.", "classifier.", "qa_outputs.")  # what transformers' classes add
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # of its old versions


def load_encoder(folder: str | Path, parts: Parts | None = None) -> tuple[BertModel, list[str]]:
    """Build the encoder of a folder with its weights in fp32, in evaluation mode.

    Accepts "bert." or "roberta." prefixes, LayerNorm.gamma/beta, heads (ignored) and no pooler (it
    is drawn from normal(0, 0.02)). Returns the model and notes; UserError as ``copy_tensors``.
    """
    path = Path(folder) / "model.safetensors"
    config, (raw, _) = BertConfig.from_json(path.with_name("config.json")), read_tensors(path)
    H, there = config.hidden_size, sum(tensor.numel() for tensor in raw.values())
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    rows += config.num_hidden_layers * (4 * H + 2 * config.intermediate_size)
    if H * rows > there:  # checked before the model takes memory
        raise UserError(f"{path}: has {there:,} values (config.json says {H * rows:,} or more)")
    model = BertModel(config, parts or Parts())
    tensors: dict[str, Tensor] = {}
    for raw_name, tensor in raw.items():
        name = raw_name.removeprefix("bert.").removeprefix("roberta.")
        name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if name in tensors:
            raise UserError(f"{path}: tensor {name!r} is there twice, once as {raw_name!r}")
        if not name.startswith(_HEADS + _BUFFERS):
            tensors[name] = tensor
    heads = sum(name.startswith(_HEADS) for name in raw)
    notes = [f"ignored the {heads} tensors of its heads"] if heads else []
    # With only half a pooler, copy_tensors raises and names the missing half.
    if not any(name.startswith("pooler.") for name in tensors):
        weight = torch.empty(H, H).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        tensors |= {"pooler.dense.weight": weight, "pooler.dense.bias": torch.zeros(H)}
        notes.append("the checkpoint has no pooler: initialised from normal(0, 0.02)")
    copy_tensors(path, tensors, model.state_dict())
    return model.eval(), notes


def save_encoder(model: BertModel, folder: str | Path) -> None:
    """Write what transformers' AutoModel loads, without LoRA parameters: merge adapters first."""
    weights = {n: p.float() for n, p in model.named_parameters() if "lora_" not in n}
    write_tensors(Path(folder) / "model.safetensors", weights)
    model.config.to_json(Path(folder) / "config.json")
