"""The training loop, the same for all modes: planned batch, loss, step, checkpoint."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastlora.console import Bar, Log, format_scores
from fastlora.data.batches import Batch, collate, plan_epoch
from fastlora.devices import synchronized_time
from fastlora.errors import Diverged, Interrupted, RunError, in_place_of
from fastlora.multitask.metrics import class_weights
from fastlora.multitask.model import MultitaskBert, task_losses
from fastlora.multitask.predictor import Features, predict, scores_of
from fastlora.training import checkpoint as checkpoints
from fastlora.training.cuda_graphs import GraphedStep
from fastlora.training.distributed import World
from fastlora.training.metrics_log import METRICS, Metrics
from fastlora.training.optimizer import make_optimizer, owner, set_rates
from fastlora.training.setup import DTYPES, Setup, seed_random

LOG_EVERY = 10  # steps
COUNTED_EPOCHS = 100  # planned before the first step, to count the steps of the run
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Result:
    """How a run ended: the dev scores by task of the weights that are kept, and the throughput."""

    scores: dict[str, float | None]
    kept: int  # the step after which the weights are kept
    steps: int
    examples: int
    seconds: float


class Trainer:
    """One run: its model, optimizer and progress through the planned batches.

    If `folder` is None, nothing is written.
    """

    def __init__(
        self, setup: Setup, model: MultitaskBert, folder: Path | None, world: World, log: Log
    ) -> None:
        self.setup, self.config, self.model = setup, setup.config, model.train()
        self.folder, self.world, self.log = folder, world, log
        self.device, self.stop = setup.device, setup.stop
        self.optimizer = make_optimizer(model, self.config)
        self.parameters = list(checkpoints.trainable(model).values())
        # Tasks that share parameters are a group. The loss is averaged and the gradients are
        # clipped by group, so that what shares nothing trains as it would alone.
        group = {n: model.training_group(t) for t in model.tasks for n in (t, *model.adapters(t))}
        self.groups: dict[str, list[nn.Parameter]] = {name: [] for name in group.values()}
        for name, parameter in checkpoints.trainable(model).items():
            self.groups[group.get(owner(name), "")].append(parameter)
        self.group_of = np.array([list(self.groups).index(group[task]) for task in setup.train])
        fp16 = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        # A scaler is initialised by its first loss, and a process may have none in the first step.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.progress = checkpoints.Progress()
        self.started: float | None = None  # when the steps began that `progress.seconds` lacks
        # Per task, on the device until logged: [summed loss, examples].
        self.sums = torch.zeros(len(setup.train), 2, device=self.device)
        weights = {n: class_weights(data.task, data.labels) for n, data in setup.train.items()}
        self.class_weights = {
            n: torch.from_numpy(w).to(self.device) for n, w in weights.items() if w is not None
        }
        self.graphed: GraphedStep | None = None
        self.max_length: int | None = None  # given to `collate`, for batches of few shapes
        if self.config.cuda_graphs:
            step = self.forward_backward_update
            self.graphed = GraphedStep(step, self.optimizer, self.scaler, [self.sums])
            self.max_length = model.encoder.config.longest
        self.train_features: Features | None = None  # of a frozen encoder
        self.dev_features: Features | None = None
        self.outputs: dict[str, np.ndarray] = {}  # on the dev data, with the current weights
        self.total = self.count_steps()

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint; returns whether there was one.

        Raises RunError if the run has lost its checkpoints, and as `load_checkpoint` does.
        """
        if self.folder is None:
            return False
        folder = self.folder / "checkpoints"
        if (path := checkpoints.latest_checkpoint(folder, self.log.line)) is None:
            if self.world.first:
                logged = self.folder / METRICS
                began = logged.exists() and logged.stat().st_size > 0
                checkpoints.start_checkpoints(folder, began)
            return False
        state = (self.model, self.optimizer, self.scaler)
        self.progress = checkpoints.load_checkpoint(path, *state, self.setup.fingerprints)
        if self.progress.sums and self.world.first:  # the sums of all processes
            self.sums.copy_(torch.tensor(self.progress.sums))
        return True

    def run(self) -> Result:
        """Train to the end.

        Raises Interrupted when `stop` asked for it, with the state saved, and RunError when the
        loss or a weight is no longer finite.
        """
        config, progress = self.config, self.progress
        if config.mode == "frozen":
            self.train_features = Features(self.model, self.setup.train)
            self.dev_features = Features(self.model, self.setup.dev)
        with ExitStack() as stack:
            self.metrics = None
            if self.folder is not None and self.world.first:
                scored = progress.scores[-1]["step"] if progress.scores else 0
                metrics = Metrics(self.folder, progress.step, self.log.line, scored)
                self.metrics = stack.enter_context(closing(metrics))
            self.bar = stack.enter_context(closing(Bar(self.log, self.total, progress.step)))
            stack.enter_context(self.stop)
            if progress.epoch >= config.epochs:
                self.save()  # which removes what a process left that was killed in the last save
            while progress.epoch < config.epochs:
                self.train_epoch()
        kept = self.load_kept()
        throughput = progress.step, progress.examples, progress.seconds
        return Result(kept["scores"], kept["step"], *throughput)

    def load_kept(self) -> dict[str, Any]:
        """Load the weights that --keep asks for; returns their evaluation."""
        last, best = self.progress.scores[-1], self.progress.best
        if self.config.keep == "last" or self.folder is None or not best or best is last:
            return last
        if self.world.first:
            path = checkpoints.checkpoint_at(self.folder / "checkpoints", best["step"])
            checkpoints.load_weights(path, self.model)
            self.outputs = {}
        kept = f"kept the weights of step {best['step']}, dev {format_scores(best['scores'])}"
        others = f"the last ones, of step {last['step']}, have {format_scores(last['scores'])}"
        self.log.line(f"{kept}; {others}")
        return best

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch."""
        config, data = self.config, self.setup.train
        return plan_epoch(data, config.tokens_per_batch, config.seed, epoch, config.sampling)

    def count_steps(self) -> int:
        """The steps of the run: exact up to `COUNTED_EPOCHS`, and extrapolated beyond."""
        counted, steps, most = min(self.config.epochs, COUNTED_EPOCHS), 0, self.config.max_steps
        for epoch in range(counted):
            steps += len(self.plan(epoch))
            if most and steps >= most:
                return most
        return min(steps * self.config.epochs // counted, most or 2**63)

    def train_epoch(self) -> None:
        """Train the rest of the current epoch, score the dev data, and save a checkpoint."""
        progress = self.progress
        for batch_plan in self.plan(progress.epoch)[progress.position :]:
            if self.is_done():
                break
            if self.started is None:
                self.started = synchronized_time(self.device)
            stop = self.step(batch_plan)
            progress.step += 1
            progress.position += 1
            progress.examples += len(batch_plan)
            if progress.step % LOG_EVERY == 0 or progress.step == self.total:
                self.log_losses()
            due = self.config.eval_every and progress.step % self.config.eval_every == 0
            if due:
                self.evaluate()
            if stop or due or progress.step % self.config.save_every == 0:
                self.save()
            if stop:
                raise Interrupted
        if not progress.scores or progress.scores[-1]["step"] < progress.step:
            self.evaluate()
        if (done := self.is_done()) and progress.step < self.total:
            self.log.line(f"stopped by --patience {self.config.patience}: no better score since")
        progress.epoch, progress.position = self.config.epochs if done else progress.epoch + 1, 0
        self.save()

    def is_done(self) -> bool:
        """Whether all steps are done, or --patience evaluations brought no better mean score."""
        scores, best, patience = self.progress.scores, self.progress.best, self.config.patience
        worse = len(scores) - 1 - scores.index(best) if best else 0
        return self.progress.step >= self.total or (patience is not None and worse >= patience)

    def step(self, batch_plan: np.ndarray) -> bool:
        """One optimizer step on one planned batch; returns whether the run should stop."""
        if not self.model.training:  # after an evaluation
            self.model.train()
        set_rates(self.optimizer, self.progress.step, self.total)
        if self.graphed:
            self.seed_part(0, 1)
            self.graphed(*self.gather(batch_plan))
            return self.stop.asked
        parts = self.world.size * self.config.accumulate
        first = self.world.rank * self.config.accumulate
        for part in range(first, min(first + self.config.accumulate, len(batch_plan))):
            self.seed_part(part, parts)
            self.scaler.scale(self.loss(*self.gather(batch_plan, part, parts))).backward()
        stop = self.world.sum_gradients(self.parameters, self.stop.asked)
        self.update()
        return stop

    def forward_backward_update(self, batch: Batch, shares: Tensor) -> None:
        """Compute a step on the device, for a CUDA graph; the arguments are those of `gather`."""
        self.scaler.scale(self.loss(batch, shares)).backward()
        self.update()

    def update(self) -> None:
        """Clip the gradients, take the optimizer's step, and set the gradients to None."""
        self.scaler.unscale_(self.optimizer)
        for parameters in self.groups.values():
            nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def seed_part(self, part: int, parts: int) -> None:
        """Seed the random numbers of a part of a step with (seed, step, part) alone.

        So a resumed run draws the same numbers as an uninterrupted one, with no state to save, and
        two processes the same as one process with --accumulate 2.
        """
        index = self.progress.step * parts + part + 1
        seed_random((self.config.seed + index * _SEED_STRIDE) % 2**63, self.device)

    def gather(self, batch_plan: np.ndarray, part: int = 0, parts: int = 1) -> tuple[Batch, Tensor]:
        """A part of a planned batch, and the shares of its tasks in the loss, fp32 [tasks, 2].

        A task's row has its examples in this part, and 1 / the examples of its group of tasks in
        the whole batch.
        """
        planned = batch_plan[part::parts]
        groups = self.group_of[batch_plan[:, 0]]
        averaged = [np.sum(groups == group) for group in self.group_of]
        examples = np.bincount(planned[:, 0], minlength=len(averaged))
        shares = np.stack([examples, 1 / np.maximum(averaged, 1)], 1).astype(np.float32)
        batch = collate(self.setup.train, planned, self.max_length).to(self.device)
        return batch, torch.from_numpy(shares).to(self.device, non_blocking=True)

    def loss(self, batch: Batch, shares: Tensor) -> Tensor:
        """A part's share of the batch's loss []; each task's summed loss is added to `sums`.

        The loss of a batch is the sum, over groups of tasks, of the mean over a group's examples.
        """
        features = self.train_features
        # Mixed precision for full fine-tuning, whose weights stay in fp32.
        dtype, full = DTYPES[self.config.precision], self.config.mode == "full"
        with torch.autocast(self.device.type, dtype, enabled=full and dtype != torch.float32):
            outputs = self.model(batch, features and features(batch))
        summed = task_losses(self.model.tasks, outputs, batch, self.class_weights)
        zero = shares.new_zeros(())
        losses = torch.stack([summed.get(name, zero) for name in self.setup.train])
        self.sums += torch.stack((losses.detach(), shares[:, 0]), 1)
        return losses @ shares[:, 1]

    def stop_clock(self) -> None:
        """Wait until the device has done its steps, and add their time to `progress`."""
        if self.started is not None:
            self.progress.seconds += synchronized_time(self.device) - self.started
            self.started = None

    def log_losses(self) -> None:
        """Log the mean losses since the last call; raises Diverged if one is not finite."""
        self.stop_clock()
        sums = self.world.sum(self.sums).tolist()
        self.sums.zero_()
        pairs = zip(self.setup.train, sums, strict=True)
        losses = {name: total / count for name, (total, count) in pairs if count}
        progress = self.progress
        if not all(map(math.isfinite, losses.values())):
            what = f"the loss diverged by step {progress.step} ({format_scores(losses)})"
            raise Diverged(f"{what}; lower --lr (it is {self.config.lr:g}) or raise --warmup")
        rate = progress.examples / progress.seconds
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.metrics:
            values = {"epoch": progress.epoch, "lr": lr, "loss": losses, "examples_per_s": rate}
            self.metrics.write(progress.step, values)
        self.bar.update(progress.step, f"{rate:.0f} examples/s  loss {format_scores(losses)}")

    def evaluate(self) -> None:
        """Score the dev data, in each process, as waiting for one would take as long."""
        self.stop_clock()
        self.outputs = predict(self.model, self.setup.dev, self.dev_features)
        scores, progress = scores_of(self.setup.dev, self.outputs), self.progress
        progress.scores.append({"epoch": progress.epoch, "step": progress.step, "scores": scores})
        if self.metrics:
            self.metrics.write(progress.step, {"epoch": progress.epoch, "dev": scores})
        place = f"epoch {progress.epoch + 1}/{self.config.epochs}  step {progress.step}"
        self.log.line(f"{place}  dev {format_scores(scores)}")

    def save(self) -> None:
        """Write a checkpoint on the first rank; RunError when a weight is not finite."""
        if self.folder is None:
            return
        self.stop_clock()
        checkpoints.check_finite(checkpoints.trainable(self.model), self.progress.step)
        self.progress.sums = self.world.sum(self.sums.clone()).tolist()
        if self.world.first:
            folder = self.folder / "checkpoints"
            state = (self.model, self.optimizer, self.scaler, self.progress)
            failed = (OSError, SafetensorError), RunError, f"{folder}: cannot be written to: "
            with in_place_of(*failed):
                checkpoints.save_checkpoint(folder, *state, self.setup.fingerprints)
        self.world.barrier()
