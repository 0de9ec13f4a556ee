"""The training loop: file -> batch -> loss -> step -> checkpoint, once for all modes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastlora.console import Bar, Log, losses_text, number
from fastlora.data.batches import Batch, collate, plan_epoch
from fastlora.errors import Interrupted, RunError
from fastlora.multitask.model import VARIANT, MultitaskBert, task_losses
from fastlora.multitask.predictor import Features, predict, scores_of
from fastlora.training.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from fastlora.training.config import TaskLoraConfig, TrainConfig
from fastlora.training.cuda_graphs import GraphedStep
from fastlora.training.distributed import Ranks
from fastlora.training.metrics_log import Metrics
from fastlora.training.setup import Setup, seed_random

LOG_EVERY = 10
_STEP_SEED = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Result:
    """How a run ended: dev scores by task after the last epoch, and the throughput."""

    scores: dict[str, float | None]
    steps: int
    examples: int
    seconds: float


def owner(parameter: str) -> str:
    """The task or adapter that a parameter's name names; for an encoder's own, something else."""
    parts = parameter.split(".")
    return parts[1] if parts[0] == "heads" else parts[-1]


def make_optimizer(model: MultitaskBert, configs: Sequence[TrainConfig]) -> torch.optim.AdamW:
    """AdamW over what trains: heads at their own rate, decay on matrices only.

    `configs` are those of the model's variants, or the only one.
    """
    groups: dict[tuple[int, float, float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        whose, _, variant = owner(name).partition(VARIANT)
        config = configs[int(variant or 0)]
        own = config.task_settings(whose) if whose in (config.tasks or ()) else TaskLoraConfig()
        lr = config.peak_head_lr if name.startswith("heads.") else own.lr or config.peak_lr
        warmup = config.warmup if own.warmup is None else own.warmup
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((int(variant or 0), warmup, lr, decay), []).append(parameter)
    settings = [
        {"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
        | {"config": replace(configs[variant], warmup=warmup)}
        for (variant, warmup, lr, decay), params in groups.items()
    ]
    # BERT's own eps; a smaller one turns rounding of tiny gradients into steps.
    return torch.optim.AdamW(settings, eps=1e-6, fused=True)


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """The factor of the peak learning rate at `step` (from 0) of `total`."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    if config.schedule == "linear":
        return left
    if config.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0


class Trainer:
    """One run: its model, optimiser and progress through the plan of batches."""

    def __init__(
        self, setup: Setup, model: MultitaskBert, folder: Path | None, ranks: Ranks, log: Log
    ) -> None:
        self.setup, self.config, self.model = setup, setup.config, model.train()
        self.folder, self.ranks, self.log = folder, ranks, log  # no folder: nothing is written
        self.device = setup.device
        self.optimizer = make_optimizer(model, setup.variants or (self.config,))
        self.parameters = list(trainable(model).values())
        # What trains together is averaged and clipped together, and apart from the rest.
        unit = {n: model.unit(t) for t in model.tasks for n in (t, *model.adapters(t))}
        self.units: dict[str, list[nn.Parameter]] = {name: [] for name in unit.values()}
        for name, parameter in trainable(model).items():
            self.units[unit.get(owner(name), "")].append(parameter)
        self.dead: list[nn.Parameter] = []  # of variants that diverged
        self.unit_of = np.array([list(self.units).index(unit[task]) for task in setup.train])
        fp16 = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        # It starts at its first use, and a rank may have no examples in the first step.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.progress = Progress()
        self.stop = setup.stop
        # Per task, on the device until logged: [summed loss, examples].
        self.sums = torch.zeros(len(setup.train), 2, device=self.device)
        self.train_features: Features | None = None
        self.graphed: GraphedStep | None = None
        self.positions: int | None = None  # the encoder's, where batches come in few shapes
        if self.config.cuda_graphs:
            self.graphed = GraphedStep(self.whole, self.optimizer, self.scaler, [self.sums])
            self.positions = model.encoder.config.max_position_embeddings
        self.dev_features: Features | None = None
        self.outputs: dict[str, np.ndarray] = {}  # of the dev data, after the last epoch
        lengths = [len(self.plan(epoch)) for epoch in range(self.config.epochs)]
        self.total = min(sum(lengths), self.config.max_steps or sum(lengths))

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint; returns whether there was one."""
        path = latest_checkpoint(self.folder / "checkpoints") if self.folder else None
        if path is None:
            return False
        self.progress = load_checkpoint(path, self.model, self.optimizer, self.scaler)
        return True

    def run(self) -> Result:
        """Train to the end.

        Raises:
            Interrupted: when `stop` asked for it, with the state saved.
            RunError: when the loss is no longer finite.
        """
        config, progress = self.config, self.progress
        if config.mode == "frozen":
            self.train_features = Features(self.model, self.setup.train)
            self.dev_features = Features(self.model, self.setup.dev)
        self.metrics = None
        if self.folder is not None and self.ranks.first:
            self.metrics = Metrics(self.folder, progress.step)
        self.bar = Bar(self.log, self.total, progress.step)
        try:
            with self.stop:
                while progress.epoch < config.epochs:
                    self.epoch()
        finally:
            self.bar.close()
            if self.metrics:
                self.metrics.close()
        scores = progress.scores[-1]["scores"] if progress.scores else {}
        return Result(scores, progress.step, progress.examples, progress.seconds)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch."""
        config = self.config
        tokens = int(config.tokens_per_batch)  # "auto" has become a number by now
        copies = len(self.setup.variants) or 1
        return plan_epoch(self.setup.train, tokens, config.seed, epoch, config.sampling, copies)

    def epoch(self) -> None:
        """The rest of the current epoch, its scores on the dev data, and a checkpoint."""
        progress = self.progress
        for batch_plan in self.plan(progress.epoch)[progress.position :]:
            if progress.step >= self.total:
                break
            start = time.perf_counter()
            stop = self.step(batch_plan)
            progress.seconds += time.perf_counter() - start
            progress.step += 1
            progress.position += 1
            progress.examples += len(batch_plan)
            if progress.step % LOG_EVERY == 0 or progress.step == self.total:
                self.log_losses()
            if stop:
                self.save()
                raise Interrupted
            if progress.step % self.config.save_every == 0:
                self.save()
        self.evaluate()
        done = progress.step >= self.total
        progress.epoch, progress.position = self.config.epochs if done else progress.epoch + 1, 0
        self.save()

    def step(self, batch_plan: np.ndarray) -> bool:
        """One optimiser step on one planned batch; returns whether the run should stop."""
        if not self.model.training:  # as evaluating leaves it
            self.model.train()
        for group in self.optimizer.param_groups:
            lr = group["peak"] * schedule(group["config"], self.progress.step, self.total)
            group["lr"] = group["lr"].fill_(lr) if self.graphed else lr
        if self.graphed:
            self.seed_part(0, 1)
            self.graphed(*self.inputs(batch_plan))
            return self.stop.asked
        parts = self.ranks.world * self.config.accumulate
        first = self.ranks.rank * self.config.accumulate
        for part in range(first, first + self.config.accumulate):
            if part < len(batch_plan):
                self.seed_part(part, parts)
                self.scaler.scale(self.loss(*self.inputs(batch_plan, part, parts))).backward()
        for parameter in self.dead:
            parameter.grad = None
        stop = self.ranks.sum_gradients(self.parameters, self.stop.asked)
        self.update()
        return stop

    def whole(self, batch: Batch, facts: Tensor) -> None:
        """A step's work on the device."""
        self.scaler.scale(self.loss(batch, facts)).backward()
        self.update()

    def update(self) -> None:
        """Clip the gradients, step, and forget them."""
        self.scaler.unscale_(self.optimizer)
        for parameters in self.units.values():
            nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def seed_part(self, part: int, parts: int) -> None:
        """Make the random numbers of a part of a step a function of (seed, step, part) alone.

        So a resumed run draws what the uninterrupted one would, with no state to save, and two
        processes draw what one process with --accumulate 2 does.
        """
        index = self.progress.step * parts + part + 1
        seed_random((self.config.seed + index * _STEP_SEED) % 2**63, self.device)

    def inputs(self, batch_plan: np.ndarray, part: int = 0, parts: int = 1) -> tuple[Batch, Tensor]:
        """A part of a batch, and [tasks, 2]: its examples of a task, 1 / all of the task's unit."""
        planned = batch_plan[part::parts]
        units = self.unit_of[batch_plan[:, 0]]
        counts = [np.sum(units == unit) for unit in self.unit_of]
        own = np.bincount(planned[:, 0], minlength=len(counts))
        facts = np.stack([own, 1 / np.maximum(counts, 1)], 1).astype(np.float32)
        batch = collate(self.setup.train, planned, self.positions).to(self.device)
        return batch, torch.from_numpy(facts).to(self.device, non_blocking=True)

    def loss(self, batch: Batch, facts: Tensor) -> Tensor:
        """A part's share of a batch's loss [], each unit's averaged over its examples in the batch.

        Each task's summed loss is added to the running sums.
        """
        features = self.train_features
        with self.autocast():
            outputs = self.model(batch, features and features(batch))
        found = task_losses(self.model.tasks, outputs, batch)
        losses = torch.stack([found.get(name, facts.new_zeros(())) for name in self.setup.train])
        self.sums += torch.stack((losses.detach(), facts[:, 0]), 1)
        return losses @ facts[:, 1]

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for full fine-tuning, whose weights stay fp32 masters."""
        if self.config.mode != "full" or self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, self.setup.dtype)

    def log_losses(self) -> None:
        """Report the mean losses since the last report.

        Raises:
            RunError: when one is not finite.
        """
        sums = self.ranks.sum(self.sums).tolist()
        self.sums.zero_()
        pairs = zip(self.setup.train, sums, strict=True)
        losses = {name: total / count for name, (total, count) in pairs if count}
        progress = self.progress
        diverged = [name for name, value in losses.items() if not math.isfinite(value)]
        if self.setup.variants:  # the end of one is not the others'
            for name in diverged:
                self.dead += self.units.pop(self.model.unit(name), [])
        elif diverged:
            raise RunError(
                f"the loss diverged by step {progress.step} ({losses_text(losses)}); lower --lr "
                f"(it is {self.config.lr:g}) or raise --warmup"
            )
        rate = progress.examples / progress.seconds
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.metrics:
            values = {"epoch": progress.epoch, "lr": lr, "loss": losses, "examples_per_s": rate}
            self.metrics.write(progress.step, values)
        self.bar.update(progress.step, f"{rate:.0f} examples/s  loss {losses_text(losses)}")

    def evaluate(self) -> None:
        """Score the dev data; every rank computes it, so that none waits."""
        self.outputs = predict(self.model, self.setup.dev, self.dev_features)
        scores = scores_of(self.setup.dev, self.outputs)
        progress = self.progress
        progress.scores.append({"epoch": progress.epoch, "step": progress.step, "scores": scores})
        if self.metrics:
            self.metrics.write(progress.step, {"epoch": progress.epoch, "dev": scores})
        text = "  ".join(f"{name} {number(value)}" for name, value in scores.items())
        self.log.line(f"epoch {progress.epoch + 1}/{self.config.epochs}  dev {text}")

    def save(self) -> None:
        """Write a checkpoint (the first rank only) and wait for it."""
        if self.folder is not None and self.ranks.first:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, self.model, self.optimizer, self.scaler, self.progress)
        self.ranks.barrier()
