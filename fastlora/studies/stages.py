"""Low-cost search of LoRA settings: short runs side by side, and every smaller rank from one run.

Stages, each an Optuna study in one journal file, which several processes may work on:
    defaults   the settings as given: what the search must beat
    rates      learning rate and warmup, by successive halving on growing numbers of examples
    ranks      the largest rank at these rates and those given; smaller ones are truncations of it
    shapes     dropout and targets, by successive halving
    final-N    the best and the defaults, in full, one study a seed
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from fastlora.console import Log
from fastlora.data.batches import subset
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.lora.config import TARGETS
from fastlora.studies.truncation import RANKS, smallest_within_error, sweep
from fastlora.training.config import SearchConfig, TrainConfig
from fastlora.training.setup import Setup
from fastlora.training.side_by_side import side_by_side, variant_name, variant_parameters

SEEDS = 3
DROPOUTS = (0.0, 0.05, 0.1, 0.2)
SHAPES = ("value", "query,value", "query,key,value,output", ",".join(TARGETS))
RATES, WARMUPS = (1.0, 2.0, 0.5, 4.0, 0.25), (0.06, 0.2)  # rates as factors of the one given
# The examples of a short run, rung by rung, as shares of the search's own; and the least and the
# most of all examples that the search takes as its own.
RUNGS, LEAST, MOST = (0.125, 0.25), 0.25, 0.5
RANK_STAGE = "ranks"
SCORING, WIDER = 0.4, 1.5  # of an example, against training on it; of runs with more targets
REDUCTION = 3  # one in three goes on to the next rung
OVER = 1.5  # how far a search may go over its budget, when it says so at its start
LONG = 0.5  # the share of all examples of the run whose ranks are cut
SHORT_DEV = 400  # dev examples a task that score a short run
IF_GONE = "if those are gone, start this search again without --join"
Params = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a search ends with: the best settings, and whether they beat the defaults."""

    params: Params
    config: TrainConfig
    defaults: list[float]  # scores by seed
    searched: list[float]
    p_value: float | None  # of a paired t test; None where the best are the defaults


class Search:
    """A search in a folder, going on where the journal there ends.

    Raises UserError when it began with another number of trials.
    """

    def __init__(self, setup: Setup, folder: Path, how: SearchConfig, log: Log) -> None:
        self.setup, self.how, self.log = setup, how, log
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
        self.short_dev = {name: subset(data, SHORT_DEV) for name, data in setup.dev.items()}
        begun = self.study("defaults")
        if not how.join:
            given = begun.user_attrs.get("trials", how.trials)
            if given != how.trials:
                raise UserError(f"{folder}: holds a search of --trials {given}; use a new --out")
            begun.set_user_attr("trials", given)
            for study in self.studies():
                _again(study, _in_state(study, TrialState.RUNNING))
        while "trials" not in begun.user_attrs:
            time.sleep(1)  # the leader has just begun
        self.trials: int = begun.user_attrs["trials"]

    def run(self) -> Found:
        """All stages.

        Raises:
            RunError: when no run of a stage has a score, or the budget is too small.
            Interrupted: when the setup's `stop` asked for it; the next call goes on.
        """
        config = self.setup.config
        defaults: Params = {
            "lr": config.peak_lr,
            "warmup": config.warmup,
            "r": config.r,
            "dropout": config.dropout,
            "targets": ",".join(target for target in TARGETS if target in config.targets),
            "seed": config.seed,
        }
        full = best_of(self.stage("defaults", [defaults])).user_attrs["seconds"]
        rates = [
            {**defaults, "lr": defaults["lr"] * rate, "warmup": warmup}
            for warmup, rate in product(_with(defaults["warmup"], WARMUPS), RATES)
        ]
        shapes = [
            {"targets": targets, "dropout": dropout}
            for targets in _with(defaults["targets"], SHAPES)
            for dropout in _with(defaults["dropout"], DROPOUTS)
        ]
        last_runs = SEEDS * WIDER + SEEDS - 1
        rungs = self.rungs(full, self.trials + len(shapes), 2 * LONG + last_runs)
        rates_study = self.stage("rates", rates[: self.trials], rungs, self.trials)
        # Short runs like high rates: in a longer one, the rates as given get another chance.
        r = max(*RANKS, defaults["r"])
        largest = [{**best_of(rates_study).params, "r": r}, {**defaults, "r": r}]
        pair = largest[: 1 + (largest[0] != largest[1])]
        longest = best_of(self.stage(RANK_STAGE, pair, [LONG]))
        best = {**longest.params, "r": smallest_within_error(dict(longest.user_attrs["sweep"]))}
        rungs = self.rungs(full, len(shapes), last_runs)
        shaped = self.stage("shapes", [{**best, **shape} for shape in shapes], rungs)
        best = dict(best_of(shaped).params)
        return self.compare(defaults, best)

    def compare(self, defaults: Params, best: Params) -> Found:
        """Best and defaults in full over the seeds; the defaults stay where they are not beaten."""
        theirs = [value_of(self.study("defaults"), defaults)]
        if best == defaults:
            return Found(best, self.configure(best), theirs, theirs, None)
        ours = []
        for seed in range(defaults["seed"], defaults["seed"] + SEEDS):
            pair = {**best, "seed": seed}, {**defaults, "seed": seed}
            new = seed > defaults["seed"]  # the first stage ran the defaults with the first seed
            study = self.stage(f"final-{seed}", pair if new else pair[:1])
            ours.append(value_of(study, pair[0]))
            theirs += [value_of(study, pair[1])] if new else []
        # Imported here: it takes most of a second.
        from scipy.stats import ttest_rel

        p_value = float(ttest_rel(ours, theirs).pvalue) if ours != theirs else 1.0
        chosen = best if np.mean(ours) > np.mean(theirs) else defaults
        return Found(chosen, self.configure(chosen), theirs, ours, p_value)

    def rungs(self, full: float, short: int, later: float) -> list[float]:
        """The share of all examples that each rung of a short run gets.

        A run on all takes `full` seconds; the budget must pay for `later` ones of them, and what
        is left of it is for `short` short runs. Raises RunError where that is far too little.
        """
        if self.how.budget is None:
            return [MOST * rung for rung in RUNGS]
        budget = self.how.budget.total_seconds()
        train, dev, short_dev = (
            sum(map(len, data.values()))
            for data in (self.setup.train, self.setup.dev, self.short_dev)
        )
        train *= self.setup.config.epochs
        runs = [short / REDUCTION**i for i in range(len(RUNGS))]
        second = full / (train + SCORING * dev)  # of an example
        scoring = second * SCORING * short_dev * sum(runs)
        training = second * train * WIDER * float(np.dot(runs, RUNGS))
        left = budget - self.spent() - full * later - scoring
        if left < LEAST * training and "rates" not in optuna.get_all_study_names(self.storage):
            needed = budget - left + LEAST * training
            text = (
                f"--budget is {budget:.0f} s, but a full run takes {full:.0f} s, so "
                f"that {needed:.0f} s are needed"
            )
            if needed > OVER * budget:
                raise RunError(f"{text}; raise --budget, or lower --limit or --epochs")
            self.log.line(f"note       {text}")
        return [min(MOST, max(LEAST, left / training)) * rung for rung in RUNGS]

    def spent(self) -> float:
        """Seconds of all trials so far, by all processes."""
        trials = [trial for study in self.studies() for trial in study.get_trials(deepcopy=False)]
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in trials)

    def configure(self, params: Params) -> TrainConfig:
        """The configuration of a trial; alpha stays, so that a learning rate suits any rank."""
        targets = tuple(params["targets"].split(","))
        return replace(self.setup.config, **{**params, "targets": targets})

    def study(self, name: str) -> optuna.Study:
        """A stage's study."""
        return optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, REDUCTION),
            load_if_exists=True,
        )

    def studies(self) -> list[optuna.Study]:
        """The stages begun so far, in their order."""
        return [self.study(name) for name in optuna.get_all_study_names(self.storage)]

    def stage(
        self,
        name: str,
        candidates: Sequence[Params],
        rungs: Sequence[float] = (1.0,),
        trials: int = 0,
    ) -> optuna.Study:
        """Train the candidates, and more that Optuna draws up to `trials`, as far as they get."""
        study, wanted = self.study(name), max(trials, len(candidates))
        # Other draws than those of the process that was here before, or is here as well.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
        while self.how.join and len(study.get_trials(deepcopy=False)) < len(candidates):
            time.sleep(1)  # the leader has not written them yet
        if "rungs" not in study.user_attrs:
            study.set_user_attr("rungs", list(rungs))
        for params in candidates[len(study.get_trials(deepcopy=False)) :]:
            study.enqueue_trial(params)
        space, waiting = _space(candidates), 0
        while True:
            group: list[Trial] = []
            while len(group) < self.how.together and _left(study, wanted):
                group.append(study.ask(space))
            if group:
                try:
                    self.train(study, group)
                except BaseException:
                    _again(study, group)  # for whoever goes on
                    raise
            elif others := len(_in_state(study, TrialState.RUNNING)):
                if others != waiting:
                    self.log.line(f"waiting for {others} trials of other processes; {IF_GONE}")
                waiting = others
                time.sleep(1)
            else:
                return study

    def train(self, study: optuna.Study, group: list[Trial]) -> None:
        """Train a group of trials rung by rung, dropping those that fall behind."""
        last = len(study.user_attrs["rungs"]) - 1
        for rung in range(last + 1):
            values = self.rung(study, group, rung)
            group = [trial for trial in group if trial.number in values]
            # Best first: the pruner compares with those that it was asked about before.
            group.sort(key=lambda trial: -values[trial.number])
            behind = [trial for trial in group if rung < last and trial.should_prune()]
            for trial in behind:
                study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            group = [trial for trial in group if trial not in behind]
            if not group:
                return
        for trial in group:
            study.tell(trial, values[trial.number], skip_if_finished=True)

    def rung(self, study: optuna.Study, group: Sequence[Trial], rung: int) -> dict[int, float]:
        """Train on a rung's examples, and note in the trials what came of it; values by number.

        A value is the mean score of the tasks, or -1 where one has none, as in a run that diverged.
        A trial that another process has meanwhile given up has no value.
        """
        start, rungs = time.perf_counter(), study.user_attrs["rungs"]
        setup = replace(self.setup, dev=self.short_dev) if len(rungs) > 1 else self.setup
        configs = [self.configure(trial.params) for trial in group]
        trainer = side_by_side(setup, configs, Log(quiet=True))
        trainer.total = max(1, round(rungs[rung] * trainer.total))
        scores = trainer.run().scores
        if trainer.stop.asked:  # while it scored
            raise Interrupted
        values = {}
        ours = {trial.number for trial in _in_state(study, TrialState.RUNNING)}
        for i, trial in enumerate(group):
            if trial.number not in ours:
                continue
            own = {task: scores[variant_name(task, i)] for task in self.setup.train}
            found = [score for score in own.values() if score is not None]
            values[trial.number] = float(np.mean(found)) if len(found) == len(own) else -1.0
            trial.report(values[trial.number], REDUCTION**rung)
            trial.set_user_attr("scores", own)
            trial.set_user_attr("parameters", variant_parameters(trainer, i))
        if study.study_name == RANK_STAGE and values and (most := max(values.values())) >= 0:
            first = next(i for i, trial in enumerate(group) if values.get(trial.number) == most)
            cut = sweep(trainer, first, {*RANKS, self.setup.config.r})
            group[first].set_user_attr("sweep", list(cut.items()))
        seconds = time.perf_counter() - start
        for trial in group:
            if trial.number in values:
                before = trial.user_attrs.get("seconds", 0.0)
                trial.set_user_attr("seconds", before + seconds / len(group))
        self.log.line(
            f"{study.study_name:<10} side by side on {rungs[rung]:.0%} of the examples: "
            f"{len(group)}; best {max(values.values(), default=-1.0):.4f}, {seconds:.0f} s"
        )
        return values


def value_of(study: optuna.Study, params: Params) -> float:
    """The value of the finished trial with these settings."""
    return next(t.value or 0.0 for t in _in_state(study, TrialState.COMPLETE) if t.params == params)


def best_of(study: optuna.Study) -> FrozenTrial:
    """The best trial that went all the way; RunError when none has a score."""
    best = study.best_trial
    if best.value is None or best.value < 0:
        raise RunError(
            f"no run of the stage {study.study_name!r} has a score: they diverged (lower --lr), or "
            "the dev labels are all alike"
        )
    return best


def _with(own: Any, values: Sequence[Any]) -> list[Any]:
    """The values, led by the one given."""
    return list(dict.fromkeys((own, *values)))


def _space(candidates: Sequence[Params]) -> dict[str, Any]:
    """What Optuna may draw from: learning rates between the candidates', and their other values."""
    space: dict[str, Any] = {}
    for key in candidates[0]:
        values = sorted({params[key] for params in candidates})
        space[key] = CategoricalDistribution(values)
        if key == "lr":
            space[key] = FloatDistribution(values[0], values[-1], log=True)
    return space


def _in_state(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(state,))


def _left(study: optuna.Study, wanted: int) -> bool:
    waiting = _in_state(study, TrialState.WAITING)
    failed = _in_state(study, TrialState.FAIL)
    return bool(waiting) or len(study.get_trials(deepcopy=False)) - len(failed) < wanted


def _again(study: optuna.Study, trials: Sequence[Trial | FrozenTrial]) -> None:
    """Queue those of the trials that are still running anew: their process is gone."""
    running = {trial.number for trial in _in_state(study, TrialState.RUNNING)}
    for trial in trials:
        if trial.number in running:
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
