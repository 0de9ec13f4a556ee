"""The report of a finished run and its model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit

from fastlora.console import format_score
from fastlora.data.reading import TaskData
from fastlora.files import atomic_open, read_json
from fastlora.multitask.files import adapter_place
from fastlora.multitask.metrics import predicted_values
from fastlora.multitask.predictor import class_tables
from fastlora.runs import pages
from fastlora.training.metrics_log import METRICS
from fastlora.training.setup import Setup

MODES = {"lora": "LoRA on", "frozen": "Heads on the frozen", "full": "Full fine-tuning of"}
MOST_CLASSES = 30  # of a task whose confusion matrix is shown


def write_report(
    folder: Path,
    setup: Setup,
    adapters: Iterable[str],
    outputs: Mapping[str, np.ndarray],
    result: Mapping[str, Any],
) -> None:
    """Write report.md, report.html, plots/ and, last, adapter/README.md in a finished run's folder.

    `adapters` are the names of the model's adapters, `outputs` those of `predict` for the dev data,
    and `result` is the content of result.json. The pages contain no absolute path.
    """
    base, environment = setup.inputs.source.name, read_json(folder / "env.json")
    settings = pages.code(tomlkit.dumps(pages.without_folders(setup.config.to_table())))
    trained, share = trained_share(result["parameters"])
    what = f"{MODES[setup.config.mode]} {pages.without_folders(base)}"
    subject = f"{what}, trained on {', '.join(setup.train)}"
    epochs = [
        [str(x["epoch"] + 1), str(x["step"]), *map(format_score, x["scores"].values())]
        for x in result["history"]
    ]
    title, scores = folder.resolve().name, pages.table(*result["table"])
    blocks = [
        f"{subject}, started {environment['started']}. {throughput(result)}; {trained:,} trainable "
        f"parameters ({share:.2f}%). The weights of step {result['kept']:,} are kept.",
        pages.heading("Dev scores"),
        scores,
        pages.table(["epoch", "step", *setup.train], epochs),
        _training_plot(folder, list(setup.train), result["history"]),
        pages.heading("Dev predictions"),
        _scatter_plot(folder, setup.dev, outputs),
        *starmap(pages.table, class_tables(setup.dev, outputs, every=True)),
        *(_confusion_table(data, outputs[name]) for name, data in setup.dev.items()),
        pages.heading("Configuration"),
        settings,
        pages.heading("Environment"),
        pages.table(["name", "value"], ([k, str(v or "none")] for k, v in environment.items())),
    ]
    pages.write_pages(folder, title, blocks)
    places = [adapter_place(Path("adapter"), name).as_posix() for name in adapters]
    card = {"title": title, "subject": subject, "scores": scores, "settings": settings}
    with atomic_open(folder / "adapter" / "README.md") as file:
        local = Path(base).is_dir() or pages.without_folders(base) != base
        hub = None if local else base  # the hub knows no local folder
        file.write(pages.render("README.md", hub=hub, folders=places, **card))


def throughput(result: Mapping[str, Any]) -> str:
    """The steps, examples and seconds of a run, by its result, in words."""
    speed = result["examples"] / max(result["seconds"], 1e-9)
    work = f"{result['steps']:,} steps, {result['examples']:,} examples"
    return f"{work} in {result['seconds']:.0f} s of training ({speed:.0f} examples/s)"


def trained_share(counts: Mapping[str, int]) -> tuple[int, float]:
    """How many parameters were trained, by a `parameter_report`, and their percentage of all."""
    trained = counts["lora"] + counts["other trainable"]
    return trained, 100 * trained / (trained + counts["frozen"])


def _training_plot(
    folder: Path, tasks: Sequence[str], history: Sequence[Mapping[str, Any]]
) -> pages.Block | None:
    """Each task's training loss and dev score by step."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]

    def draw(figure: pages.Figure, panels: list[pages.Axes]) -> None:
        losses, scores = panels
        for task in tasks:
            of_task = [line for line in logged if task in line["loss"]]
            steps, values = [x["step"] for x in of_task], [x["loss"][task] for x in of_task]
            losses.plot(steps, values, marker="." if len(steps) < 20 else "")
            values = [math.nan if (v := x["scores"][task]) is None else v for x in history]
            scores.plot([x["step"] for x in history], values, marker="o", label=task)
        losses.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(0, None))
        scores.set(xlabel="step", ylabel="dev score", xlim=(0, None))
        figure.legend(loc="outside right upper")

    return pages.plot(folder, "training", 2, draw)


def _scatter_plot(
    folder: Path, datasets: Mapping[str, TaskData], outputs: Mapping[str, np.ndarray]
) -> pages.Block | None:
    """The predictions of each regression against the labels; None if there is no regression."""
    regressions = {n: data for n, data in datasets.items() if data.task.kind == "regression"}

    def draw(_figure: pages.Figure, panels: list[pages.Axes]) -> None:
        for axes, (name, data) in zip(panels, regressions.items(), strict=True):
            low, high = data.task.low, data.task.high
            ends = (low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes.plot(ends, ends, color="0.7", linewidth=1)
            assert data.labels is not None  # the data is a run's dev data
            found = predicted_values(data.task, outputs[name])
            axes.scatter(data.labels, found, s=8, alpha=0.4, linewidths=0)
            axes.set(xlabel="label", ylabel="prediction", xlim=ends, ylim=ends, box_aspect=1)
            axes.set_title(name)

    return pages.plot(folder, "predictions", len(regressions), draw) if regressions else None


def _confusion_table(data: TaskData, outputs: np.ndarray) -> pages.Block | None:
    """How many examples of a classification have each label (rows) and prediction (columns)."""
    names, kind = data.task.labels, data.task.kind
    if kind != "classification" or len(names) > MOST_CLASSES or data.labels is None:
        return None
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (data.labels.astype(int), predicted_values(data.task, outputs)), 1)
    rows = zip(names, counts.tolist(), strict=True)
    header = [f"{data.task.name}: label", *(f"predicted {name}" for name in names)]
    return pages.table(header, ([name, *(f"{n:,}" for n in row)] for name, row in rows))
