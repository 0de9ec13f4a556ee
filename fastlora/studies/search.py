"""`fastlora search`: runs the searches of stages.py; writes search.json, best.toml and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import tomlkit
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from fastlora.console import Log
from fastlora.data.tasks import BUILTIN
from fastlora.errors import Interrupted, UserError
from fastlora.files import write_json
from fastlora.multitask.files import config_fingerprint
from fastlora.runs import folder as folders
from fastlora.runs import pages
from fastlora.runs.session import run_description
from fastlora.studies.grid import cell
from fastlora.studies.stages import Params, Search, value_of
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs
from fastlora.training.setup import Setup, prepare, read_encoder, training
from fastlora.training.stopping import Stop

FILE = "search.toml"  # the settings given, which trial 0 trains
SETTINGS = ("lr", "warmup", "r", "dropout", "targets", "seed")
COLUMNS = ("stage", "trial", *SETTINGS, "share", "score", "parameters", "seconds")
SCORES = """\
The stages rates, ranks and shapes are scored on one half of the dev examples (short runs on at most
400 of a task), the stages defaults and best on the other half, which no choice was based on."""
RANKED = """\
Ranks, by truncation of the adapters of one run. The error is the standard error of the difference
from the best rank's score."""


def run_search(
    config: TrainConfig,
    inputs: Inputs,
    how: SearchConfig,
    *,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Search in `config.out`, for all tasks jointly or for each task's adapter in turn.

    Raises UserError before training if the configuration or the data are wrong, and RunError and
    Interrupted as `Search.lead`.
    """
    if config.mode != "lora" or config.adapters == "shared+per-task" or config.add_to:
        raise UserError("search finds LoRA settings of shared or of per-task adapters of a new run")
    log, setup = Log(quiet), prepare(config, inputs)
    loaded = read_encoder(inputs.source)
    setup = replace(setup, loaded=loaded, stop=stop or Stop())
    folder = config.out or folders.default_folder(config)
    config_sha256 = config_fingerprint(loaded.encoder.config)
    hashes = folders.fingerprints(setup, loaded.sha256, config_sha256)
    if how.join:
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: holds no search to help with (--out names its folder)")
        folders.check_run(folder, hashes)
    # The process that leads locks the folder; those that help do not.
    with nullcontext() if how.join else folders.open_run(folder, setup.config, hashes, FILE):
        log.fields([*run_description(setup, Ranks(setup.device)), ("search", str(folder))])
        _search(setup, folder, how, log)


def _search(setup: Setup, folder: Path, how: SearchConfig, log: Log) -> None:
    """Lead the searches of a folder, and write what they found, or help with them."""
    best = setup.config
    shared = best.adapters == "shared"
    parts = {"jointly": best} if shared else {task: _alone(best, task) for task in setup.train}
    if how.budget:
        how = replace(how, budget=how.budget / len(parts))
    findings = {}
    for part, part_config in parts.items():
        part_folder = folder if shared else folder / part
        part_folder.mkdir(exist_ok=True)
        search = Search(setup.narrow(part_config), part_folder, how, log)
        try:
            with training(search.setup):
                if how.join:
                    search.help()
                    continue
                findings[part] = findings_of(search, search.lead())
        except Interrupted:
            log.line(f"stopped; the same command with --out {folder} continues")
            raise
        new = search.configure(findings[part]["best"])
        tuned = replace(TaskLoraConfig.of(new.lora), lr=new.lr, warmup=new.warmup)
        best = new if shared else best.with_task_settings(part, tuned)
    if not how.join:
        write_search(folder, best, findings, log)


def _alone(config: TrainConfig, task: str) -> TrainConfig:
    """The configuration that trains a task alone, with the settings of its adapter."""
    changes = config.task_settings(task).changes()
    for name in (*BUILTIN, *config.task):
        config = config.with_task_settings(name, TaskLoraConfig())
    return replace(config, adapters="shared", tasks=(task,), **changes)


def findings_of(search: Search, best: Params) -> dict[str, Any]:
    """The results of a search in JSON's types; "best" are the settings given unless others won."""
    scores = {}
    for stage in ("best", "defaults"):
        runs = search.trials(TrialState.COMPLETE, stage=stage)
        scores[stage] = [value_of(run) for run in sorted(runs, key=lambda run: run.params["seed"])]
    p_value = None
    if scores["best"]:
        # Imported here because it takes most of a second.
        from scipy.stats import ttest_rel

        same = scores["best"] == scores["defaults"]
        p_value = 1.0 if same else float(ttest_rel(*scores.values()).pvalue)
    better = p_value is not None and mean(scores["best"]) > mean(scores["defaults"])
    return {
        "best": best if better else search.defaults,
        "given": search.defaults,
        "scores": scores,
        "p_value": p_value,
        "ranks": search.stage("ranks", []).user_attrs["ranks"],
        "seconds": search.spent(),
        "trials": [
            {"trial": trial.number, **trial.params, "state": trial.state.name.lower()}
            | {"rungs": list(trial.intermediate_values.values()), **trial.user_attrs}
            for trial in search.trials()
        ],
    }


def write_search(
    folder: Path, config: TrainConfig, findings: Mapping[str, dict[str, Any]], log: Log
) -> None:
    """Write and print the findings for all tasks, or for each; `config` has the best settings."""
    folders.write_config(folder / "best.toml", config)
    write_json(folder / "search.json", findings)
    blocks: list[pages.Block | None] = [SCORES]
    for name, finding in findings.items():
        summary = _summary(finding)
        for line in summary:
            log.line(f"{name}: {line}")
        ranks = [[str(rank), *map(cell, score)] for rank, score in finding["ranks"]]
        trials = [{**trial, "score": trial["rungs"][-1]} for trial in _trained(finding)]
        cells = [[cell(trial[column]) for column in COLUMNS] for trial in trials]
        blocks += [
            pages.heading(name),
            summary,
            pages.plot(folder, name, 3, partial(_draw, finding)),
            RANKED,
            pages.table(["rank", "score", "error"], ranks),
            pages.table(COLUMNS, cells),
        ]
    settings = tomlkit.dumps(pages.without_folders(config.to_table()))
    blocks += [pages.heading("The best configuration"), pages.code(settings)]
    pages.write_pages(folder, "Search of LoRA settings", blocks)
    log.line(f"train with it: fastlora-train --config {folder / 'best.toml'}")
    log.line(f"report in {folder / 'report.html'}")


def _trained(finding: Mapping[str, Any], stage: str | None = None) -> list[dict[str, Any]]:
    """The trials of a stage, or of all, that were trained before the budget was spent."""
    trials = finding["trials"]
    return [trial for trial in trials if trial["rungs"] and stage in (None, trial["stage"])]


def _summary(finding: Mapping[str, Any]) -> list[str]:
    """The best settings, how they compare with those given, and the cost, in words."""
    seconds, full, p_value = finding["seconds"], finding["trials"][0]["seconds"], finding["p_value"]
    comparison = "No other settings were better than those given"
    if finding["scores"]["best"]:
        new, given = (f"{mean(s):.4f} ± {stdev(s):.4f}" for s in finding["scores"].values())
        kept = "; the settings given are kept" if finding["best"] == finding["given"] else ""
        comparison = (
            f"Mean score over {len(finding['scores']['best'])} seeds, on dev examples that no "
            f"choice was based on: {new} for the settings found, {given} for those given (paired t "
            f"test: p = {p_value:.2f}){kept}"
        )
    return [
        f"The best: {', '.join(f'{key} {cell(value)}' for key, value in finding['best'].items())}.",
        f"{comparison}.",
        f"The search took {seconds:.0f} s, the time of {seconds / full:.1f} full runs.",
    ]


def _draw(finding: Mapping[str, Any], _: pages.Figure, panels: list[pages.Axes]) -> None:
    for rank, (score, error) in reversed(finding["ranks"]):
        panels[0].errorbar(str(rank), score, error, marker="o", capsize=3, color="C0")
    panels[0].set(title="ranks: one run, truncated", xlabel="rank", ylabel="score")
    rates, shapes = _trained(finding, "rates"), _trained(finding, "shapes")
    shares = importance(rates, ("lr", "warmup")) | importance(shapes, ("dropout", "targets"))
    panels[1].barh(list(shares), list(shares.values()))
    panels[1].set(title="importance in its stage", xlabel="share", xlim=(0, 1))
    ordered = sorted((t["parameters"], -t["rungs"][0]) for t in shapes)
    parameters, scores = [x for x, _ in ordered], [-y for _, y in ordered]
    panels[2].scatter(parameters, scores)
    panels[2].step(parameters, list(accumulate(scores, max)), where="post")  # the Pareto front
    panels[2].set(title="shapes, first rung", xlabel="trained parameters", ylabel="score")


def importance(trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Optuna's importance of settings for the score on the first rung, which all trials reached."""
    study = optuna.create_study(direction="maximize")
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted({trial[name] for trial in trials})) for name in names
    }
    for trial in trials:
        params = {name: trial[name] for name in names}
        value = trial["rungs"][0]
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    # The importance for being in the better half: of so few trials, a smaller part says little.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
