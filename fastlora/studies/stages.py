"""A low-cost search of LoRA settings, by short runs and by truncation of trained adapters.

The trials are those of an Optuna study in a journal file, which several processes may work on.
There are five stages:
    defaults   a full run with the settings given (trial 0)
    rates      learning rate and warmup, by successive halving on growing shares of the examples
    ranks      the largest rank, with the rates found and those given; truncation gives the smaller
    shapes     dropout and targets, by successive halving
    best       full runs over three seeds, with the settings found and with those given
One half of the dev examples scores the stages rates, ranks and shapes, the other the full runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from fastlora.console import Log
from fastlora.data.batches import subset
from fastlora.data.reading import TaskData
from fastlora.errors import Diverged, Interrupted, RunError, UserError
from fastlora.lora.config import TARGETS
from fastlora.runs.report import trained_share
from fastlora.studies.grid import run_once
from fastlora.studies.journal import open_journal
from fastlora.studies.truncation import RANKS, smallest_within_error, sweep
from fastlora.training.checkpoint import trainable
from fastlora.training.config import SearchConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.loop import Trainer
from fastlora.training.setup import Setup, build_model, to_compute

SEEDS = 3
RATES, WARMUPS = (1.0, 2.0, 0.5, 4.0, 0.25), (0.06, 0.2)  # RATES multiply the rate given
SHAPES = ("value", "query,value", "query,key,value,output", ",".join(TARGETS))
DROPOUTS = (0.0, 0.05, 0.1, 0.2)
# The shares of the training examples that the rungs of a stage train on; other stages use all.
RUNGS = {"rates": (0.0625, 0.125), "ranks": (0.5,), "shapes": (0.0625, 0.125)}
REDUCTION = 3  # the best third of a stage's trials continues to the next rung
SHORT_DEV = 400  # the most dev examples of a task that score a short run
# The part of --budget that is reserved for the stages `ranks` and `best`, in times of a full run.
# Settings with more targets may take 1.5 times as long as those given.
RANKS_RUNS, BEST_RUNS = 1.0, SEEDS * 1.5 + SEEDS - 1
NO_SCORE = -1.0  # the value of a trial that diverged, or whose score is not defined
Params = dict[str, Any]


class Search:
    """A search in a folder, which continues from the journal there.

    Raises UserError if the journal is damaged, or a task has fewer than two dev examples.
    """

    def __init__(self, setup: Setup, folder: Path, how: SearchConfig, log: Log) -> None:
        self.setup, self.folder, self.how, self.log = setup, folder, how, log
        if few := [name for name, data in setup.dev.items() if len(data) < 2]:
            raise UserError(f"{few[0]}: has one dev example (a search expects two or more)")
        config = setup.config
        # The values of each setting to try; the first is the one given.
        values: dict[str, list[Any]] = {
            "lr": [config.peak_rates[0] * rate for rate in RATES],
            "warmup": [config.warmup, *WARMUPS],
            "r": [config.r, *RANKS],
            "dropout": [config.dropout, *DROPOUTS],
            "targets": [",".join(name for name in TARGETS if name in config.targets), *SHAPES],
            "seed": [config.seed + i for i in range(SEEDS)],
        }
        self.values = {name: list(dict.fromkeys(listed)) for name, listed in values.items()}
        self.defaults: Params = {name: listed[0] for name, listed in values.items()}
        self.space: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(listed) for name, listed in self.values.items()
        }
        self.space["lr"] = FloatDistribution(min(values["lr"]), max(values["lr"]), log=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=open_journal(folder / "journal.log"),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
        )

    def lead(self) -> Params:
        """Run all stages; returns the best settings.

        Raises:
            RunError: if no run of a stage has a score, or the budget is too small.
            Interrupted: if the setup's `stop` asked for it; the next call continues.
        """
        # A trial that an earlier process left running is marked as failed, and queued again.
        for trial in self.trials(TrialState.RUNNING):
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        defaults, values = self.defaults, self.values
        self.set_limits(self.stage("defaults", [defaults]).user_attrs["seconds"])
        grid = product(values["warmup"], values["lr"])
        planned = [{**defaults, "warmup": warmup, "lr": lr} for warmup, lr in grid]
        # For more trials than these, Optuna draws the learning rate and the warmup at random.
        free = {name: defaults[name] for name in ("r", "dropout", "targets", "seed")}
        planned = (planned + [free] * self.how.trials)[: self.how.trials]
        rates = self.stage("rates", planned).params
        # Short runs favour high rates, so the rates given get a longer run, too.
        pair = [{**params, "r": max(values["r"])} for params in (rates, defaults)]
        longer = self.stage("ranks", pair[: 1 + (pair[0] != pair[1])])
        best = {**longer.params, "r": smallest_within_error(dict(longer.user_attrs["ranks"]))}
        grid = product(values["dropout"], values["targets"])
        planned = [{**best, "dropout": dropout, "targets": targets} for dropout, targets in grid]
        best = self.stage("shapes", planned).params
        if best != defaults:
            for stage, params in (("defaults", defaults), ("best", best)):
                self.stage(stage, [{**params, "seed": seed} for seed in values["seed"]])
        self.study.set_user_attr("ended", True)
        return best

    def help(self) -> None:
        """Train queued trials until the process that called `lead` has finished the search."""
        while "ended" not in self.study.user_attrs:
            if not self.work():
                time.sleep(1)

    def set_limits(self, full: float) -> None:
        """Divide the budget: after how many seconds of trials a stage starts no further trial.

        `full` is the time of a full run. Raises RunError if the full runs exceed the budget.
        """
        if self.how.budget is None or "rates" in self.study.user_attrs:
            return
        budget, needed = self.how.budget.total_seconds(), full * (1 + RANKS_RUNS + BEST_RUNS)
        if budget < needed:
            raise RunError(
                f"--budget is {budget:.0f} s, but a full run takes {full:.0f} s, so that "
                f"{needed:.0f} s are needed; raise --budget, or lower --limit or --epochs"
            )
        self.study.set_user_attr("rates", full + (budget - needed) / 2)
        self.study.set_user_attr("shapes", budget - full * BEST_RUNS)

    def spent(self) -> float:
        """The total time of the trials of all processes so far, in seconds."""
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials())

    def trials(self, *states: TrialState, stage: str | None = None) -> list[FrozenTrial]:
        """The trials of a stage, or of all, in these states (by default, all but failed ones)."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if (trial.state in states if states else trial.state != TrialState.FAIL)
            and (stage is None or trial.user_attrs["stage"] == stage)
        ]

    def stage(self, stage: str, planned: Sequence[Params]) -> FrozenTrial:
        """Run the planned trials of a stage; returns the best of those that reached the last rung.

        Raises RunError if none has a score.
        """
        waiting = False
        while True:
            running = self.trials(TrialState.RUNNING, stage=stage)
            if self.queue(stage, planned) + self.work():
                continue
            if not running:
                break
            if not waiting:
                self.log.line(
                    f"waiting for trials of other processes ({len(running)}); if those have ended, "
                    "start this search again without --join"
                )
            waiting = True
            time.sleep(1)
        best = max(self.trials(TrialState.COMPLETE, stage=stage), key=value_of)
        if value_of(best) == NO_SCORE:
            raise RunError(
                f"no run of the stage {stage!r} has a score: they diverged (lower --lr), or all "
                "dev labels are equal"
            )
        return best

    def queue(self, stage: str, planned: Sequence[Params]) -> int:
        """Queue the planned trials that the study does not have; returns how many these are."""
        # A trial's `params` may be incomplete, but the settings that it was queued with never are.
        known = [trial.system_attrs["fixed_params"] for trial in self.trials(stage=stage)]
        count = 0
        for params in planned:
            if params in known:
                known.remove(params)
            else:
                self.study.enqueue_trial(params, {"stage": stage})
                count += 1
        return count

    def work(self) -> bool:
        """Train a queued trial and record its result; returns whether there was one."""
        if not (waiting := self.trials(TrialState.WAITING)):
            return False
        # Seeded so that no two trials get the same random settings, whichever process asks.
        started = len(self.study.trials) - len(waiting)
        self.study.sampler = optuna.samplers.RandomSampler(seed=started)
        trial, tell = self.study.ask(self.space), partial(self.study.tell, skip_if_finished=True)
        if "stage" not in trial.user_attrs:  # another process took the last queued trial
            tell(trial, state=TrialState.FAIL)
            return False
        try:
            tell(trial, self.train(trial))
        except optuna.TrialPruned:
            tell(trial, state=TrialState.PRUNED)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # `lead` was called again meanwhile, and queued this trial again
        except BaseException:
            tell(trial, state=TrialState.FAIL)
            raise
        return True

    def train(self, trial: optuna.Trial) -> float:
        """Train a trial rung by rung, and return the mean score of its tasks on the last rung.

        Raises TrialPruned if other trials scored higher on a rung, or if the budget is spent.
        """
        stage, start = trial.user_attrs["stage"], time.perf_counter()
        # The first trial of a stage is always trained, for the stage needs a result.
        others = self.trials(TrialState.COMPLETE, TrialState.PRUNED, stage=stage)
        if others and self.spent() > self.study.user_attrs.get(stage, np.inf):
            raise optuna.TrialPruned
        rungs = RUNGS.get(stage, (1.0,))
        for rung, share in enumerate(rungs):
            try:
                outcome = self.outcome(stage, trial.params, share)
            except Diverged:
                outcome = {"scores": dict.fromkeys(self.setup.train), "parameters": 0}
            scores = outcome["scores"].values()
            value = NO_SCORE if None in scores else mean(scores)
            trial.report(value, rung)
            seconds = time.perf_counter() - start
            for key, attribute in {"share": share, "seconds": seconds, **outcome}.items():
                trial.set_user_attr(key, attribute)
            name = f"{stage:<10} trial {trial.number}"
            self.log.line(f"{name}: {value:.4f} on {share:.0%} of the examples, {seconds:.0f} s")
            # Asynchronous successive halving (Li et al. 2020). Optuna's own pruner would compare
            # the trials of all stages.
            trials = [t.intermediate_values for t in self.trials(stage=stage)]
            reached = sorted(values[rung] for values in trials if rung in values)
            if rung + 1 < len(rungs) and value < reached[-max(1, len(reached) // REDUCTION)]:
                raise optuna.TrialPruned
        return value

    def outcome(self, stage: str, params: Params, share: float) -> dict[str, Any]:
        """Train with some settings; returns "scores", "parameters" and, for `ranks`, "ranks"."""
        setup = self.setup.narrow(self.configure(params))
        if stage not in RUNGS:
            out = self.folder / "runs" / stage / f"seed{params['seed']}"
            setup = replace(setup, dev=self.dev(1), config=replace(setup.config, out=out))
            result = run_once(setup, f"{stage} seed {params['seed']}", self.log)
            trained, _ = trained_share(result["parameters"])
            return {"scores": result["scores"], "parameters": trained}
        setup = replace(setup, dev=self.dev(0, None if stage == "ranks" else SHORT_DEV))
        trainer = train_share(setup, share)
        parameters = sum(p.numel() for p in trainable(trainer.model).values())
        outcome = {"scores": trainer.progress.scores[-1]["scores"], "parameters": parameters}
        if stage == "ranks":
            outcome["ranks"] = list(sweep(trainer.model, setup.dev, self.values["r"]).items())
        return outcome

    def dev(self, first: int, most: int | None = None) -> dict[str, TaskData]:
        """Each task's dev examples `first` (0 or 1), `first` + 2, ..., at most `most` of them."""
        halves = {name: np.arange(first, len(data), 2) for name, data in self.setup.dev.items()}
        return {
            name: subset(self.setup.dev[name], half[:: -(-len(half) // (most or len(half)))])
            for name, half in halves.items()
        }

    def configure(self, params: Params) -> TrainConfig:
        """A trial's configuration; alpha is fixed, so that one learning rate suits all ranks."""
        targets = tuple(params["targets"].split(","))
        return replace(self.setup.config, **{**params, "targets": targets})


def value_of(trial: FrozenTrial) -> float:
    """The value of a trial that reached the last rung."""
    return NO_SCORE if trial.value is None else trial.value


def train_share(setup: Setup, share: float) -> Trainer:
    """Train on a share of the examples, with a complete schedule, and write nothing.

    Raises Diverged, and Interrupted if the setup's `stop` asked for it.
    """
    model, *_ = build_model(setup, setup.inputs.tasks, setup.config)
    to_compute(model, setup.config, setup.device)
    trainer = Trainer(setup, model, None, Ranks(setup.device), Log(quiet=True))
    trainer.total = max(1, round(share * trainer.total))
    trainer.run()
    if trainer.stop.asked:  # during the last evaluation
        raise Interrupted
    return trainer
