"""Grids of runs: a run folder for each row of settings and each seed; so the paper's tables."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fastlora.console import Log, number
from fastlora.errors import Interrupted, RunError
from fastlora.files import atomic_open, read_json
from fastlora.runs.pages import plot, table, without_folders, write_pages
from fastlora.runs.session import facts_of, run_prepared
from fastlora.studies.paper_tables import COURSE, TABLES, Row
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import Ranks
from fastlora.training.inputs import Inputs
from fastlora.training.setup import Setup, prepare, read_encoder
from fastlora.training.stopping import Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTES = """\
Scores are of the dev files, with the standard deviation over seeds. The paper's encoder is
BERT-base. Its learning rate is not known: rows have this library's own, except the last, which has
the course's and is left out of the comparison. Trainable parameters include the heads. Seconds are
of training steps, without loading and scoring."""
Record = dict[str, Any]  # a row's columns; None where there is no value


def reproduce(
    names: Sequence[str],
    config: TrainConfig,
    inputs: Inputs,
    seeds: int,
    out: Path,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Run tables of `TABLES` with seeds 0 to `seeds` - 1 in `out`/TABLE; print and report them.

    Finished runs are read and unfinished ones continued. Raises UserError before training, or when
    a folder holds a run with other settings; RunError after all tables, when a run failed; and
    Interrupted when `stop` asked for it, with the state saved.
    """
    setup, log = prepare(config, inputs), Log(quiet)
    setup = replace(setup, loaded=read_encoder(inputs.source), stop=stop or Stop())
    log.facts(facts_of(setup, Ranks(setup.device)))
    model, data = map(without_folders, (inputs.model, inputs.folder))
    limit = f"at most {config.limit:,} examples of a file" if config.limit else "all examples"
    scope = f"{model} on {data}: {limit}, {config.epochs} epochs, {setup.config.precision}"
    failures = 0
    for name in names:
        records, folder = [], out / name
        for row in TABLES[name].rows:
            own = setup.narrow(replace(config, tasks=TABLES[name].tasks, **row.changes))
            records.append(run_row(row, own, seeds, folder / "rows" / row.name, log))
        failures += sum(bool(record["failed"]) for record in records)
        write_table(name, records, scope, folder, log)
    if failures:
        raise RunError(f"{failures} of the rows failed; each table's report.md says why")


def run_row(row: Row, setup: Setup, seeds: int, folder: Path, log: Log) -> Record:
    """Run a row with each seed in `folder`/seedN; a run that fails stops no other."""
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
    record["trainable"] = trained_parameters(results[0]) if results else None
    record["seconds"] = mean(result["seconds"] for result in results) if results else None
    return {**record, "failed": failed}


def run_once(setup: Setup, label: str, log: Log) -> dict[str, Any]:
    """The result.json of a run in `setup.config.out`, which is trained unless it is complete."""
    folder = setup.config.out
    assert folder is not None
    new = not (folder / "adapter" / "README.md").is_file()  # the last file that a run writes
    try:  # a finished run is left as it is, and refused where its settings or its data differ
        run_prepared(setup, quiet=log.console.quiet, brief=True)
    except Interrupted:
        log.line(f"{label}  stopped, saved; the same command continues from there")
        raise
    # A finished run needs no checkpoint, and a study has many runs.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result = read_json(folder / "result.json")
    if new:
        scores = "  ".join(f"{task} {number(score)}" for task, score in result["scores"].items())
        log.line(f"{label}  {scores}  {result['seconds']:.1f} s")
    return result


def trained_parameters(result: dict[str, Any]) -> int:
    """How many parameters a run trained, by its result.json."""
    return result["parameters"]["lora"] + result["parameters"]["other trainable"]


def cell(value: object) -> str:
    """A value as a table shows it: numbers with four digits, counts with commas, None as ""."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def write_table(name: str, records: list[Record], scope: str, folder: Path, log: Log) -> None:
    """Print a table and write its CSV file, plot and report."""
    title, tasks, _, note = TABLES[name]
    header, cells = list(records[0]), [list(map(cell, record.values())) for record in records]
    lines = [_verdict(task, records) for task in tasks]
    log.line(f"{name}: {title}")
    log.table(header, cells)
    for line in lines:
        log.line(line)
    with atomic_open(folder / f"{name}.csv") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    shown = plot(folder, name, len(tasks), partial(_draw, tasks, records))
    blocks = [scope, table(header, cells), lines, shown, note, NOTES]
    write_pages(folder, f"{name}: {title}", blocks)
    log.line(f"report in {folder / 'report.html'}")


def _verdict(task: str, records: Sequence[Record]) -> str:
    """Our best score, and how many rows beat the paper's, the course's learning rate left out."""
    ours = [r for r in records if r["variant"] != COURSE and r[task] is not None]
    if not ours:
        return f"{task}: no score"
    best = max(ours, key=lambda record: record[task])
    both = [(r[task], r[f"{task} paper"]) for r in ours if r[f"{task} paper"] is not None]
    beaten = sum(own > paper for own, paper in both)
    return (
        f"{task}: best {best[task]:.3f} ({best['setting']} {best['variant']}); {beaten} of "
        f"{len(both)} rows beat the paper's score for them"
    )


def _draw(
    tasks: Sequence[str], records: Sequence[Record], figure: Figure, axes: list[Axes]
) -> None:
    """For each task, scores over the settings, a line a variant; the paper's scores are crosses.

    The course's learning rate is left out: so far below, it would press all others together.
    """
    figure.set_size_inches(2 * len(tasks) + 6, 5)  # room for six ranks and ten variants
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
