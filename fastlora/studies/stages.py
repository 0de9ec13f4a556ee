"""Low-cost search of LoRA settings: short runs, and every smaller rank from one longer run.

Its trials are one Optuna study in a journal file, which several processes may work on. In turn:
    defaults   the settings as given, in full (trial 0)
    rates      learning rate and warmup, by successive halving on growing shares of the examples
    ranks      the largest rank at these rates and at those given; others are truncations of it
    shapes     dropout and targets, by successive halving
    best       the settings chosen, in full over three seeds, and so those given
Every other dev example scores the stages that choose; the rest scores the full runs alone.
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
from fastlora.studies.grid import run_once, trained_parameters
from fastlora.studies.journal import open_journal
from fastlora.studies.truncation import RANKS, smallest_within_error, sweep
from fastlora.training.checkpoint import trainable
from fastlora.training.config import SearchConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.loop import Trainer
from fastlora.training.setup import Setup, build_model, to_compute

SEEDS = 3
RATES, WARMUPS = (1.0, 2.0, 0.5, 4.0, 0.25), (0.06, 0.2)  # rates as factors of the one given
SHAPES = ("value", "query,value", "query,key,value,output", ",".join(TARGETS))
DROPOUTS = (0.0, 0.05, 0.1, 0.2)
# The share of the training examples that each rung of a stage trains on; the others run in full.
RUNGS = {"rates": (0.0625, 0.125), "ranks": (0.5,), "shapes": (0.0625, 0.125)}
REDUCTION = 3  # one trial in three of a stage goes on to the next rung
SHORT_DEV = 400  # dev examples of a task that score a short run, at most
# What --budget keeps for the stages `ranks` and `best`, in full runs' time: settings with more
# targets may take half as long again as those given.
RANKS_RUNS, BEST_RUNS = 1.0, SEEDS * 1.5 + SEEDS - 1
NO_SCORE = -1.0  # of a run that diverged, or whose score is not defined
Params = dict[str, Any]


class Search:
    """A search in a folder; it continues what the journal there holds.

    Raises UserError when the journal is damaged, or a task has fewer than two dev examples.
    """

    def __init__(self, setup: Setup, folder: Path, how: SearchConfig, log: Log) -> None:
        self.setup, self.folder, self.how, self.log = setup, folder, how, log
        if few := [name for name, data in setup.dev.items() if len(data) < 2]:
            raise UserError(f"{few[0]}: has one dev example (a search expects two or more)")
        config = setup.config
        # The values of each setting, led by the one given.
        values: dict[str, list[Any]] = {
            "lr": [config.peak_lr * rate for rate in RATES],
            "warmup": [config.warmup, *WARMUPS],
            "r": [config.r, *RANKS],
            "dropout": [config.dropout, *DROPOUTS],
            "targets": [",".join(name for name in TARGETS if name in config.targets), *SHAPES],
            "seed": [config.seed + i for i in range(SEEDS)],
        }
        self.values = {name: list(dict.fromkeys(own)) for name, own in values.items()}
        self.defaults: Params = {name: own[0] for name, own in values.items()}
        self.space: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(own) for name, own in self.values.items()
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
        """Run all stages; returns the best settings that they chose.

        Raises:
            RunError: when no run of a stage has a score, or the budget is too small.
            Interrupted: when the setup's `stop` asked for it; the next call continues.
        """
        for trial in self.trials(TrialState.RUNNING):  # of a process that is gone: queued again
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        defaults, values = self.defaults, self.values
        self.set_limits(self.stage("defaults", [defaults]).user_attrs["seconds"])
        grid = product(values["warmup"], values["lr"])
        planned = [{**defaults, "warmup": warmup, "lr": lr} for warmup, lr in grid]
        # Optuna draws the rate and the warmup of more trials than these.
        free = {name: defaults[name] for name in ("r", "dropout", "targets", "seed")}
        planned = (planned + [free] * self.how.trials)[: self.how.trials]
        rates = self.stage("rates", planned).params
        # Short runs favour high rates, so the rates as given get a longer run, too.
        pair = [{**params, "r": max(values["r"])} for params in (rates, defaults)]
        longest = self.stage("ranks", pair[: 1 + (pair[0] != pair[1])])
        best = {**longest.params, "r": smallest_within_error(dict(longest.user_attrs["ranks"]))}
        grid = product(values["dropout"], values["targets"])
        planned = [{**best, "dropout": dropout, "targets": targets} for dropout, targets in grid]
        best = self.stage("shapes", planned).params
        if best != defaults:
            for stage, params in (("defaults", defaults), ("best", best)):
                self.stage(stage, [{**params, "seed": seed} for seed in values["seed"]])
        self.study.set_user_attr("ended", True)
        return best

    def help(self) -> None:
        """Train queued trials until the process that leads has come to the end."""
        while "ended" not in self.study.user_attrs:
            if not self.work():
                time.sleep(1)

    def set_limits(self, full: float) -> None:
        """Set after how many seconds of all trials `rates` and `shapes` begin no other one.

        A full run takes `full` seconds. Raises RunError when the budget does not pay for these.
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
        """The seconds of all trials so far, by all processes."""
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials())

    def trials(self, *states: TrialState, stage: str | None = None) -> list[FrozenTrial]:
        """The trials in these states (by default all but failed ones), of a stage or of all."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if (trial.state in states if states else trial.state != TrialState.FAIL)
            and (stage is None or trial.user_attrs["stage"] == stage)
        ]

    def stage(self, stage: str, planned: Sequence[Params]) -> FrozenTrial:
        """Have all planned trials trained; returns the best that was trained to the end.

        Raises RunError when none has a score.
        """
        told = False
        while True:
            running = self.trials(TrialState.RUNNING, stage=stage)
            if self.queue(stage, planned) + self.work():
                continue
            if not running:
                break
            if not told:
                self.log.line(
                    f"waiting for trials of other processes ({len(running)}); if those are gone, "
                    "start this search again without --join"
                )
            told = True
            time.sleep(1)
        best = max(self.trials(TrialState.COMPLETE, stage=stage), key=value_of)
        if value_of(best) == NO_SCORE:
            raise RunError(
                f"no run of the stage {stage!r} has a score: they diverged (lower --lr), or the "
                "dev labels are all alike"
            )
        return best

    def queue(self, stage: str, planned: Sequence[Params]) -> int:
        """Queue the planned trials that the study lacks; returns how many these are."""
        # A failed trial may lack some of its `params`; those that it was queued with are whole.
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
        """Train a queued trial and tell how it ended; returns whether there was one."""
        if not (waiting := self.trials(TrialState.WAITING)):
            return False
        # No two trials get the same draws, whichever process asks for them.
        begun = len(self.study.trials) - len(waiting)
        self.study.sampler = optuna.samplers.RandomSampler(seed=begun)
        trial, tell = self.study.ask(self.space), partial(self.study.tell, skip_if_finished=True)
        if "stage" not in trial.user_attrs:  # another process took the last one in the queue
            tell(trial, state=TrialState.FAIL)
            return False
        try:
            tell(trial, self.train(trial))
        except optuna.TrialPruned:
            tell(trial, state=TrialState.PRUNED)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # the leader was started again, and queued this trial again
        except BaseException:
            tell(trial, state=TrialState.FAIL)
            raise
        return True

    def train(self, trial: optuna.Trial) -> float:
        """A trial's mean score of the tasks, trained rung by rung until it falls behind."""
        stage, start = trial.user_attrs["stage"], time.perf_counter()
        # The first trial of a stage is always trained: without one there is nothing to choose.
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
            for key, fact in {"share": share, "seconds": seconds, **outcome}.items():
                trial.set_user_attr(key, fact)
            name = f"{stage:<10} trial {trial.number}"
            self.log.line(f"{name}: {value:.4f} on {share:.0%} of the examples, {seconds:.0f} s")
            # Asynchronous successive halving (Li et al. 2020), as Optuna's pruner has it; but that
            # compares the trials of all stages.
            trials = [t.intermediate_values for t in self.trials(stage=stage)]
            reached = sorted(values[rung] for values in trials if rung in values)
            if rung + 1 < len(rungs) and value < reached[-max(1, len(reached) // REDUCTION)]:
                raise optuna.TrialPruned
        return value

    def outcome(self, stage: str, params: Params, share: float) -> dict[str, Any]:
        """Train settings once: their "scores", their "parameters", and in stage `ranks` "ranks"."""
        setup = self.setup.narrow(self.configure(params))
        if stage not in RUNGS:
            place = self.folder / "runs" / stage / f"seed{params['seed']}"
            setup = replace(setup, dev=self.dev(1), config=replace(setup.config, out=place))
            result = run_once(setup, f"{stage} seed {params['seed']}", self.log)
            return {"scores": result["scores"], "parameters": trained_parameters(result)}
        setup = replace(setup, dev=self.dev(0, None if stage == "ranks" else SHORT_DEV))
        trainer = train_share(setup, share)
        parameters = sum(p.numel() for p in trainable(trainer.model).values())
        outcome = {"scores": trainer.progress.scores[-1]["scores"], "parameters": parameters}
        if stage == "ranks":
            outcome["ranks"] = list(sweep(trainer.model, setup.dev, self.values["r"]).items())
        return outcome

    def dev(self, first: int, most: int | None = None) -> dict[str, TaskData]:
        """Half of each task's dev examples, from `first` (0 or 1) on; at most so many, spread."""
        halves = {name: np.arange(first, len(data), 2) for name, data in self.setup.dev.items()}
        return {
            name: subset(self.setup.dev[name], half[:: -(-len(half) // (most or len(half)))])
            for name, half in halves.items()
        }

    def configure(self, params: Params) -> TrainConfig:
        """The configuration of a trial; alpha stays, so that a learning rate suits any rank."""
        targets = tuple(params["targets"].split(","))
        return replace(self.setup.config, **{**params, "targets": targets})


def value_of(trial: FrozenTrial) -> float:
    """The value of a trial that was trained to the end."""
    return NO_SCORE if trial.value is None else trial.value


def train_share(setup: Setup, share: float) -> Trainer:
    """Train on a share of the examples, with a whole schedule, and write nothing.

    Raises Diverged, and Interrupted when the setup's `stop` asked for it.
    """
    model, *_ = build_model(setup, setup.inputs.tasks, setup.config)
    to_compute(model, setup.config, setup.device)
    trainer = Trainer(setup, model, None, Ranks(setup.device), Log(quiet=True))
    trainer.total = max(1, round(share * trainer.total))
    trainer.run()
    if trainer.stop.asked:  # while it scored
        raise Interrupted
    return trainer
