"""Runs of the paper's tables: a run folder for each row and seed, our scores beside the paper's."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fastlora.console import Log, number
from fastlora.data.tasks import BUILTIN
from fastlora.errors import Interrupted, RunError
from fastlora.files import atomic_open
from fastlora.runs import pages
from fastlora.runs.folder import open_run
from fastlora.runs.session import run_prepared
from fastlora.studies.paper_tables import COURSE, TABLES, Row, Table
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import Inputs
from fastlora.training.setup import Setup, prepare, read_encoder
from fastlora.training.stopping import Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTES = """\
Scores are of the dev files. The paper's encoder is BERT-base. Its learning rate is not known: rows
have this library's own, only the last has the course's, which is meant for full fine-tuning; it is
left out of the comparison. Trainable parameters include the heads. Seconds are of training steps:
loading, scoring and the frozen encoder's one pass are not in them."""

# Of a row: its setting, and by task the mean score, the spread over seeds and the paper's score.
Record = dict[str, Any]


def reproduce(
    names: Sequence[str],
    config: TrainConfig,
    inputs: Inputs,
    seeds: int,
    out: Path,
    quiet: bool = False,
    stop: Stop | None = None,
) -> None:
    """Run tables of `TABLES` with seeds 0 to `seeds` - 1, in `out`/TABLE; print and write them.

    What an earlier call finished is read, what it began goes on. Data and encoder are read once.

    Raises:
        UserError: before training, or when a row's folder holds a run with other settings.
        RunError: after all tables, when a row failed.
        Interrupted: when `stop` asked for it, with the state saved.
    """
    setup, log = prepare(config, inputs), Log(quiet)
    setup = replace(setup, loaded=read_encoder(inputs.source), stop=stop or Stop())
    scope = f"at most {config.limit:,} examples a file" if config.limit else "all examples"
    model, data = map(pages.without_folders, (inputs.model, inputs.folder))
    facts = f"{model}, {data}, {scope}, epochs: {config.epochs}, seeds: {seeds}, "
    facts += f"{setup.config.precision} on {setup.device.type}"
    failed = 0
    for name in names:
        table, folder = TABLES[name], out / name
        log.facts([(name, table.title), ("", facts)])
        records = []
        for row in table.rows:
            own = replace(config, tasks=table.tasks, **row.changes)
            records.append(_run_row(row, own, setup, seeds, folder / "rows" / row.name, log))
        _write(name, table, records, facts, folder, log)
        failed += sum(bool(record["failed"]) for record in records)
    if failed:
        raise RunError(f"{failed} of the rows failed; each table's report.md says why")


def _run_row(
    row: Row, config: TrainConfig, setup: Setup, seeds: int, folder: Path, log: Log
) -> Record:
    """A row's scores, with the runs trained that are not done; a failure is noted in it."""
    results, failed = [], ""
    for seed in range(seeds):
        place = folder / f"seed{seed}"
        label = f"{row.setting} {row.variant}  seed {seed}"
        try:
            own = setup.narrow(replace(config, seed=seed, out=place))
            results.append(_result(own, place, label, log))
        except RunError as error:
            failed = f"seed {seed} failed: {error}"
            log.line(f"{row.setting} {row.variant}  {failed}")
        except Interrupted:
            log.line(f"{label}  stopped, saved; the same command goes on from there")
            raise
    record: Record = {"setting": row.setting, "variant": row.variant}
    for task in config.tasks or ():
        scores = [s for result in results if (s := result["scores"][task]) is not None]
        record[task] = mean(scores) if scores else None
        record[f"{task} spread"] = stdev(scores) if len(scores) > 1 else None
        record[f"{task} paper"] = row.paper.get(task)
    record |= {"trainable": None, "seconds": None, "failed": failed}
    if results:
        counts = results[0]["parameters"]
        record["trainable"] = counts["lora"] + counts["other trainable"]
        record["seconds"] = mean(result["seconds"] for result in results)
    return record


def _result(setup: Setup, place: Path, label: str, log: Log) -> dict[str, Any]:
    """A run's result.json; trains the run if it is not complete."""
    new = not (place / "adapter" / "README.md").is_file()  # the last that a run writes
    if new:
        run_prepared(setup, quiet=log.console.quiet, brief=True)
    else:
        open_run(place, setup.config)
    # What has ended needs no checkpoint, and a study has many runs.
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    if new:
        scores = "  ".join(f"{task} {number(score)}" for task, score in result["scores"].items())
        log.line(f"{label}  {scores}  {result['seconds']:.1f} s")
    return result


def _write(
    name: str, table: Table, records: list[Record], facts: str, folder: Path, log: Log
) -> None:
    """Print a table; write its CSV, plot and report."""
    columns = (part for task in table.tasks for part in (task, "paper"))
    header = ["setting", *columns, "trainable", "seconds"]
    cells = [_cells(record, table.tasks) for record in records]
    verdicts = [_verdict(task, records) for task in table.tasks]
    verdicts += [f"{_label(record)}: {record['failed']}" for record in records if record["failed"]]
    log.table(header, cells)
    for verdict in verdicts:
        log.line(verdict)
    with atomic_open(folder / f"{name}.csv") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    draw = partial(_draw, tasks=table.tasks, records=records)
    blocks = [
        facts,
        pages.table(header, cells),
        verdicts,
        pages.plot(folder, name, len(table.tasks), draw),
        table.note,
        NOTES,
    ]
    pages.write_pages(folder, f"{name}: {table.title}", blocks)
    log.line(f"report in {folder / 'report.html'}")


def _label(record: Record) -> str:
    return f"{record['setting']} {record['variant']}"


def _cells(record: Record, tasks: Sequence[str]) -> list[str]:
    cells = [_label(record) + (": failed" if record["failed"] else "")]
    for task in tasks:
        spread, paper = record[f"{task} spread"], record[f"{task} paper"]
        cells.append(number(record[task]) + (f" ± {spread:.3f}" if spread is not None else ""))
        cells.append("" if paper is None else number(paper))
    if record["trainable"] is None:
        return [*cells, "", ""]
    return [*cells, f"{record['trainable']:,}", f"{record['seconds']:.1f}"]


def _verdict(task: str, records: Sequence[Record]) -> str:
    """Our best score and how often the paper's is beaten, the course's learning rate left out."""
    ours = [r for r in records if r["variant"] != COURSE and r[task] is not None]
    if not ours:
        return f"{task}: no score."
    best = max(ours, key=lambda record: record[task])
    text = f"{task}: best {best[task]:.3f} ({_label(best)})"
    both = [(r[task], r[f"{task} paper"]) for r in ours if r[f"{task} paper"] is not None]
    if not both:
        return f"{text}; no number of the paper's is known."
    beaten = sum(own > paper for own, paper in both)
    top = max(paper for _, paper in both)
    return f"{text}, the paper's {top:.3f}; {beaten} of {len(both)} rows with its number beat it."


def _draw(
    figure: Figure, panels: list[Axes], tasks: Sequence[str], records: Sequence[Record]
) -> None:
    """A panel a task: a line a variant over the settings, and the paper's scores as crosses.

    The course's learning rate is left out: so far below, it would press all others together.
    """
    places = {setting: i for i, setting in enumerate(dict.fromkeys(r["setting"] for r in records))}
    variants = [v for v in dict.fromkeys(r["variant"] for r in records) if v != COURSE]
    figure.set_size_inches(2 * len(tasks) + 6, 5)  # room for six ranks and ten variants
    for panel, task in zip(panels, tasks, strict=True):
        for i, variant in enumerate(variants):
            rows = [r for r in records if r["variant"] == variant and r[task] is not None]
            panel.errorbar(
                [places[row["setting"]] for row in rows],
                [row[task] for row in rows],
                [row[f"{task} spread"] or 0 for row in rows],
                fmt="o" + ("-" if i < 4 else "--"),
                color=f"C{i % 4}",
                label=variant,
            )
        known = [r for r in records if r[f"{task} paper"] is not None]
        panel.plot(
            [places[row["setting"]] for row in known],
            [row[f"{task} paper"] for row in known],
            "kx",
            zorder=3,
            label="the paper" if known else "",
        )
        panel.set(title=task, ylabel=f"dev {BUILTIN[task].metric}")
        panel.set_xticks(list(places.values()), list(places))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
