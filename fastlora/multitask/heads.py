"""Task heads: from the mean-pooled states of an example's sentences to its outputs.

The output for a classification is a logit for each class. For a regression it is the position of
the value in the task's range: 0 is `task.low`, 1 is `task.high`. No head sees the labels' unit.
Shapes at line ends: n examples of one task, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.data.tasks import Task
from fastlora.kernels import Dropout

# The standard deviation of values that are spread evenly from 0 to 1.
SPREAD = 12**-0.5
EPSILON = 1e-12  # of a variance


class LinearHead(nn.Module):
    """A linear classifier of, or regression on, one text or a pair that the encoder reads jointly.

    A regression starts with the middle of the range for every example. The states are normalised
    by LayerNorm, which `fastlora export` can write as a layer of BERT.
    """

    def __init__(self, hidden: int, task: Task, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(hidden, task.outputs)
        self.offset, self.factor = 0.0, 1.0
        if task.kind == "regression":
            # So the linear layer's targets have a variance of 1, which suits AdamW's step size.
            self.offset, self.factor = 0.5, SPREAD
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, u: Tensor) -> Tensor:
        """[n, H] -> [n, outputs]."""
        states = F.layer_norm(u, u.shape[-1:], eps=EPSILON)
        return self.offset + self.factor * self.linear(self.dropout(states))


class PairHead(nn.Module):
    """A linear classifier on |u - v|, u * v and their cosine (Reimers & Gurevych 2019)."""

    def __init__(self, hidden: int, task: Task, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(2 * hidden + 1, task.outputs)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Two [n, H] -> [n, classes]."""
        features, cosine = pair_features(u, v)
        return self.linear(torch.cat((self.dropout(features), cosine), -1))


class SimilarityHead(nn.Module):
    """A regression on two sentences whose output starts as their cosine."""

    def __init__(self, hidden: int, task: Task, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.slope = nn.Parameter(torch.tensor(1.0))
        self.linear = nn.Linear(2 * hidden, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Two [n, H] -> [n, 1]."""
        features, cosine = pair_features(u, v)
        # Scaled to a norm of about 1, because with a mean square of 1 one AdamW step on 2H weights
        # moves the output across the whole range.
        features = features / features.shape[-1] ** 0.5
        return self.slope * cosine + self.linear(self.dropout(features))


def head_class(task: Task, pairs: str) -> type[nn.Module]:
    """The kind of head of a task whose pairs are encoded "separate" or "joint"."""
    if not task.is_pair or pairs == "joint":
        return LinearHead
    return SimilarityHead if task.kind == "regression" else PairHead


def pair_features(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[|u - v|, u * v] of the normalised states [n, 2H], and their cosine [n, 1]."""
    # With a mean square of 1, so that a head learns equally fast on any encoder.
    u, v = (F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 for x in (u, v))
    product = u * v
    return torch.cat(((u - v).abs(), product), -1), product.mean(-1, keepdim=True)
