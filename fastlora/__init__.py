"""LoRA training for BERT-sized encoders; the names below import on first use."""

import importlib
from typing import Any

_HOMES = {
    "LoRALinear": "lora",
    "LoraConfig": "config",
    "MultitaskBert": "model",
    "Segment": "lora",
    "Task": "tasks",
    "TrainConfig": "config",
    "inject": "lora",
    "load_trained": "trained",
    "lora_layers": "lora",
    "merge": "lora",
    "parameter_report": "lora",
    "run_training": "session",
    "unmerge": "lora",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Lazy, so that --help need not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastlora.{_HOMES[name]}"), name)
