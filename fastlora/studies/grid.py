"""The paper's tables: a run for each row of settings and each seed, and a report of the scores."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastlora.console import Log, number
from fastlora.errors import Interrupted, RunError
from fastlora.files import read_json
from fastlora.multitask.predictor import write_rows
from fastlora.runs import pages
from fastlora.runs.report import trained_share
from fastlora.runs.session import is_finished, run_description, run_prepared
from fastlora.studies.paper_tables import COURSE, TABLES, Row
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs
from fastlora.training.setup import Setup, prepare, read_encoder
from fastlora.training.stopping import Stop

NOTES = """\
Scores are those on the dev files, with the standard deviation over seeds. The paper's encoder is
BERT-base. The paper does not give its learning rate: the rows use this library's default, except
the last, which uses the course's and is left out of the comparison. Trainable parameters include
the heads. Seconds are those of training steps, without loading and evaluation."""
Record = dict[str, Any]  # the value of each column of a row, or None


def reproduce(
    names: Sequence[str],
    config: TrainConfig,
    inputs: Inputs,
    seeds: int,
    out: Path,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Run tables of `TABLES` with seeds 0 to `seeds` - 1, and report each in `out`/TABLE.

    Finished runs are read, and unfinished ones are continued. Raises UserError before training, or
    if a folder holds a run with other settings; RunError after the last table, if a run failed; and
    Interrupted, with the state saved, if `stop` asked for it.
    """
    setup, log = prepare(config, inputs), Log(quiet)
    setup = replace(setup, loaded=read_encoder(inputs.source), stop=stop or Stop())
    log.fields(run_description(setup, Ranks(setup.device)))
    model, data = map(pages.without_folders, (inputs.model, inputs.folder))
    limit = f"at most {config.limit:,} examples of a file" if config.limit else "all examples"
    scope = f"{model} on {data}: {limit}, {config.epochs} epochs, {setup.config.precision}"
    failures = 0
    for name in names:
        records, folder = [], out / name
        for row in TABLES[name].rows:
            changed = setup.narrow(replace(config, tasks=TABLES[name].tasks, **row.changes))
            records.append(run_row(row, changed, seeds, folder / "rows" / row.name, log))
        failures += sum(bool(record["failed"]) for record in records)
        write_table(name, records, scope, folder, log)
    if failures:
        raise RunError(f"{failures} of the rows failed; each table's report.md says why")


def run_row(row: Row, setup: Setup, seeds: int, folder: Path, log: Log) -> Record:
    """Run a row with each seed in `folder`/seedN; a failed run does not stop the others."""
    results, failed = [], None
    for seed in range(seeds):
        config = replace(setup.config, seed=seed, out=folder / f"seed{seed}")
        try:
            label = f"{row.setting} {row.variant}  seed {seed}"
            results.append(run_once(replace(setup, config=config), label, log))
        except RunError as error:
            failed = f"seed {seed} failed: {error}"
            log.line(f"{row.setting} {row.variant}  {failed}")
    record: Record = {"setting": row.setting, "variant": row.variant}
    for task in setup.train:
        scores = [score for result in results if (score := result["scores"][task]) is not None]
        record[task] = mean(scores) if scores else None
        record[f"{task} spread"] = stdev(scores) if len(scores) > 1 else None
        record[f"{task} paper"] = row.paper.get(task)
    record["trainable"] = trained_share(results[0]["parameters"])[0] if results else None
    record["seconds"] = mean(result["seconds"] for result in results) if results else None
    return {**record, "failed": failed}


def run_once(setup: Setup, label: str, log: Log) -> dict[str, Any]:
    """Run a setup in `setup.config.out`, unless it is finished there; returns its result.json."""
    folder = setup.config.out
    assert folder is not None
    new = not is_finished(folder)
    try:  # also for a finished run, as this raises UserError if its settings or its data differ
        run_prepared(setup, quiet=log.console.quiet, brief=True)
    except Interrupted:
        log.line(f"{label}  stopped, saved; the same command continues from there")
        raise
    # A finished run needs no checkpoints, which would fill the disk in a study of many runs.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result = read_json(folder / "result.json")
    if new:
        scores = "  ".join(f"{task} {number(score)}" for task, score in result["scores"].items())
        log.line(f"{label}  {scores}  {result['seconds']:.1f} s")
    return result


def cell(value: object) -> str:
    """A value as text: four digits of a float, commas in a whole number, "" for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def write_table(name: str, records: list[Record], scope: str, folder: Path, log: Log) -> None:
    """Print a table and write its CSV file, plot and report."""
    title, tasks, _, note = TABLES[name]
    header, cells = list(records[0]), [list(map(cell, record.values())) for record in records]
    comparison = [_comparison(task, records) for task in tasks]
    log.line(f"{name}: {title}")
    log.table(header, cells)
    for line in comparison:
        log.line(line)
    write_rows(folder / f"{name}.csv", header, [list(record.values()) for record in records])
    plot = pages.plot(folder, name, len(tasks), partial(_draw, tasks, records))
    blocks = [scope, pages.table(header, cells), comparison, plot, note, NOTES]
    pages.write_pages(folder, f"{name}: {title}", blocks)
    log.line(f"report in {folder / 'report.html'}")


def _comparison(task: str, records: Sequence[Record]) -> str:
    """The best score and how many rows exceed the paper's, without the course's learning rate."""
    ours = [r for r in records if r["variant"] != COURSE and r[task] is not None]
    if not ours:
        return f"{task}: no score"
    best = max(ours, key=lambda record: record[task])
    known = [r for r in ours if r[f"{task} paper"] is not None]
    better = sum(record[task] > record[f"{task} paper"] for record in known)
    return (
        f"{task}: best {best[task]:.3f} ({best['setting']} {best['variant']}); {better} of the "
        f"{len(known)} rows that the paper has a score for exceed it"
    )


def _draw(
    tasks: Sequence[str], records: Sequence[Record], figure: pages.Figure, axes: list[pages.Axes]
) -> None:
    """Plot the scores of each task by setting: a line for each variant, and the paper's as crosses.

    The course's learning rate is left out: its low scores would hide the differences of the others.
    """
    figure.set_size_inches(2 * len(tasks) + 6, 5)  # fits six ranks and ten variants
    shown = [record for record in records if record["variant"] != COURSE]
    for panel, task in zip(axes, tasks, strict=True):
        for i, variant in enumerate(dict.fromkeys(record["variant"] for record in shown)):
            rows = [r for r in shown if r["variant"] == variant and r[task] is not None]
            x, y, spread = ([r[key] for r in rows] for key in ("setting", task, f"{task} spread"))
            line = "o" + ("-" if i < 4 else "--")
            panel.errorbar(
                x, y, [s or 0 for s in spread], fmt=line, color=f"C{i % 4}", label=variant
            )
        known = [r for r in shown if r[f"{task} paper"] is not None]
        x, y = ([r[key] for r in known] for key in ("setting", f"{task} paper"))
        panel.plot(x, y, "kx", zorder=3, label="the paper" if known else "")
        panel.set(title=task, ylabel="dev score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
