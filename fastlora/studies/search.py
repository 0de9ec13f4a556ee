"""`fastlora search`: LoRA settings by short runs and by truncation of trained adapters.

After a full run with the settings given come three stages, each an Optuna study:
    rates    learning rate and warmup, by short runs; trial 0 has the settings given
    ranks    half a run at the largest rank, with the rate found and with that given; its adapters
             are truncated to every smaller rank; the smallest within the best one's error is kept
    shapes   dropout and targets, by short runs
In the end, full runs over three seeds compare the settings found with those given. A short run
trains on a sixteenth of the examples, and if its score is in the best third of its stage, on an
eighth (successive halving, Li et al. 2020). Trials are scored on one half of the dev examples, full
runs on the other.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from fastlora.console import Log
from fastlora.data.batches import subset
from fastlora.data.reading import TaskData
from fastlora.devices import synchronized_time
from fastlora.errors import Diverged, Interrupted, RunError, UserError, in_place_of
from fastlora.files import write_json
from fastlora.lora.config import TARGETS
from fastlora.multitask.files import config_fingerprint
from fastlora.runs import folder as folders
from fastlora.studies.grid import Record, begin, report_search, run_row
from fastlora.studies.paper_tables import Row
from fastlora.studies.truncation import RANKS, scores_by_rank, smallest_within_error
from fastlora.training.config import SearchConfig, TrainConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import Inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import Setup, build_model, to_compute, training
from fastlora.training.stopping import Stop

RATES = (1.0, 2.0, 0.5, 4.0, 0.25, 1.4, 0.7, 2.8, 0.35)  # factors of the rate, the likelier first
WARMUPS = (0.06, 0.2)
SHAPES = ("value", "query,value", "query,key,value,output", ",".join(TARGETS))
DROPOUTS, SEEDS = (0.0, 0.05, 0.1, 0.2), 3
# The shares of the training examples that a trial of a stage trains on, one after the other.
SHARES = {"rates": (1 / 16, 1 / 8), "ranks": (1 / 2,), "shapes": (1 / 16, 1 / 8)}
SHORT_DEV = 400  # the most dev examples of a task that score a short run
# The time of the last full runs in units of the first one's; more targets may take 1.5 of these.
LAST_RUNS = SEEDS * 1.5 + SEEDS - 1
DIVERGED = -1.0  # a score below all others


def run_search(
    config: TrainConfig, inputs: Inputs, how: SearchConfig, quiet: bool, stop: Stop
) -> None:
    """Search in `config.out`, for all tasks jointly or for each task's adapter in turn.

    Raises UserError before training if the configuration or the data are wrong, and as `run`.
    """
    if config.mode != "lora" or config.adapters == "shared+per-task" or config.add_to:
        raise UserError("search needs --mode lora, --adapters shared or per-task, and no --add-to")
    setup, log = begin(config, inputs, quiet, stop)
    if few := [name for name, data in setup.dev.items() if len(data) < 2]:
        raise UserError(f"{few[0]}: has one dev example (a search expects two or more)")
    loaded = setup.loaded
    assert loaded is not None
    hashes = folders.fingerprints(setup, loaded.sha256, config_fingerprint(loaded.encoder.config))
    folder, best, findings = config.out or folders.default_folder(config), setup.config, {}
    tasks = [None] if best.adapters == "shared" else list(setup.train)
    how = replace(how, budget=how.budget and how.budget / len(tasks))
    with folders.open_run(folder, best, hashes, "search.toml"), training(setup):
        log.line(f"search     {folder}")
        for task in tasks:
            search = Search(setup, task, folder / (task or ""), how, log)
            try:
                findings[task or "jointly"] = finding = search.run()
            except Interrupted:
                log.line(f"stopped; the same command with --out {folder} continues")
                raise
            best = search.configure(best, finding["best"])
        folders.write_config(folder / "best.toml", best)
        write_json(folder / "search.json", findings)
        report_search(folder, findings, log)


class Search:
    """A search for the adapter of a task, or of all tasks (None); it continues that in `folder`."""

    def __init__(
        self, setup: Setup, task: str | None, folder: Path, how: SearchConfig, log: Log
    ) -> None:
        config, own = setup.config, setup.config.task_settings(task or "").changes()
        self.setup = setup.narrow(replace(config, tasks=(task,))) if task else setup
        self.task, self.folder, self.how, self.log = task, folder, how, log
        given = {**vars(config), "lr": config.peak_rates[0], **own}
        given["targets"] = ",".join(name for name in TARGETS if name in given["targets"])
        rates = [given["lr"] * rate for rate in RATES]
        tried = {"lr": rates, "warmup": WARMUPS, "r": RANKS, "dropout": DROPOUTS, "targets": SHAPES}
        self.given: Record = {name: given[name] for name in tried}
        self.tried = {name: list(dict.fromkeys((given[name], *tried[name]))) for name in tried}
        folder.mkdir(exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = open_journal(folder / "journal.log")
        self.rows: list[Record] = []  # what the report says of each trial, by stage and number

    def run(self) -> dict[str, Any]:
        """Run or continue the search; returns what it found, in JSON's types.

        Raises RunError if the first run fails, all trials of a stage diverge, or the budget is too
        small, and Interrupted if the setup's `stop` asked for it.
        """
        given = self.given
        if error := (first := self.full_runs("given", given, 1))["failed"]:
            raise RunError(f"with the settings given, {error}")
        budget = self.how.budget.total_seconds() if self.how.budget else inf
        if (spare := budget - first["seconds"] * (2 + LAST_RUNS)) < 0:
            needs = f"{budget - spare:.0f} s are needed, as a full run takes {first['seconds']:.0f}"
            raise RunError(f"--budget is {budget:.0f} s, but {needs}; lower --limit or --epochs")
        rates = {name: self.tried[name] for name in ("lr", "warmup")}
        best = self.stage("rates", given, rates, spare / 2, self.how.trials)
        found = {**given, **best.params, "r": max(self.tried["r"])}
        # Short runs favour high rates, so the rate given gets a longer run, too.
        best = self.stage("ranks", found, {"lr": [found["lr"], given["lr"]]})
        ranks = best.user_attrs["ranks"]
        found |= {**best.params, "r": smallest_within_error(dict(ranks))}
        shapes = {name: self.tried[name] for name in ("dropout", "targets")}
        found |= self.stage("shapes", found, shapes, first["seconds"] + spare).params
        runs = [first]
        if found != given:
            runs = [self.full_runs("given", given, SEEDS), self.full_runs("found", found, SEEDS)]
            old, new = (mean(run[task] or 0.0 for task in self.setup.train) for run in runs)
            if new <= old or runs[1]["failed"]:
                found = given
        return {"best": found, "full_runs": runs, "ranks": ranks, "trials": self.rows}

    def stage(
        self, name: str, base: Record, changes: Record, until: float = inf, most: int | None = None
    ) -> FrozenTrial:
        """Train a stage, up to `most` combinations of `changes`; returns the best trial.

        Other settings are those of `base`. After `until` seconds, only its first trial begins.
        """
        how: dict[str, Any] = {"direction": "maximize", "load_if_exists": True}
        study = optuna.create_study(storage=self.storage, study_name=name, **how)
        for left in study.get_trials(states=(TrialState.RUNNING,)):  # by a process that has ended
            self.storage.set_trial_state_values(left._trial_id, TrialState.WAITING)
        for values in list(product(*changes.values()))[:most]:
            study.enqueue_trial(dict(zip(changes, values, strict=True)), skip_if_exists=True)
        done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        self.rows += [trial.user_attrs["row"] for trial in done]
        for i in range(len(study.get_trials(states=(TrialState.WAITING,)))):
            if (done or i) and sum(row["seconds"] for row in self.rows) > until:
                break
            trial = study.ask({key: CategoricalDistribution(self.tried[key]) for key in changes})
            try:
                study.tell(trial, self.train(trial, name, {**base, **trial.params}))
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
            self.rows.append(trial.user_attrs["row"])
        if study.best_value == DIVERGED:
            raise RunError(f"all runs of the stage {name!r} diverged; lower --lr")
        return study.best_trial

    def train(self, trial: optuna.Trial, stage: str, settings: Record) -> float:
        """Train a trial on growing shares of the examples; returns its score on the last.

        Raises TrialPruned if its score on an earlier share is not in the best third.
        """
        start, scores = synchronized_time(self.setup.device), []
        setup = self.setup.narrow(self.configure(self.setup.config, settings))
        setup = replace(setup, dev=self.dev(0, inf if stage == "ranks" else SHORT_DEV))
        for share in SHARES[stage]:
            try:
                trainer = train_share(setup, share)
                of_tasks = trainer.progress.scores[-1]["scores"].values()
                scores.append(mean(score or 0.0 for score in of_tasks))
                if stage == "ranks":
                    ranks = scores_by_rank(trainer.model, setup.dev, self.tried["r"])
                    trial.set_user_attr("ranks", list(ranks.items()))
            except Diverged:
                scores.append(DIVERGED)
            seconds = synchronized_time(self.setup.device) - start
            row = {"stage": stage, "trial": trial.number, **settings, "first score": scores[0]}
            results = {"share": share, "score": scores[-1], "seconds": seconds}
            trial.set_user_attr("row", row | results)
            text = f"{scores[-1]:.4f} on {share:.0%} of the examples, {seconds:.0f} s"
            self.log.line(f"{stage:<6} trial {trial.number}: {text}")
            # A process that was killed later in this trial has reported the same.
            if len(scores) not in self.storage.get_trial(trial._trial_id).intermediate_values:
                trial.report(scores[-1], len(scores))
            # Optuna's pruner would record that it was asked, and decide otherwise after a kill.
            reported = [t.intermediate_values for t in trial.study.get_trials(deepcopy=False)]
            ranked = sorted((v[len(scores)] for v in reported if len(scores) in v), reverse=True)
            if share < SHARES[stage][-1] and scores[-1] < ranked[max(0, len(ranked) // 3 - 1)]:
                raise optuna.TrialPruned
        return scores[-1]

    def full_runs(self, name: str, settings: Record, seeds: int) -> Record:
        """Train in full with some seeds, in run folders; finished ones are read."""
        # --keep best would choose weights by the examples that score them.
        config = replace(self.configure(self.setup.config, settings), keep="last")
        setup = replace(self.setup.narrow(config), dev=self.dev(1))
        return run_row(Row(name, name, ""), setup, seeds, self.folder / "runs" / name, self.log)

    def dev(self, first: int, most: float = inf) -> dict[str, TaskData]:
        """Each task's dev examples `first` (0 or 1), `first` + 2, ..., at most `most` of them."""
        return {
            name: subset(data, np.arange(first, len(data), 2 + 2 * int(len(data) / (2 * most))))
            for name, data in self.setup.dev.items()
        }

    def configure(self, config: TrainConfig, settings: Record) -> TrainConfig:
        """`config` with some settings; alpha stays, so that one learning rate suits all ranks."""
        settings = {**settings, "targets": tuple(settings["targets"].split(","))}
        if self.task is None:
            return replace(config, **settings)
        own = replace(config.task_settings(self.task), **settings)
        return config.with_task_settings(self.task, own)


def open_journal(file: Path) -> JournalStorage:
    """Open or create the journal in a file of a folder that this process has locked.

    An incomplete last line, such as a full disk leaves, is removed. Raises UserError with the
    number of the line if another line is damaged.
    """
    Path(f"{file}.lock").unlink(missing_ok=True)  # Optuna's own, of a process that was killed
    backend = JournalFileBackend(str(file))
    *lines, rest = file.read_bytes().split(b"\n")
    os.truncate(file, file.stat().st_size - len(rest))
    for number, line in enumerate(lines, 1):
        with suppress(ValueError, TypeError):
            if "op_code" in json.loads(line):
                continue
        raise UserError(f"{file}:{number}: not an entry of an Optuna journal; use a new --out")
    with in_place_of(Exception, UserError, f"{file}: is damaged; use a new --out: "):
        return JournalStorage(backend)


def train_share(setup: Setup, share: float) -> Trainer:
    """Train on a share of the examples, with a complete schedule, and write nothing."""
    model, *_ = build_model(setup, setup.inputs.tasks, setup.config)
    to_compute(model, setup.config, setup.device)
    trainer = Trainer(setup, model, None, World(setup.device), Log(quiet=True))
    trainer.total = max(1, round(share * trainer.total))
    trainer.run()
    if trainer.stop.asked:  # during the last evaluation
        raise Interrupted
    return trainer
