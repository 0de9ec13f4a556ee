"""Several configurations trained side by side: one encoder pass a step serves all of them.

Each has its own adapters and heads, named NAME@i, its own learning rates, warmup and decay; model,
data, their order, sizes of steps and seed are those of the first. A variant ends as its
configuration alone would, to rounding (and to the encoder's own dropout, where that is on; in
fp16, all skip the steps that overflow in one of them, until that one is given up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.console import Log
from fastlora.multitask.model import VARIANT
from fastlora.training.checkpoint import trainable
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.loop import Trainer
from fastlora.training.optimizer import owner
from fastlora.training.setup import Setup, adapter_settings, build_model, to_compute

T = TypeVar("T")


def side_by_side(setup: Setup, configs: Sequence[TrainConfig], log: Log) -> Trainer:
    """A trainer of all configurations at once, with nothing written.

    The score of a task under configuration i is the trainer's for task "NAME@i".
    """

    def each(named: Mapping[str, T]) -> dict[str, T]:
        return {variant_name(n, i): v for i in range(len(configs)) for n, v in named.items()}

    tasks = setup.inputs.tasks
    settings = {
        variant_name(name, i): lora
        for i, config in enumerate(configs)
        for name, lora in adapter_settings(config, tasks).items()
    }
    model, *_ = build_model(setup, each(tasks), configs[0], settings)
    to_compute(model, setup.config, setup.device)
    together = replace(
        setup,
        config=configs[0],
        variants=tuple(configs),
        train=each(setup.train),
        dev=each(setup.dev),
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
