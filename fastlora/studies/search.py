"""`fastlora search`: its command, and what it leaves: search.json, best.toml, a report with plots.

How it searches is in stages.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import optuna
import tomlkit
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from fastlora.console import Log
from fastlora.data.tasks import BUILTIN
from fastlora.errors import Interrupted, UserError
from fastlora.files import atomic_open
from fastlora.runs.folder import default_folder, fingerprints, open_run, write_config
from fastlora.runs.pages import Block, code, heading, plot, table, without_folders, write_pages
from fastlora.runs.session import facts_of
from fastlora.studies.grid import cell
from fastlora.studies.stages import Params, Search, value_of
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs
from fastlora.training.setup import prepare, read_encoder, training
from fastlora.training.stopping import Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "search.toml"  # the settings of trial 0
COLUMNS = ("stage", "trial", "lr", "warmup", "r", "dropout", "targets", "seed")
SCORES = """\
The stages rates, ranks and shapes are scored on one half of the dev examples (short runs on at most
400 of a task), the stages defaults and best on the other half, on which nothing was chosen."""
RANKED = """\
Ranks, from one run that is truncated. The error is that of the distance to the best rank."""


def run_search(
    config: TrainConfig,
    inputs: Inputs,
    how: SearchConfig,
    *,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Search in `config.out`, for all tasks jointly or for each task's adapter in turn.

    Raises as `Search` and `Search.lead` do, and UserError before it begins.
    """
    if config.mode != "lora" or config.adapters == "shared+per-task" or config.add_to:
        raise UserError("search finds LoRA settings of shared or of per-task adapters of a new run")
    log, setup = Log(quiet), prepare(config, inputs)
    loaded = read_encoder(inputs.source)
    setup = replace(setup, loaded=loaded, stop=stop or Stop())
    folder = config.out or default_folder(config)
    if how.join and not (folder / FILE).is_file():
        raise UserError(f"{folder}: holds no search to help with (--out names its folder)")
    best = setup.config
    open_run(folder, best, fingerprints(setup, loaded.sha256, loaded.encoder.config), FILE)
    log.facts([*facts_of(setup, Ranks(setup.device)), ("search", str(folder))])
    if how.together is not None:
        log.line("note       --together has no effect: trials train one at a time")
    shared = best.adapters == "shared"
    parts = {"jointly": best} if shared else {task: _alone(best, task) for task in setup.train}
    if how.budget:
        how = replace(how, budget=how.budget / len(parts))
    findings = {}
    for part, own in parts.items():
        place = folder if shared else folder / part
        place.mkdir(exist_ok=True)
        search = Search(setup.narrow(own), place, how, log)
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
    """The configuration of a run with a task's adapter as its only one."""
    own = config.task_settings(task)
    for name in (*BUILTIN, *config.task):
        config = config.with_task_settings(name, TaskLoraConfig())
    return replace(config, adapters="shared", tasks=(task,), **own.changes())


def findings_of(search: Search, best: Params) -> dict[str, Any]:
    """What a search ended with, in JSON's types; the settings given stay if they are not beaten."""
    scores = {}
    for stage in ("best", "defaults"):
        runs = search.trials(TrialState.COMPLETE, stage=stage)
        scores[stage] = [value_of(run) for run in sorted(runs, key=lambda run: run.params["seed"])]
    p_value = None
    if scores["best"]:
        # Imported here: it takes most of a second.
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
    """Write and print findings, one of all tasks or one of each; `config` is the best of all."""
    write_config(folder / "best.toml", config)
    with atomic_open(folder / "search.json") as file:
        json.dump(findings, file, indent=1)
    blocks: list[Block | None] = [SCORES]
    for name, facts in findings.items():
        lines = _verdict(facts)
        for line in lines:
            log.line(f"{name}: {line}")
        ranks = [[str(rank), *map(cell, found)] for rank, found in facts["ranks"]]
        columns = [*COLUMNS, "share", "score", "parameters", "seconds"]
        trained = [{**trial, "score": trial["rungs"][-1]} for trial in _trained(facts)]
        cells = [[cell(trial[column]) for column in columns] for trial in trained]
        blocks += [heading(name), lines, plot(folder, name, 3, partial(_draw, facts))]
        blocks += [RANKED, table(["rank", "score", "error"], ranks), table(columns, cells)]
    blocks += [
        heading("The best configuration"),
        code(tomlkit.dumps(without_folders(config.to_table()))),
    ]
    write_pages(folder, "Search of LoRA settings", blocks)
    log.line(f"train with it: fastlora-train --config {folder / 'best.toml'}")
    log.line(f"report in {folder / 'report.html'}")


def _trained(facts: Mapping[str, Any], *stages: str) -> list[dict[str, Any]]:
    """The trials of these stages, by default of all, that a budget's end did not leave out."""
    trials = facts["trials"]
    return [t for t in trials if t["rungs"] and (not stages or t["stage"] in stages)]


def _verdict(facts: Mapping[str, Any]) -> list[str]:
    """The best settings, how they compare with those given, and the cost, in words."""
    seconds, full, p_value = facts["seconds"], facts["trials"][0]["seconds"], facts["p_value"]
    compared = "The settings given are the best that was found"
    if facts["scores"]["best"]:
        ours, theirs = (f"{mean(s):.4f} ± {stdev(s):.4f}" for s in facts["scores"].values())
        kept = "; those given are kept" if facts["best"] == facts["given"] else ""
        compared = (
            f"Mean score over {len(facts['scores']['best'])} seeds, on dev examples that chose "
            f"nothing: {ours}, of those given {theirs} (paired t test: p = {p_value:.2f}){kept}"
        )
    return [
        f"The best: {', '.join(f'{key} {cell(value)}' for key, value in facts['best'].items())}.",
        f"{compared}.",
        f"The search took {seconds:.0f} s, as {seconds / full:.1f} full runs do.",
    ]


def _draw(facts: Mapping[str, Any], _: Figure, panels: list[Axes]) -> None:
    for rank, (score, error) in reversed(facts["ranks"]):
        panels[0].errorbar(str(rank), score, error, marker="o", capsize=3, color="C0")
    panels[0].set(title="ranks: one run, truncated", xlabel="rank", ylabel="score")
    rates, shapes = _trained(facts, "rates"), _trained(facts, "shapes")
    shares = importance(rates, ("lr", "warmup")) | importance(shapes, ("dropout", "targets"))
    panels[1].barh(list(shares), list(shares.values()))
    panels[1].set(title="importance in its stage", xlabel="share", xlim=(0, 1))
    ordered = sorted((t["parameters"], -t["rungs"][0]) for t in shapes)
    parameters, scores = [x for x, _ in ordered], [-y for _, y in ordered]
    panels[2].scatter(parameters, scores)
    panels[2].step(parameters, list(accumulate(scores, max)), where="post")  # the Pareto front
    panels[2].set(title="shapes, first rung", xlabel="trained parameters", ylabel="score")


def importance(trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Optuna's importance of settings for the score of the first rung, which all trials have."""
    study = optuna.create_study(direction="maximize")
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted({trial[name] for trial in trials})) for name in names
    }
    for trial in trials:
        params = {name: trial[name] for name in names}
        value = trial["rungs"][0]
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    # Which settings bring a trial into the better half: with so few, a smaller part says little.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
