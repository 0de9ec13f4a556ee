"""`fastlora compare`: finished runs side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fastlora.console import Log
from fastlora.files import read_json, read_toml
from fastlora.runs import pages
from fastlora.runs.folder import INPUTS, SETTINGS
from fastlora.runs.report import trained_share
from fastlora.runs.session import read_result
from fastlora.studies.grid import Record, draw_lines, table_of


def compare(folders: Sequence[Path], out: Path | None) -> None:
    """Print scores, settings that differ, parameters and seconds of runs, and plot the scores.

    plots/compare.png and a report are written in `out`, or the plot alone in the working directory.
    Raises UserError for a folder without a finished run.
    """
    results = [read_result(run) for run in folders]
    inputs = [read_json(run / INPUTS) for run in folders]
    tables = [pages.without_folders(read_toml(run / SETTINGS)) for run in folders]
    for table in tables:
        for name, own in table.pop("task", {}).items():
            table |= {f"{name}.{key}": value for key, value in own.items()}
    tasks = list(dict.fromkeys(task for result in results for task in result["scores"]))
    keys = dict.fromkeys(key for table in tables for key in table if key != "tasks")
    # A task's settings are compared among the runs that have the task.
    of = {k: [t for t in tables if "." not in k or f"{k.split('.')[0]}.kind" in t] for k in keys}
    differ = [key for key, own in of.items() if any(t.get(key) != own[0].get(key) for t in own)]
    records: list[Record] = []
    for folder, table, result in zip(folders, tables, results, strict=True):
        record: Record = {"run": f"{len(records) + 1}. {pages.without_folders(folder)}"}
        differences = ", ".join(f"{key} {table[key]}" for key in differ if key in table)
        record["settings that differ"] = re.sub(r"[][{}']", "", differences)
        record |= {task: result["scores"].get(task) for task in tasks}
        record["trainable"], _ = trained_share(result["parameters"])
        records.append({**record, "seconds": result["seconds"]})
    shown, place, log = table_of(records), out or Path(), Log(quiet=False)
    hashes = {t: {read.get(f"the dev data of {t}") for read in inputs} - {None} for t in tasks}
    notes = [f"The dev data of {task} is not the same." for task in tasks if len(hashes[task]) > 1]

    def draw(figure: pages.Figure, panels: list[pages.Axes]) -> None:
        rows = [{**record, "number": f"{i}"} for i, record in enumerate(records, 1)]
        for panel, task in zip(panels, tasks, strict=True):
            draw_lines(panel, rows, "number", task, "run")
            panel.set(title=task, xlabel="run", ylabel="dev score")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")

    plot = pages.plot(place, "compare", len(tasks), draw)
    where = f"plot in {place / 'plots' / 'compare.png'}" if plot else pages.NO_PLOTS
    log.table(*shown)
    log.line("\n".join([*notes, where]))
    if out is not None:
        pages.write_pages(out, "Comparison of runs", [pages.table(*shown), notes, plot])
        log.line(f"report in {out / 'report.html'}")
