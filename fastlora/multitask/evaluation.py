"""Outputs, scores and prediction files of a trained model."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora.console import number
from fastlora.data.batches import Batch, eval_batches
from fastlora.data.reading import TaskData
from fastlora.data.tasks import Task
from fastlora.devices import memory_errors
from fastlora.files import atomic_open
from fastlora.multitask.model import MultitaskBert

EVAL_TOKENS = 4096


class Features:
    """A frozen encoder's pooled states of whole datasets: the same in every epoch, so kept."""

    def __init__(self, model: MultitaskBert, datasets: Mapping[str, TaskData]) -> None:
        hidden = model.encoder.config.hidden_size
        self.states = {n: torch.empty(len(d.columns), len(d), hidden) for n, d in datasets.items()}
        device = next(model.parameters()).device
        with torch.inference_mode():
            for batch in eval_batches(datasets, EVAL_TOKENS):
                pooled = model.eval().embed(batch.to(device)).cpu()
                for span in batch.spans:
                    rows = pooled[span.start : span.stop].view(span.width, span.count, hidden)
                    self.states[span.task][:, batch.indices[span.task]] = rows

    def __call__(self, batch: Batch) -> Tensor:
        """The pooled states [B, H] of a batch's sentences, on the batch's device."""
        rows = [self.states[s.task][:, batch.indices[s.task]].flatten(0, 1) for s in batch.spans]
        return torch.cat(rows).to(batch.input_ids.device)


@torch.inference_mode()
def predict(
    model: MultitaskBert, datasets: Mapping[str, TaskData], features: Features | None = None
) -> dict[str, np.ndarray]:
    """Each task's outputs, fp32 [N, outputs], in its examples' order; RunError without memory."""
    model.eval()
    device = next(model.parameters()).device
    outputs = {n: np.empty((len(d), d.task.outputs), np.float32) for n, d in datasets.items()}
    advice = f"it takes {EVAL_TOKENS:,} tokens at a time: free memory or use another --device"
    with memory_errors(device, advice):
        for batch in eval_batches(datasets, EVAL_TOKENS):
            on_device = batch.to(device)
            for name, scores in model(on_device, features and features(on_device)).items():
                outputs[name][batch.indices[name]] = scores.float().cpu().numpy()
    return outputs


def labels_of(task: Task, outputs: np.ndarray) -> np.ndarray:
    """[N, outputs] -> [N]: the class index of the largest score, or the value clipped to range."""
    if task.kind == "classification":
        return outputs.argmax(-1)
    return outputs[:, 0].clip(task.low, task.high)


def score(task: Task, outputs: np.ndarray, labels: np.ndarray) -> float | None:
    """Accuracy, or Pearson's correlation; None ("n/a") where that is not defined."""
    if not np.isfinite(outputs).all():
        return None
    if task.kind == "classification":
        return float((labels_of(task, outputs) == labels).mean())
    found = outputs[:, 0].astype(np.float64)
    # Pearson's r is 0/0 when either side is constant.
    if len(found) < 2 or np.ptp(found) == 0 or np.ptp(labels) == 0:
        return None
    return float(np.corrcoef(found, labels.astype(np.float64))[0, 1])


def majority(data: TaskData) -> float | None:
    """The score of always answering the commonest class; None for a regression."""
    if data.task.kind != "classification" or data.labels is None:
        return None
    return float(np.bincount(data.labels.astype(int)).max() / len(data))


def scores_of(
    datasets: Mapping[str, TaskData], outputs: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Each labelled task's score."""
    return {
        name: score(data.task, outputs[name], data.labels)
        for name, data in datasets.items()
        if data.labels is not None
    }


def score_table(
    datasets: Mapping[str, TaskData], outputs: Mapping[str, np.ndarray], split: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores."""
    scores = scores_of(datasets, outputs)
    rows = [
        [name, d.task.metric, number(scores.get(name)), number(majority(d)), f"{len(d):,}"]
        for name, d in datasets.items()
    ]
    return ["task", "metric", split, "majority class", "examples"], rows


def write_predictions(path: Path, data: TaskData, outputs: np.ndarray) -> None:
    """A CSV of id, prediction and, where known, label; the file appears whole or not at all."""
    header, columns = ["id", "prediction"], [data.ids, answers(data.task, outputs)]
    if data.labels is not None:
        header.append(data.task.label)
        columns.append(_names(data.task, data.labels))
    write_rows(path, header, zip(*columns, strict=True))


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV that appears whole or not at all."""
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def answers(task: Task, outputs: np.ndarray) -> list[str]:
    """Outputs [N, outputs] in words: a class's name, or a number."""
    return _names(task, labels_of(task, outputs))


def _names(task: Task, values: np.ndarray) -> list[str]:
    if task.kind == "classification":
        return [task.labels[int(value)] for value in values]
    return [f"{value:.4f}" for value in values]
