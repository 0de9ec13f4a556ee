"""The score of a trained adapter at every smaller rank, by truncating the update B A."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from fastlora.data.reading import TaskData
from fastlora.lora.layer import lora_layers
from fastlora.multitask.metrics import score
from fastlora.multitask.model import MultitaskBert
from fastlora.multitask.predictor import predict

RANKS = (1, 2, 4, 8, 16, 32)
RESAMPLES = 200


def scores_by_rank(
    model: MultitaskBert, dev: Mapping[str, TaskData], ranks: Collection[int] = RANKS
) -> dict[int, tuple[float, float]]:
    """The mean score of the tasks, and its error, with all adapters truncated to each rank.

    The error is the standard error of the difference from the best rank's score (paired bootstrap
    over the examples, Efron & Tibshirani 1993). The adapters keep the lowest rank.
    """
    ordered, rng, outputs = sorted(ranks, reverse=True), np.random.default_rng(0), []
    for rank in ordered:
        truncate(model, rank)
        outputs.append(predict(model, dev))
    draws = []  # the mean scores [ranks] on all examples, then on resampled ones
    for draw in range(1 + RESAMPLES):
        by_task = []
        for name, data in dev.items():
            rows = rng.integers(len(data), size=len(data)) if draw else np.arange(len(data))
            labels = data.labels[rows] if data.labels is not None else None
            by_task.append([score(data.task, o[name][rows], labels) or 0.0 for o in outputs])
        draws.append(np.mean(by_task, axis=0))
    scores, *resampled = draws
    errors = np.std([draw[scores.argmax()] - draw for draw in resampled], axis=0)
    return dict(zip(ordered, zip(scores.tolist(), errors.tolist(), strict=True), strict=True))


@torch.no_grad()
def truncate(model: MultitaskBert, rank: int) -> None:
    """Replace each adapter's B A by its best approximation of rank `rank` (Eckart & Young 1936)."""
    for layer in lora_layers(model).values():
        for name in layer.settings:
            A, B = layer.lora_A[name], layer.lora_B[name]
            low_A, low_B = low_rank(A, B, rank)
            A.zero_()[: len(low_A)] = low_A
            B.zero_()[:, : len(low_A)] = low_B


def low_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' [rank, in] and B' [out, rank] whose product is nearest to B A, without forming B A."""
    Qa, Ra = torch.linalg.qr(A.T)  # [in, r], [r, r]
    Qb, Rb = torch.linalg.qr(B)  # [out, r], [r, r]
    U, S, V = torch.linalg.svd(Rb @ Ra.T)
    root = S[:rank].sqrt()
    return (root[:, None] * V[:rank]) @ Qa.T, Qb @ (U[:, :rank] * root)


def smallest_within_error(scores: Mapping[int, tuple[float, float]]) -> int:
    """The smallest rank whose score differs from the best by at most its error."""
    best = max(score for score, _ in scores.values())
    return min(rank for rank, (score, error) in scores.items() if score >= best - error)
