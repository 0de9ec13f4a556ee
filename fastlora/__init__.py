"""LoRA for BERT-sized encoders; the public names below are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora import bert, kernels
    from fastlora.data.tasks import Task
    from fastlora.errors import Interrupted, RunError, UserError
    from fastlora.interop.accelerate import accelerate, restore
    from fastlora.lora.config import LoraConfig
    from fastlora.lora.files import load_adapter, save_adapter
    from fastlora.lora.layer import LoRALinear, lora_layers
    from fastlora.lora.model import (
        eject,
        inject,
        merge,
        merge_and_unload,
        pack,
        parameter_report,
        set_adapter,
        unmerge,
        use_adapter,
    )
    from fastlora.lora.routing import Segment
    from fastlora.multitask.metrics import Prediction
    from fastlora.multitask.model import MultitaskBert
    from fastlora.runs.api import Dataset, Run, train
    from fastlora.runs.session import run_training
    from fastlora.runs.trained import Trained, load
    from fastlora.training.config import TrainConfig

_NAMES_OF = {
    "training.config": ["TrainConfig"],
    "interop.accelerate": ["accelerate", "restore"],
    "errors": ["Interrupted", "RunError", "UserError"],
    "lora.config": ["LoraConfig"],
    "lora.files": ["load_adapter", "save_adapter"],
    "lora.layer": ["LoRALinear", "lora_layers"],
    "lora.model": [
        *("eject", "inject", "merge", "merge_and_unload", "pack", "parameter_report"),
        *("set_adapter", "unmerge", "use_adapter"),
    ],
    "lora.routing": ["Segment"],
    "multitask.model": ["MultitaskBert"],
    "runs.api": ["Dataset", "Run", "train"],
    "runs.session": ["run_training"],
    "data.tasks": ["Task"],
    "runs.trained": ["Trained", "load"],
    "multitask.metrics": ["Prediction"],
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
_PACKAGES = ("bert", "kernels")
__all__ = [
    "Dataset", "Interrupted", "LoRALinear", "LoraConfig", "MultitaskBert", "Prediction", "Run",
    "RunError", "Segment", "Task", "TrainConfig", "Trained", "UserError", "accelerate", "bert",
    "eject", "inject", "kernels", "load", "load_adapter", "lora_layers", "merge",
    "merge_and_unload", "pack", "parameter_report", "restore", "run_training", "save_adapter",
    "set_adapter", "train", "unmerge", "use_adapter",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that --help need not import torch.
    if name in _PACKAGES:
        return importlib.import_module(f"fastlora.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastlora.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
