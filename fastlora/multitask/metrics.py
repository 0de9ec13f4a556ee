"""Predictions and scores as functions of arrays: a model's outputs, labels, and their task."""

from __future__ import annotations

import math

import numpy as np

from fastlora.data.tasks import Task


def predicted_values(task: Task, outputs: np.ndarray) -> np.ndarray:
    """What is predicted: [N, outputs] -> [N], class indices or values clipped to the task's range.

    The outputs are those of `predict`: class logits, or values in the labels' unit.
    """
    if task.kind == "classification":
        return outputs.argmax(-1)
    return outputs[:, 0].clip(task.low, task.high)


def label_texts(task: Task, values: np.ndarray) -> list[str]:
    """Labels or predictions [N] as text: a class's name, or a number.

    A number has four decimals, or more where the task's range is shorter than 1.
    """
    if task.kind == "classification":
        return [task.labels[int(value)] for value in values]
    decimals = max(4, 4 - math.floor(math.log10(task.high - task.low)))
    return [f"{value:.{decimals}f}" for value in values]


def score(task: Task, outputs: np.ndarray, labels: np.ndarray | None) -> float | None:
    """The accuracy of the predictions [N], or their Pearson correlation with the labels [N].

    None ("n/a") without labels, where an output is not finite, and where a correlation is not
    defined: for fewer than two examples, and where all predictions or all labels are equal.
    """
    if labels is None or not np.isfinite(outputs).all():
        return None
    predictions = predicted_values(task, outputs)
    if task.kind == "classification":
        return float((predictions == labels).mean())
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return None
    # From `low`: the means of values that are large against their range would be rounded.
    return float(np.corrcoef(predictions - task.low, labels - task.low)[0, 1])


def majority(task: Task, labels: np.ndarray | None) -> float | None:
    """The accuracy of always predicting the most frequent class; None for a regression."""
    if task.kind != "classification" or labels is None:
        return None
    return float(np.bincount(labels.astype(int)).max() / len(labels))
