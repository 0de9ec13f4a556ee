"""Predictions of a model for whole datasets, the table of their scores, and their files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora.console import format_score
from fastlora.data.batches import Batch, eval_batches
from fastlora.data.reading import TaskData
from fastlora.devices import memory_errors, usual_modes
from fastlora.errors import RunError
from fastlora.files import atomic_open
from fastlora.multitask import metrics as scoring
from fastlora.multitask.heads import SimilarityHead
from fastlora.multitask.model import MultitaskBert

EVAL_TOKENS = 4096


class Features:
    """The pooled states of whole datasets: a frozen encoder computes them once for all epochs."""

    def __init__(
        self, model: MultitaskBert, datasets: Mapping[str, TaskData], adapted: bool = True
    ) -> None:
        hidden = model.encoder.config.hidden_size
        self.states = {n: torch.empty(len(d.columns), len(d), hidden) for n, d in datasets.items()}
        device = next(model.parameters()).device
        with torch.inference_mode():
            for batch in eval_batches(datasets, EVAL_TOKENS):
                pooled = model.eval().embed(batch.to(device), adapted).cpu()
                for span in batch.spans:
                    rows = pooled[span.start : span.stop].view(span.width, span.count, hidden)
                    self.states[span.task][:, batch.indices[span.task]] = rows

    def __call__(self, batch: Batch) -> Tensor:
        """The pooled states [B, H] of a batch's sentences, on the batch's device."""
        rows = [self.states[s.task][:, batch.indices[s.task]].flatten(0, 1) for s in batch.spans]
        return torch.cat(rows).to(batch.input_ids.device)


@usual_modes()
@torch.inference_mode()
def predict(
    model: MultitaskBert, datasets: Mapping[str, TaskData], features: Features | None = None
) -> dict[str, np.ndarray]:
    """Each task's outputs [N, outputs], in its examples' order.

    They are class logits (fp32), or a regression's values in the labels' unit (fp64), which are not
    clipped to the range. Raises RunError where memory does not suffice.
    """
    model.eval()
    device = next(model.parameters()).device
    outputs: dict[str, np.ndarray] = {
        name: np.empty((len(d), d.task.outputs), np.float32) for name, d in datasets.items()
    }
    advice = f"it takes {EVAL_TOKENS:,} tokens at a time: free memory or use another --device"
    with memory_errors(device, advice):
        for batch in eval_batches(datasets, EVAL_TOKENS):
            on_device = batch.to(device)
            for name, values in model(on_device, features and features(on_device)).items():
                outputs[name][batch.indices[name]] = values.float().cpu().numpy()
    for name, data in datasets.items():
        if data.task.kind == "regression":
            width = data.task.high - data.task.low
            outputs[name] = data.task.low + width * outputs[name].astype(np.float64)
    return outputs


def check_finite(data: TaskData, outputs: np.ndarray) -> None:
    """Raise RunError for an example whose outputs [N, outputs] hold NaN or infinity."""
    broken = ~np.isfinite(outputs).all(-1)  # [N]
    if broken.any():
        example, count = data.ids[broken.argmax()], f"{broken.sum():,} of {len(data):,}"
        what = f"task {data.task.name!r}, example {example!r}: there is no prediction, because"
        why = f"the outputs of {count} examples are not finite"
        raise RunError(f"{what} {why}; train again with a lower --lr")


def predictions(
    model: MultitaskBert, datasets: Mapping[str, TaskData]
) -> dict[str, list[scoring.Prediction]]:
    """Each task's predictions, in its examples' order; RunError where an output is not finite."""
    outputs = predict(model, datasets)
    for name, data in datasets.items():
        check_finite(data, outputs[name])
    return {n: scoring.predictions_from(d.task, outputs[n]) for n, d in datasets.items()}


def scores_of(
    datasets: Mapping[str, TaskData], outputs: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Each task's score."""
    return {n: scoring.score(d.task, outputs[n], d.labels) for n, d in datasets.items()}


def untouched_metrics(
    model: MultitaskBert, datasets: Mapping[str, TaskData]
) -> dict[str, dict[str, float | None]]:
    """Each task's metrics of the encoder without its adapters, by the cosine of two sentences.

    Only a regression on sentences encoded apart has them, in a model with adapters.
    """
    pairs = {n: data for n, data in datasets.items() if isinstance(model.heads[n], SimilarityHead)}
    found: dict[str, dict[str, float | None]] = {name: {} for name in datasets}
    states = Features(model, pairs, adapted=False).states if pairs and model.settings else {}
    for name, (u, v) in states.items():
        task, cosines = pairs[name].task, torch.cosine_similarity(u, v, dim=-1)
        outputs = task.low + (task.high - task.low) * cosines.double().unsqueeze(1)
        found[name] = scoring.metrics(task, outputs.numpy(), pairs[name].labels)
    return found


def score_table(
    model: MultitaskBert,
    datasets: Mapping[str, TaskData],
    outputs: Mapping[str, np.ndarray],
    split: str,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores; RunError where an output is not finite.

    A task has a row for each metric that fits it, its own first, but not for each class. Beside it
    are those of simpler predictions: the most frequent class, and the encoder as it was before
    training.
    """
    for name, data in datasets.items():
        check_finite(data, outputs[name])
    untouched, rows = untouched_metrics(model, datasets), []
    for name, data in datasets.items():
        task, constant = data.task, scoring.majority(data.task, data.labels)
        found = scoring.metrics(task, outputs[name], data.labels) or {task.metric: None}
        for metric in found:
            if metric == task.metric or not metric.startswith("f1:"):
                figures = (values.get(metric) for values in (found, constant, untouched[name]))
                rows.append([name, metric, *map(format_score, figures), f"{len(data):,}"])
    return ["task", "metric", split, "majority class", "untouched encoder", "examples"], rows


def class_tables(
    datasets: Mapping[str, TaskData], outputs: Mapping[str, np.ndarray], every: bool = False
) -> list[tuple[list[str], list[list[str]]]]:
    """Tables by class (header, rows), of tasks with three or weighted classes, or of `every`."""
    least = 1 if every else 3
    return [
        scoring.class_table(data.task, outputs[name], data.labels)
        for name, data in datasets.items()
        if data.labels is not None and (len(data.task.labels) >= least or data.task.class_weights)
    ]


def write_predictions(path: Path, data: TaskData, outputs: np.ndarray) -> None:
    """Write a CSV of id, prediction and, where known, label; RunError as `check_finite`."""
    check_finite(data, outputs)
    found = scoring.label_texts(data.task, scoring.predicted_values(data.task, outputs))
    header, columns = ["id", "prediction"], [data.ids, found]
    if data.labels is not None:
        header.append(data.task.label)
        columns.append(scoring.label_texts(data.task, data.labels))
    write_rows(path, header, zip(*columns, strict=True))


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV that appears only when it is complete."""
    with atomic_open(path) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
