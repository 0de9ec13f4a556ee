"""`fastlora search`: LoRA settings found at a fraction of full runs' cost, and what it leaves.

search.json, best.toml, and the tables and plots of its report; how it searches is in stages.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import tomlkit
from optuna.trial import FrozenTrial, TrialState

from fastlora.console import Log
from fastlora.data.tasks import BUILTIN
from fastlora.errors import Interrupted, UserError
from fastlora.files import atomic_open
from fastlora.runs.folder import default_folder, open_run
from fastlora.runs.pages import (
    Block,
    code,
    heading,
    plot,
    table,
    without_folders,
    write_pages,
)
from fastlora.runs.session import facts_of
from fastlora.studies.stages import RANK_STAGE, Found, Search
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs
from fastlora.training.setup import prepare, read_encoder, training
from fastlora.training.stopping import Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTINGS = "search.toml"  # of trial 0
COLUMNS = ["stage", "lr", "warmup", "r", "dropout", "targets", "seed"]
COST = """\
The cost of the search is {spent:.0f} s: {share:.0%} of the {all:.0f} s that training each of its
{count} candidates once in full would take ({full:.0f} s a run, that of the defaults), with the same
{compared:.0f} s for the other seeds of the comparison."""


def run_search(
    config: TrainConfig,
    inputs: Inputs,
    how: SearchConfig,
    *,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Search in `config.out`, for all tasks jointly or for each task's adapter in turn.

    Raises as `Search.run`, and UserError before it begins.
    """
    if config.mode != "lora" or config.adapters == "shared+per-task" or config.add_to:
        raise UserError("search finds LoRA settings of shared or of per-task adapters of a new run")
    if config.cuda_graphs:
        raise UserError("cuda_graphs is given (a search trains several adapters in one pass)")
    log, setup = Log(quiet), prepare(config, inputs)
    setup = replace(setup, loaded=read_encoder(inputs.source), stop=stop or Stop())
    folder = config.out or default_folder(config)
    if how.join and not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds no search to help with (--out names its folder)")
    base = setup.config
    open_run(folder, base, SETTINGS)
    log.facts([*facts_of(setup, Ranks(setup.device)), ("search", str(folder))])
    shared = base.adapters == "shared"
    done, best, limits = {}, base, how
    for part in ("jointly",) if shared else tuple(setup.train):
        own = setup.narrow(base if shared else _alone(base, part))
        place = folder if shared else folder / part
        place.mkdir(exist_ok=True)
        if how.budget and not shared:
            limits = replace(how, budget=how.budget / len(setup.train))
        search = Search(own, place, limits, log)
        try:
            with training(own):
                found = search.run()
        except Interrupted:
            log.line(f"stopped; the same command with --out {folder} goes on")
            raise
        done[part] = search, found
        new = found.config
        tuned = replace(TaskLoraConfig.of(new.lora), lr=new.lr, warmup=new.warmup)
        best = new if shared else best.with_task_settings(part, tuned)
    if not how.join:
        write_search(folder, best, done, log)


def _alone(config: TrainConfig, task: str) -> TrainConfig:
    """The configuration of a task's adapter as the only one of a run."""
    own = config.task_settings(task)
    for name in (*BUILTIN, *config.task):
        config = config.with_task_settings(name, TaskLoraConfig())
    return replace(config, adapters="shared", tasks=(task,), **own.changes())


def write_search(
    folder: Path, config: TrainConfig, done: Mapping[str, tuple[Search, Found]], log: Log
) -> None:
    """Write and print what was found; `done` has one search, or one for each task's adapter.

    `config` is the configuration with all that was found in it.
    """
    with atomic_open(folder / "best.toml") as file:
        file.write("# Train with it: fastlora-train --config best.toml\n")
        file.write(tomlkit.dumps(config.to_table()))
    facts = {name: _facts(search, found) for name, (search, found) in done.items()}
    with atomic_open(folder / "search.json") as file:
        json.dump(facts, file, indent=1)
    blocks: list[Block | None] = [f"Tasks: {', '.join(config.tasks or ())}."]
    for name, (_, found) in done.items():
        blocks += [heading(name), *_sections(folder, name, found, facts[name])]
        for line in _verdict(found, facts[name]):
            log.line(line)
    blocks.append(heading("The best configuration"))
    blocks.append(code(tomlkit.dumps(without_folders(config.to_table()))))
    write_pages(folder, "Search of LoRA settings", blocks)
    log.line(f"train with it: fastlora-train --config {folder / 'best.toml'}")
    log.line(f"report in {folder / 'report.html'}")


def _facts(search: Search, found: Found) -> dict[str, Any]:
    """All trials and what came of them, as plain types."""
    trials = [
        (study, trial)
        for study in search.studies()
        for trial in study.get_trials()
        if trial.state != TrialState.FAIL  # those were queued again
    ]
    defaults = search.study("defaults").best_trial
    full, first = defaults.user_attrs["seconds"], defaults.params["seed"]
    seedless = [{**trial.params, "seed": None} for _, trial in trials]
    ranks = _ranks(search)
    count = len({tuple(params.items()) for params in seedless}) + len(ranks) - 1
    # With the first seed, two of the candidates are compared.
    others = [trial for _, trial in trials if trial.params["seed"] != first]
    compared = sum(trial.user_attrs.get("seconds", 0.0) for trial in others)
    return {
        "best": found.params,
        "scores": {"defaults": found.defaults, "best": found.searched},
        "p_value": found.p_value,
        "ranks": ranks,
        "cost": {
            "spent": (spent := search.spent()),
            "full": full,
            "count": count,
            "compared": compared,
            "all": (whole := count * full + compared),
            "share": spent / whole,
        },
        "trials": [_trial_facts(study, trial) for study, trial in trials],
    }


def _trial_facts(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    rungs = zip(study.user_attrs["rungs"], trial.intermediate_values.values(), strict=False)
    return {
        "stage": study.study_name,
        **trial.params,
        "state": trial.state.name.lower(),
        "rungs": [{"share": share, "score": value} for share, value in rungs],
        **{key: trial.user_attrs.get(key) for key in ("scores", "parameters", "seconds")},
    }


def _ranks(search: Search) -> list[tuple[int, tuple[float, float]]]:
    """Of each rank: its score without training, and the error of its distance to the best."""
    return search.study(RANK_STAGE).best_trial.user_attrs["sweep"]


def _verdict(found: Found, facts: Mapping[str, Any]) -> Iterator[str]:
    lora = found.config
    yield (
        f"best       r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, targets "
        f"{','.join(lora.targets)}, lr {found.config.peak_lr:g}, warmup {found.config.warmup:g}"
    )
    yield f"score      {_against(found)}"
    yield "cost       " + " ".join(COST.format(**facts["cost"]).split())


def _against(found: Found) -> str:
    """The comparison with the defaults, in words."""
    if found.p_value is None:
        return f"{found.defaults[0]:.4f}: the defaults are the best that was found"
    ours, theirs = (
        f"{mean(scores):.4f} ± {stdev(scores):.4f}" for scores in (found.searched, found.defaults)
    )
    sure = "a significant" if found.p_value < 0.05 else "no significant"
    kept = "" if mean(found.searched) > mean(found.defaults) else "; the defaults are kept"
    return (
        f"{ours} over {len(found.defaults)} seeds, the defaults {theirs}: {sure} difference "
        f"(paired t test, p = {found.p_value:.2f}){kept}"
    )


def _sections(
    folder: Path, name: str, found: Found, facts: Mapping[str, Any]
) -> Iterator[Block | None]:
    yield f"{_against(found)}."
    yield COST.format(**facts["cost"])
    done = [trial for trial in facts["trials"] if trial["rungs"]]
    done.sort(key=lambda trial: (len(trial["rungs"]), trial["rungs"][-1]["score"]), reverse=True)
    yield plot(folder, name, 4, partial(_draw, facts))
    yield heading("Ranks, from one run", 3)
    rows = [[str(rank), f"{score:.4f}", f"{error:.4f}"] for rank, (score, error) in facts["ranks"]]
    yield table(["rank", "score", "error of its distance to the best"], rows)
    yield heading("Trials", 3)
    header = [*COLUMNS, "examples", "score", "parameters", "seconds"]
    yield table(header, [_cells(trial) for trial in done])


def _cells(trial: Mapping[str, Any]) -> list[str]:
    last = trial["rungs"][-1]
    own = [f"{trial[key]:g}" if key in ("lr", "warmup") else str(trial[key]) for key in COLUMNS]
    cells = [f"{last['share']:.0%}", f"{last['score']:.4f}", f"{trial['parameters']:,}"]
    return [*own, *cells, f"{trial['seconds']:.1f}"]


def _draw(facts: Mapping[str, Any], _: Figure, panels: list[Axes]) -> None:
    ranks, scores, errors = zip(*((r, s, e) for r, (s, e) in facts["ranks"]), strict=True)
    panels[0].errorbar(ranks, scores, errors, marker="o", capsize=3)
    panels[0].set(title="ranks: one run, truncated", xlabel="rank", ylabel="score")
    _log_scale(panels[0], ranks)
    importance: dict[str, float] = {}
    for axes, stage, key in ((panels[1], "rates", "lr"), (panels[2], "shapes", "parameters")):
        of = [trial for trial in facts["trials"] if trial["stage"] == stage and trial["rungs"]]
        axes.scatter([t[key] for t in of], [t["rungs"][0]["score"] for t in of])
        axes.set(title=f"{stage}, first rung", ylabel="score")
        importance |= _importance(of)
    panels[1].set(xlabel="learning rate")
    _log_scale(panels[1], {t["lr"] for t in facts["trials"] if t["stage"] == "rates"})
    # Pareto: no point has as few parameters and a higher score.
    ordered = sorted((t["parameters"], -t["rungs"][0]["score"]) for t in of)
    best = list(accumulate((-score for _, score in ordered), max))
    panels[2].step([parameters for parameters, _ in ordered], best, where="post")
    panels[2].set(xlabel="trainable parameters")
    panels[3].barh(list(importance), list(importance.values()))
    panels[3].set(title="importance in its stage", xlabel="share of the variance", xlim=(0, 1))


def _log_scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis with these values at its ticks."""
    ticks = sorted(values)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()


def _importance(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of the first rung's variance that lies between the values of each setting."""
    scores = np.array([trial["rungs"][0]["score"] for trial in trials])
    shares = {}
    for key in ("lr", "warmup", "dropout", "targets"):
        levels = np.array([f"{t[key]:.0e}" if key == "lr" else str(t[key]) for t in trials])
        if len(set(levels)) > 1:
            means = np.array([scores[levels == level].mean() for level in levels])
            shares[key] = float(means.var() / (scores.var() or 1.0))
    return shares
