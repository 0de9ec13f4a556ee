"""Several configurations trained side by side: one encoder pass a step serves all of them.

Each has its own adapters and heads, named NAME@i, its own learning rates, warmup and decay; model,
data, their order, sizes of steps and seed are those of the first. A variant ends as its
configuration alone would, to rounding (and to the encoder's own dropout, where that is on).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch

from fastlora.checkpoint import trainable
from fastlora.config import TrainConfig
from fastlora.console import Log
from fastlora.errors import user_errors
from fastlora.lora import VARIANT
from fastlora.model import MultitaskBert
from fastlora.parallel import Ranks
from fastlora.setup import Setup, adapter_settings, read_encoder, to_compute
from fastlora.train import Trainer, owner


def side_by_side(setup: Setup, configs: Sequence[TrainConfig], log: Log) -> Trainer:
    """A trainer of all configurations at once, with nothing written.

    The score of a task under configuration i is the trainer's for task "NAME@i".
    """
    indices = range(len(configs))
    tasks = {variant_name(n, i): task for i in indices for n, task in setup.inputs.tasks.items()}
    settings = {
        variant_name(name, i): lora
        for i, config in enumerate(configs)
        for name, lora in adapter_settings(config, setup.inputs.tasks).items()
    }
    loaded = deepcopy(setup.loaded) if setup.loaded else read_encoder(setup.inputs.source)
    torch.manual_seed(configs[0].seed)
    model = MultitaskBert(loaded.encoder, tasks, configs[0].pairs)
    with user_errors():
        model.adapt(settings)
    to_compute(model, setup.config, setup.device)
    together = replace(
        setup,
        config=configs[0],
        variants=tuple(configs),
        train={variant_name(n, i): data for i in indices for n, data in setup.train.items()},
        dev={variant_name(n, i): data for i in indices for n, data in setup.dev.items()},
    )
    return Trainer(together, model, None, Ranks(setup.device), log)


def variant_parameters(trainer: Trainer, variant: int) -> int:
    """How many parameters a variant trains."""
    parameters = trainable(trainer.model).items()
    return sum(p.numel() for name, p in parameters if is_variant(owner(name), variant))


def is_variant(name: str, variant: int) -> bool:
    """Whether a task or adapter is of this variant."""
    return name.endswith(variant_name("", variant))


def variant_name(name: str, variant: int) -> str:
    """What a task or adapter of a variant is called."""
    return f"{name}{VARIANT}{variant}"
