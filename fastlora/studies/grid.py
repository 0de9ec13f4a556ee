"""Runs the rows of the paper's tables, and reports on them and on a search."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastlora.console import Log, format_scores
from fastlora.errors import Interrupted, RunError
from fastlora.multitask.predictor import write_rows
from fastlora.runs import pages
from fastlora.runs.report import trained_share
from fastlora.runs.session import read_result, run_description, run_prepared
from fastlora.studies.paper_tables import COURSE, TABLES, Row
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import Inputs
from fastlora.training.setup import Setup, prepare, read_encoder
from fastlora.training.stopping import Stop

NOTES = """\
Scores are those on the dev files, with the standard deviation over seeds. The paper's encoder is
BERT-base. The paper does not give its learning rate: adapters use 2e-3, and the last row the
course's. Of an adapter for one task, the paper gives the best
score and its dropout but not its rank: each rank shows the score. Trainable parameters include the
heads. Seconds are of training steps, without loading and evaluation."""
SEARCH_NOTES = """\
The trials are scored on one half of the dev examples, full runs on the other, which no choice was
based on. The error of a rank is the standard error of the difference from the best rank's score."""
Record = dict[str, Any]  # the value of each column of a row, or None


def begin(config: TrainConfig, inputs: Inputs, quiet: bool, stop: Stop) -> tuple[Setup, Log]:
    """Prepare and describe the setup that a study's runs share; returns it and their log."""
    log, setup = Log(quiet), prepare(config, inputs)
    setup = replace(setup, loaded=read_encoder(inputs.source), stop=stop)
    log.fields(run_description(setup, World(setup.device)))
    return setup, log


def reproduce(
    names: Sequence[str], config: TrainConfig, inputs: Inputs, seeds: int, quiet: bool, stop: Stop
) -> None:
    """Run or continue some of `TABLES` with seeds 0, 1, ..., and report each in `config.out`/TABLE.

    Raises UserError before training, or if a folder holds a run with other settings; RunError after
    the last table, if a run failed; and Interrupted, with the state saved, if `stop` asked for it.
    """
    setup, log = begin(config, inputs, quiet, stop)
    model, data = map(pages.without_folders, (inputs.model, inputs.folder))
    limit = f"at most {config.limit:,} examples of a file" if config.limit else "all examples"
    scope = f"{model} on {data}: {limit}, {config.epochs} epochs, {setup.config.precision}"
    failures = 0
    for name in names:
        records, folder = [], Path(config.out or "studies", name)
        for row in TABLES[name].rows:
            changed = setup.narrow(replace(config, tasks=TABLES[name].tasks, **row.changes))
            records.append(run_row(row, changed, seeds, folder / "rows" / row.name, log))
        failures += sum(bool(record["failed"]) for record in records)
        write_table(name, records, scope, folder, log)
    if failures:
        raise RunError(f"{failures} of the rows failed; each table's report.md says why")


def run_row(row: Row, setup: Setup, seeds: int, folder: Path, log: Log) -> Record:
    """Run a row with some seeds in `folder`/seedN, and read the runs that are finished there.

    A failed run does not stop the others. Raises Interrupted, and UserError if a run's settings or
    its data differ.
    """
    results, failed = [], None
    for seed in range(setup.config.seed, setup.config.seed + seeds):
        label, out = f"{row.setting} {row.variant}  seed {seed}", folder / f"seed{seed}"
        run = replace(setup, config=replace(setup.config, seed=seed, out=out))
        try:
            run_prepared(run, quiet=log.console.quiet, brief=True)
        except Interrupted:
            log.line(f"{label}  stopped, saved; the same command continues from there")
            raise
        except RunError as error:
            failed = f"seed {seed} failed: {error}"
            log.line(f"{row.setting} {row.variant}  {failed}")
            continue
        # A finished run needs no checkpoints, which would fill the disk in a study of many runs.
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        results.append(result := read_result(out))
        log.line(f"{label}  {format_scores(result['scores'])}  {result['seconds']:.1f} s")
    record: Record = {"setting": row.setting, "variant": row.variant}
    for task in setup.train:
        values = [value for result in results if (value := result["scores"][task]) is not None]
        record[task] = mean(values) if values else None
        record[f"{task} std"] = stdev(values) if len(values) > 1 else None
        record[f"{task} paper"] = row.paper.get(task)
    record["trainable"] = trained_share(results[0]["parameters"])[0] if results else None
    record["seconds"] = mean(result["seconds"] for result in results) if results else None
    return {**record, "failed": failed}


def write_table(name: str, records: list[Record], scope: str, folder: Path, log: Log) -> None:
    """Print a table and write its CSV file, plot and report."""
    title, tasks, _ = TABLES[name]
    header, cells = table_of(records)
    log.line(f"{name}: {title}")
    log.table(header, cells)
    write_rows(folder / f"{name}.csv", list(records[0]), [list(r.values()) for r in records])
    plot = pages.plot(folder, name, len(tasks), partial(_draw, tasks, records))
    blocks = [scope, pages.table(header, cells), plot, NOTES]
    pages.write_pages(folder, f"{name}: {title}", blocks)
    log.line(f"report in {folder / 'report.html'}")


def table_of(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a table, without columns that have no value."""
    names = [n for n in records[0] if any(r[n] not in (None, "") for r in records)]
    return names, [[cell(record[name]) for name in names] for record in records]


def cell(value: object) -> str:
    """A value as text: four digits of a float, commas in a whole number, "" for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _draw(
    tasks: Sequence[str], records: Sequence[Record], figure: pages.Figure, axes: list[pages.Axes]
) -> None:
    """Plot each task's scores by setting, and the paper's as crosses."""
    figure.set_size_inches(2 * len(tasks) + 6, 5)  # fits six ranks and ten variants
    # The low scores at the course's learning rate would hide the differences of the others.
    shown = [record for record in records if record["variant"] != COURSE]
    for panel, task in zip(axes, tasks, strict=True):
        draw_lines(panel, shown, "setting", task, "variant")
        known = {r["setting"]: r[f"{task} paper"] for r in shown if r[f"{task} paper"] is not None}
        panel.plot([*known], [*known.values()], "kx", zorder=3, label="the paper" if known else "")
        panel.set(title=task, ylabel="dev score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_lines(panel: pages.Axes, rows: Sequence[Record], x: str, y: str, by: str) -> None:
    """Plot `y` over `x` with its standard deviation, as a line for each value of `by`."""
    for i, value in enumerate(dict.fromkeys(row[by] for row in rows)):
        line = [row for row in rows if row[by] == value and row[y] is not None]
        xs, ys = ([row[key] for row in line] for key in (x, y))
        stds = [row.get(f"{y} std") or 0 for row in line]
        panel.errorbar(xs, ys, stds, fmt="o-" if i < 4 else "o--", color=f"C{i % 4}", label=value)


def report_search(folder: Path, findings: Mapping[str, dict[str, Any]], log: Log) -> None:
    """Write and print the findings of a search, by task or for all tasks jointly."""
    blocks: list[pages.Block | None] = [SEARCH_NOTES]
    for name, finding in findings.items():
        best = ", ".join(f"{key} {cell(value)}" for key, value in finding["best"].items())
        runs, trials = table_of(finding["full_runs"]), table_of(finding["trials"])
        log.line(f"{name}: the best settings are {best}")
        log.table(*runs)
        plot = pages.plot(folder, name, 3, partial(_draw_search, finding))
        blocks += [pages.heading(f"{name}: {best}"), pages.table(*runs), plot, pages.table(*trials)]
    pages.write_pages(folder, "Search of LoRA settings", blocks)
    log.line(f"report in {folder / 'report.html'}; train with the settings found:")
    log.line(f"  fastlora-train --config {folder / 'best.toml'}")


def _draw_search(finding: Record, figure: pages.Figure, panels: list[pages.Axes]) -> None:
    """Plot the scores of the ranks, and those of the shortest runs of the other stages."""
    for rank, (score, error) in reversed(finding["ranks"]):
        panels[0].errorbar(str(rank), score, error, marker="o", capsize=3, color="C0")
    panels[0].set(title="one run, truncated", xlabel="rank", ylabel="score")
    stages = (("rates", "lr", "warmup"), ("shapes", "dropout", "targets"))
    for panel, (stage, x, line) in zip(panels[1:], stages, strict=True):
        rows = [row for row in finding["trials"] if row["stage"] == stage]
        draw_lines(panel, sorted(rows, key=itemgetter(x)), x, "first score", line)
        panel.set(title=f"shortest runs, by {line}", xlabel=x)
    panels[1].legend()
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=2)
