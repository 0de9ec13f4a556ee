"""The report of a finished run and its model card, from the files in the run's folder."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit
import torch
from torch import Tensor

from fastlora.console import number
from fastlora.data.tasks import Task
from fastlora.files import atomic_open, read_json, read_toml
from fastlora.lora.config import LoraConfig, is_target
from fastlora.lora.files import read_config
from fastlora.lora.layer import DEFAULT
from fastlora.multitask.files import adapter_names, adapter_place, read_heads
from fastlora.runs import pages
from fastlora.tensors import read_tensors

MODES = {"lora": "LoRA on", "frozen": "Heads on the frozen", "full": "Full fine-tuning of"}
A_KEY = re.compile(r"base_model\.model\.encoder\.layer\.(\d+)\.(.+)\.lora_A\.weight")


class _Run:
    """The contents of a finished run's files.

    `adapters` has the settings of each adapter, and `dev_rows` the label and the prediction of each
    example of a task's dev file, as texts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.adapter = folder, folder / "adapter"
        self.name = folder.resolve().name
        self.settings = pages.without_folders(read_toml(folder / "run.toml"))
        self.environment = read_json(folder / "env.json")
        self.result = read_json(folder / "result.json")
        base = read_json(self.adapter / "heads.json")["base_model"]
        self.base = pages.without_folders(base)
        self.base_is_local = self.base != base or Path(base).is_dir()
        tasks, settings = read_heads(self.adapter)
        # The tasks of the run of --add-to were not trained in this run.
        self.tasks = {name: task for name, task in tasks.items() if name in self.result["scores"]}
        names = adapter_names(settings["adapters"], tasks) if settings["mode"] == "lora" else ()
        self.adapters: dict[str, Any] = {
            name: read_config(adapter_place(self.adapter, name)) for name in names
        }
        self.dev_rows = {}
        for name in self.tasks:
            path = folder / "predictions" / f"{name}-dev.csv"
            with path.open(encoding="utf-8", newline="") as file:
                _, *rows = csv.reader(file)
            self.dev_rows[name] = [(label, prediction) for _, prediction, label in rows]


def write_report(folder: str | Path) -> None:
    """Write report.md, report.html, plots/ and adapter/README.md in a finished run's folder.

    They are made from its other files, without the absolute paths in those. Raises UserError,
    ValueError or OSError if one of those files is missing or damaged.
    """
    run = _Run(Path(folder))
    blocks = [
        _summary(run),
        pages.heading("Dev scores"),
        pages.table(*run.result["table"]),
        *_training(run),
        *_predictions(run),
        *(block for adapter in run.adapters for block in _ranks(run, adapter)),
        pages.heading("Configuration"),
        pages.code(tomlkit.dumps(run.settings)),
        pages.heading("Environment"),
        pages.table(["name", "value"], ([k, str(v or "none")] for k, v in run.environment.items())),
    ]
    pages.write_pages(run.folder, run.name, blocks)
    with atomic_open(run.adapter / "README.md") as file:
        file.write(_model_card(run))


def throughput(result: Mapping[str, Any]) -> str:
    """The steps, examples and seconds of a run, by its result, in words."""
    speed = result["examples"] / max(result["seconds"], 1e-9)
    return (
        f"{result['steps']:,} steps, {result['examples']:,} examples in {result['seconds']:.0f} s "
        f"of training ({speed:.0f} examples/s)"
    )


def trained_share(counts: Mapping[str, int]) -> tuple[int, float]:
    """How many parameters were trained, by a `parameter_report`, and their percentage of all."""
    trained = counts["lora"] + counts["other trainable"]
    return trained, 100 * trained / (trained + counts["frozen"])


def _subject(run: _Run) -> str:
    """Which encoder and tasks were trained, and in which mode."""
    parts = [
        f"{'' if name == DEFAULT else f'{name}: '}r {s.r}, alpha {s.alpha:g}, {'/'.join(s.targets)}"
        for name, s in run.adapters.items()
    ]
    settings = f" ({'; '.join(parts)})" if parts else ""
    return f"{MODES[run.settings['mode']]} {run.base}{settings}, trained on {', '.join(run.tasks)}"


def _summary(run: _Run) -> str:
    trained, share = trained_share(run.result["parameters"])
    return (
        f"{_subject(run)}, started {run.environment['started']}. {throughput(run.result)}; "
        f"{trained:,} trainable parameters ({share:.2f}%)."
    )


def _training(run: _Run) -> Iterator[pages.Block | None]:
    history = run.result["history"]
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]

    def draw(figure: pages.Figure, panels: list[pages.Axes]) -> None:
        losses, scores = panels
        for task in run.tasks:
            of_task = [line for line in logged if task in line["loss"]]
            steps, values = [x["step"] for x in of_task], [x["loss"][task] for x in of_task]
            losses.plot(steps, values, marker="." if len(steps) < 20 else "")
            values = [math.nan if (v := x["scores"][task]) is None else v for x in history]
            scores.plot([x["epoch"] + 1 for x in history], values, marker="o", label=task)
        losses.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(0, None))
        scores.set(xlabel="epoch", ylabel="dev score", xlim=(0.5, len(history) + 0.5))
        scores.locator_params("x", integer=True, min_n_ticks=1)
        figure.legend(loc="outside right upper")

    rows = [
        [str(x["epoch"] + 1), str(x["step"]), *(number(x["scores"][t]) for t in run.tasks)]
        for x in history
    ]
    yield pages.table(["epoch", "step", *run.tasks], rows)
    yield pages.plot(run.folder, "training", 2, draw)


def _predictions(run: _Run) -> Iterator[pages.Block | None]:
    def draw(_figure: pages.Figure, panels: list[pages.Axes]) -> None:
        for axes, (name, task) in zip(panels, run.tasks.items(), strict=True):
            (_draw_confusion if task.labels else _draw_scatter)(axes, task, run.dev_rows[name])
            axes.set_title(f"{name}: {task.metric} {number(run.result['scores'][name])}")

    yield pages.heading("Dev predictions")
    yield pages.plot(run.folder, "predictions", len(run.tasks), draw)
    for name, task in run.tasks.items():
        if 0 < len(task.labels) <= 6:
            counts = Counter(run.dev_rows[name])
            rows = ([a, *(f"{counts[a, b]:,}" for b in task.labels)] for a in task.labels)
            yield pages.table([f"{name}: label", *(f"predicted {b}" for b in task.labels)], rows)


def _draw_confusion(axes: pages.Axes, task: Task, rows: list[tuple[str, str]]) -> None:
    """Draw the share of each label's examples by prediction."""
    counts, totals = Counter(rows), Counter(label for label, _ in rows)
    shares = [[counts[a, b] / max(1, totals[a]) for b in task.labels] for a in task.labels]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [a if len(a) < 10 else f"{a[:8]}\u2026" for a in task.labels]
    ticks, size = range(len(names)), min(10, 90 / len(names))
    axes.set_xticks(ticks, names, size=size, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(ticks, names, size=size)
    axes.set(xlabel="prediction", ylabel="label")


def _draw_scatter(axes: pages.Axes, task: Task, rows: list[tuple[str, str]]) -> None:
    labels, predictions = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    margin = 0.05 * (task.high - task.low)
    ends = (task.low - margin, task.high + margin)
    axes.plot(ends, ends, color="0.7", linewidth=1)
    axes.scatter(labels, predictions, s=8, alpha=0.4, linewidths=0)
    axes.set(xlabel="label", ylabel="prediction", xlim=ends, ylim=ends, box_aspect=1)


def _ranks(run: _Run, adapter: str) -> Iterator[pages.Block | None]:
    settings = run.adapters[adapter]
    spectra = _spectra(adapter_place(run.adapter, adapter), settings)
    layers = sorted({layer for layer, _ in spectra})

    yield pages.heading("Learned ranks" + ("" if adapter == DEFAULT else f": {adapter}"))
    yield (
        f"The effective rank of each update B A (r = {settings.r}): how many of its largest "
        "singular values hold 90% of their squared sum."
    )
    rows = ([str(i), *(str(_effective(spectra[i, t])) for t in settings.targets)] for i in layers)
    yield pages.table(["layer", *settings.targets], rows)


def _spectra(folder: Path, settings: LoraConfig) -> dict[tuple[int, str], Tensor]:
    """The singular values [min(r, in, out)] of each update scale B A, by layer and target.

    With the QR decompositions B = P R and A^T = Q S, they are those of the small scale R S^T.
    """
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    spectra = {}
    for key, A in tensors.items():
        if match := A_KEY.fullmatch(key):
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            R, S = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.T))
            target = next(t for t in settings.targets or () if is_target(match[2], t))
            spectra[int(match[1]), target] = settings.scale * torch.linalg.svdvals(R @ S.T)
    return spectra


def _effective(values: Tensor) -> int:
    """How many of the largest singular values hold 90% of their squared sum; 0 if all are zero."""
    energy = values.square().cumsum(0)
    return int((energy < 0.9 * energy[-1]).sum() + (energy[-1] > 0))


def _model_card(run: _Run) -> str:
    """A Hugging Face model card."""
    # Imported here because it is slow, and only the end of a run writes a card.
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # A local folder is not a model of the hub.
        base_model=None if run.base_is_local else run.base,
        library_name="peft" if run.adapters else "fastlora",
        tags=["lora", "fastlora"] if run.adapters else ["fastlora"],
    )
    return pages.render(
        "README.md",
        card_data=data.to_yaml(),
        title=run.name,
        subject=_subject(run),
        scores=pages.table(*run.result["table"]),
        folders=[adapter_place(Path("adapter"), name).as_posix() for name in run.adapters],
        settings=pages.code(tomlkit.dumps(run.settings)),
    )
