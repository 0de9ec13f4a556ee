"""Every smaller rank of a trained adapter without training: truncations of B A, scored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from fastlora.data import TaskData
from fastlora.evaluate import predict, scores_of
from fastlora.lora import lora_layers
from fastlora.model import MultitaskBert

RANKS = (1, 2, 4, 8, 16, 32)


def sweep(
    model: MultitaskBert, dev: Mapping[str, TaskData]
) -> dict[int, dict[str, tuple[float, float]]]:
    """Each task's score, and its standard error, with every adapter cut to each rank.

    The model's adapters end at the lowest one.
    """
    found = {}
    for rank in sorted(RANKS, reverse=True):
        truncate(model, rank)
        scores = {name: score or 0.0 for name, score in scores_of(dev, predict(model, dev)).items()}
        found[rank] = {
            name: (score, standard_error(dev[name].task.metric, score, len(dev[name])))
            for name, score in scores.items()
        }
    return found


@torch.no_grad()
def truncate(model: MultitaskBert, rank: int) -> None:
    """Replace every B A by its best approximation of a rank (Eckart & Young 1936)."""
    for layer in lora_layers(model).values():
        for name, A in layer.lora_A.items():
            B = layer.lora_B[name]
            low_A, low_B = low_rank(A, B, rank)
            A.zero_()[: len(low_A)] = low_A
            B.zero_()[:, : len(low_A)] = low_B


def low_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' [rank, in] and B' [out, rank] with B' A' nearest to B A, which is never formed."""
    Qa, Ra = torch.linalg.qr(A.T)  # [in, r], [r, r]
    Qb, Rb = torch.linalg.qr(B)  # [out, r], [r, r]
    U, S, V = torch.linalg.svd(Rb @ Ra.T)
    root = S[:rank].sqrt()
    return (root[:, None] * V[:rank]) @ Qa.T, Qb @ (U[:, :rank] * root)


def standard_error(metric: str, score: float, count: int) -> float:
    """Of an accuracy (binomial) or of Pearson's r (Fisher 1915) over `count` examples."""
    if metric == "accuracy":
        return math.sqrt(score * (1 - score) / count)
    return (1 - score**2) / math.sqrt(max(1, count - 1))


def mean_score(scores: Collection[tuple[float, float]]) -> tuple[float, float]:
    """The mean of scores, and its standard error, from theirs."""
    values, errors = zip(*scores, strict=True)
    return float(np.mean(values)), math.hypot(*errors) / len(errors)


def smallest_within_error(found: Mapping[int, tuple[float, float]]) -> int:
    """The smallest rank whose score is within one standard error of the best."""
    best, error = max(found.values())
    return min(rank for rank, (score, _) in found.items() if score >= best - error)
