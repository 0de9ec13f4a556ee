"""Predictions and scores as functions of arrays: a model's outputs, labels, and their task.

Labels and predictions are [N], class indices or values; those of a multilabel task are [N, C], 0 or
1 for each class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora.console import format_score
from fastlora.data.tasks import METRICS, Task


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one text or pair.

    For a classification, `label` is the most probable class, `score` is its probability, and
    `probabilities` has the probability of each class, the highest first. For a task of several
    labels, `label` has all that are predicted, as "a|b", and `score` is the highest probability.
    For a regression, `label` is None, `score` is the value in the labels' unit, and `probabilities`
    is empty.
    """

    label: str | None
    score: float
    probabilities: dict[str, float]


def predictions_from(task: Task, outputs: np.ndarray) -> list[Prediction]:
    """The predictions of N examples, from outputs [N, outputs] as `predicted_values` takes them."""
    values = predicted_values(task, outputs)
    if task.kind == "regression":
        return [Prediction(None, value, {}) for value in values.tolist()]
    logits = outputs.astype(np.float64)
    shares = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    if task.kind == "multilabel":
        shares = np.exp(-np.logaddexp(0, -logits))
    order = np.argsort(-logits, axis=-1, kind="stable").tolist()
    found = []
    for label, share, ranks in zip(label_texts(task, values), shares.tolist(), order, strict=True):
        ranked = {task.labels[index]: share[index] for index in ranks}
        found.append(Prediction(label, share[ranks[0]], ranked))
    return found


def predicted_values(task: Task, outputs: np.ndarray) -> np.ndarray:
    """What is predicted from outputs [N, outputs]; values are clipped to the task's range.

    The outputs are those of `predict`: class logits, or values in the labels' unit.
    """
    if task.kind == "regression":
        return outputs[:, 0].clip(task.low, task.high)
    if task.kind == "multilabel":
        return (outputs >= 0).astype(np.float64)  # a probability of at least 0.5
    return outputs.argmax(-1)


def label_texts(task: Task, values: Iterable[Any]) -> list[str]:
    """Labels or predictions as text: a class's name, names as "a|b", or a number.

    A number has four decimals, or more where the task's range is shorter than 1.
    """
    if task.kind == "classification":
        return [task.labels[int(value)] for value in values]
    if task.kind == "multilabel":
        return ["|".join(task.labels[i] for i in row.nonzero()[0]) for row in values]
    decimals = max(4, 4 - math.floor(math.log10(task.high - task.low)))
    return [f"{value:.{decimals}f}" for value in values]


def score(task: Task, outputs: np.ndarray, labels: np.ndarray | None) -> float | None:
    """The task's metric of outputs [N, outputs]; None where it is not defined."""
    return metrics(task, outputs, labels).get(task.metric)


def metrics(task: Task, outputs: np.ndarray, labels: np.ndarray | None) -> dict[str, float | None]:
    """All metrics that fit the task, of outputs [N, outputs], by name, the task's own first.

    There are none without labels, and where an output is not finite. A metric that is not defined
    is None ("n/a"): a correlation of fewer than two examples, or where all predictions or all
    labels are equal, or the F1 of a class that is neither in the labels nor predicted.
    """
    if labels is None or not np.isfinite(outputs).all():
        return {}
    predictions, n = predicted_values(task, outputs), float(len(labels))
    if task.kind == "regression":
        # As shares of the range, for large values are rounded, and squares of small ones are 0.
        sides = [(values - task.low) / (task.high - task.low) for values in (predictions, labels)]
        found = {"pearson": _correlation(*sides), "spearman": _correlation(*map(_ranks, sides))}
    else:
        examples, predicted, hits = _counts(task, predictions, labels)
        each = [_ratio(2 * h, e + p) for h, e, p in zip(hits, examples, predicted, strict=True)]
        defined = [value for value in each if value is not None]
        # Matthews as for several classes (Gorodkin 2004).
        square = (n**2 - predicted @ predicted) * (n**2 - examples @ examples)
        found = {
            "accuracy": _ratio(hits.sum(), n),
            "macro_f1": _ratio(sum(defined), len(defined)),
            "micro_f1": _ratio(2 * hits.sum(), examples.sum() + predicted.sum()),
            "matthews": _ratio(hits.sum() * n - predicted @ examples, max(square, 0) ** 0.5),
            **{f"f1:{name}": value for name, value in zip(task.labels, each, strict=True)},
        }
    fitting = (task.metric, *METRICS[task.kind], *(n for n in found if n.startswith("f1:")))
    return {name: found[name] for name in dict.fromkeys(fitting)}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _counts(task: Task, predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """By class: its examples, its predictions, and those that agree, fp64 [C] each."""
    if task.kind == "multilabel":
        return labels.sum(0), predictions.sum(0), (labels * predictions).sum(0)
    groups = labels, predictions, labels[labels == predictions]
    count = len(task.labels)
    return tuple(np.bincount(g.astype(int), minlength=count).astype(float) for g in groups)


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays [N]."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """The ranks of values [N]; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def class_table(
    task: Task, outputs: np.ndarray, labels: np.ndarray
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a task's classes: precision, recall, F1 and examples."""
    counts = _counts(task, predicted_values(task, outputs), labels)
    rows = []
    for name, e, p, h in zip(task.labels, *counts, strict=True):
        figures = _ratio(h, p), _ratio(h, e), _ratio(2 * h, e + p)
        rows.append([name, f"{e:,.0f}", *map(format_score, figures)])
    return [f"{task.name}: class", "examples", "precision", "recall", "F1"], rows


def majority(task: Task, labels: np.ndarray | None) -> dict[str, float | None]:
    """The metrics of always predicting the most frequent class; none for a regression.

    Of a multilabel task, those of always predicting the classes that most examples have.
    """
    if task.kind == "regression" or labels is None:
        return {}
    constant = labels.mean(0) - 0.5  # of a multilabel task
    if task.kind == "classification":
        constant = np.bincount(labels.astype(int), minlength=len(task.labels))
    return metrics(task, np.broadcast_to(constant, (len(labels), len(constant))), labels)


def class_weights(task: Task, labels: np.ndarray | None) -> np.ndarray | None:
    """The weights of a task's classes in its loss, fp32 [C], from its training labels [N].

    "auto" weighs a class by N / (C n), n being its examples; a class that a table does not name has
    weight 1. Their mean over the examples is 1, so that the learning rate need not change. None if
    the task has no weights.
    """
    given = task.class_weights
    if not given or labels is None:
        return None
    counts = np.bincount(labels.astype(int), minlength=len(task.labels))
    weights = 1 / np.maximum(counts, 1)
    if isinstance(given, Mapping):
        by_class = {task.class_of(name): weight for name, weight in given.items()}
        weights = np.array([by_class.get(index, 1.0) for index in range(len(counts))])
    return (weights * counts.sum() / (weights @ counts)).astype(np.float32)
