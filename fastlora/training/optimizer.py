"""The optimizer of a run, and the schedule of its learning rates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fastlora.multitask.model import MultitaskBert
from fastlora.training.checkpoint import trainable
from fastlora.training.config import TrainConfig


def owner(parameter: str) -> str:
    """The task of a head's parameter, the adapter of a LoRA one, else the end of the name."""
    parts = parameter.split(".")
    return parts[1] if parts[0] == "heads" else parts[-1]


def make_optimizer(model: MultitaskBert, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW for the trainable parameters: heads have their own rate, and only matrices decay.

    The learning rate of B is `config.lora_plus` times that of A (LoRA+, Hayou et al. 2024).
    """
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    for name, parameter in trainable(model).items():
        special = config.task_settings(owner(name))
        lr, head_lr = config.peak_rates
        lr = head_lr if name.startswith("heads.") else special.lr or lr
        lr *= config.lora_plus if ".lora_B." in name else 1
        warmup = config.warmup if special.warmup is None else special.warmup
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        group: dict[str, Any] = {"lr": lr, "peak": lr, "weight_decay": decay, "params": []}
        group["config"] = replace(config, warmup=warmup)
        groups.setdefault((warmup, lr, decay), group)["params"].append(parameter)
    # This eps is that of BERT; a smaller one turns rounding errors of tiny gradients into steps.
    return torch.optim.AdamW(list(groups.values()), eps=1e-6, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
    """Set the learning rates of `step` (from 0) of `total`; those that are tensors, in place."""
    for group in optimizer.param_groups:
        lr = group["peak"] * schedule(group["config"], step, total)
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """The factor of the peak learning rate at `step` (from 0) of `total`."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    cosine = 0.5 * (1 - math.cos(math.pi * left))
    return {"linear": left, "cosine": cosine, "constant": 1.0}[config.schedule]
