"""Batches of mixed tasks: the seeded plan of an epoch, and the padded tensors of one batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.bert.layout import Layout
from fastlora.data.reading import TaskData
from fastlora.data.tasks import Task, sampling_exponent
from fastlora.data.tokenizer import Encoded

# Examples are sorted by length inside windows of about this many batches: enough that a batch
# holds similar lengths, few enough that an epoch stays shuffled.
WINDOW = 50


@dataclass(frozen=True)
class Span:
    """The rows of one task in a batch: `start` to `start + count * width`.

    With width 2, the first `count` rows are the first sentences and the next `count` rows the
    second sentences of the same examples. `tokens` is (start, stop) among the real tokens.
    """

    task: str
    start: int
    count: int
    width: int
    tokens: tuple[int, int]

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.count * self.width


@dataclass(frozen=True)
class Batch:
    """The examples of one step: the B sequences of all tasks, padded to the longest of them, S.

    `input_ids` and `token_type_ids` are int64 [B, S], `attention_mask` is bool [B, S]. `labels`
    maps a task to int64 [n] (classes), float32 [n, classes] (multilabel: 0 or 1) or float32 [n]
    (values, scaled from the task's range to 0 to 1); `indices` maps it to the indices of its n
    examples in their TaskData. A batch of `collate(..., max_length)` also has `rows`, int64 [R]:
    the spans then are ranges of `rows`, which holds rows of the tensors. Its `real` maps a task
    to float32 [n]: 1 for an example, 0 for one added to reach a common number of examples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    layout: Layout
    spans: tuple[Span, ...]
    labels: dict[str, Tensor]
    indices: dict[str, np.ndarray]
    rows: Tensor | None = None
    real: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """The tensors that `to` copies."""
        values = (*vars(self).values(), self.layout.index, self.layout.mask)
        values += (*self.labels.values(), *self.real.values())
        return [value for value in values if isinstance(value, Tensor)]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; where possible, return before the copy is complete."""

        def copy(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: copy(item) for key, item in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**copy(vars(self) | {"layout": self.layout.to(device)}))


def plan_epoch(
    datasets: Mapping[str, TaskData],
    tokens_per_batch: int,
    seed: int,
    epoch: int,
    sampling: str = "proportional",
) -> list[np.ndarray]:
    """Plan the batches of one epoch: an int64 array [n, 2] each, of rows (task index, example).

    The plan is a function of its arguments alone, so a resumed run only has to know the epoch and
    the position in it. A batch mixes tasks, has examples of similar lengths, and holds at most
    `tokens_per_batch` real tokens, or one longer example. An epoch has as many examples as all
    tasks together. A task's share of them follows from `sampling` (see `sampling_exponent`) and the
    task's `weight`. A task that has fewer examples than its share repeats them.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    sizes = np.array([len(data) for data in datasets.values()])
    picks = []
    factors = np.array([data.task.weight for data in datasets.values()])
    for size, share in zip(sizes, _shares(sizes, sampling, factors), strict=True):
        rounds = [rng.permutation(size) for _ in range(-(-share // size) or 1)]
        picks.append(np.concatenate(rounds)[:share])
    pool = rng.permutation(_pool(datasets, picks))
    _, _, tokens, longest = pool.T
    window = np.cumsum(tokens) // (tokens_per_batch * WINDOW)
    # Lengths rise in one window and fall in the next, so that they are also similar in a batch
    # across the border of two windows.
    order = np.lexsort((np.where(window % 2, -longest, longest), window))
    plan = list(_cut(pool[order], tokens_per_batch))
    return [plan[i] for i in rng.permutation(len(plan))]


def eval_batches(datasets: Mapping[str, TaskData], tokens_per_batch: int) -> Iterator[Batch]:
    """Yield every example once, the shortest first; `Batch.indices` says which ones a batch has."""
    pool = _pool(datasets, [np.arange(len(data)) for data in datasets.values()])
    for part in _cut(pool[np.argsort(pool[:, 3], kind="stable")], tokens_per_batch):
        yield collate(datasets, part)


def collate(
    datasets: Mapping[str, TaskData], plan_batch: np.ndarray, max_length: int | None = None
) -> Batch:
    """Gather the planned examples ([n, 2], as `plan_epoch` gives them) into one Batch.

    With `max_length`, the length of the longest sequence that the encoder takes, batches come in
    few shapes, because a CUDA graph is captured for each: sequences that belong to no task and
    examples that do not count are added (see `Batch`).
    """
    spans: list[Span] = []
    sequences: list[Encoded] = []
    labels: dict[str, Tensor] = {}
    indices: dict[str, np.ndarray] = {}
    rows = tokens = 0
    for index, (name, data) in enumerate(datasets.items()):
        examples = plan_batch[plan_batch[:, 0] == index, 1]
        if not len(examples):
            continue
        columns = [column.take(examples) for column in data.columns]
        last = tokens + sum(len(column.ids) for column in columns)
        spans.append(Span(name, rows, len(examples), len(columns), (tokens, last)))
        rows, tokens = spans[-1].stop, last
        sequences += columns
        indices[name] = examples
        if data.labels is not None:
            labels[name] = _targets(data.task, data.labels[examples])
    longest = max(column.lengths.max() for column in sequences)
    if max_length:
        longest = min(max_length, 32 * math.ceil(longest / 32))
        added = _round_up(rows + 1, 4) - rows
        while (rows + added) * longest < _round_up(tokens + added, 16):
            added = _round_up(rows + added + 1, 4) - rows
        # The added sequences have one token each, because a mean of no tokens is not defined.
        zeros = np.zeros(added, np.int8)
        sequences.append(Encoded(zeros, np.arange(added + 1), zeros, 0))
    lengths = np.concatenate([column.lengths for column in sequences])
    mask = np.arange(longest) < lengths[:, None]
    # Padding is masked everywhere, so its id does not matter, as long as the vocabulary has it.
    padded = np.zeros((2, *mask.shape), np.int64)
    padded[0][mask] = np.concatenate([column.ids for column in sequences])
    padded[1][mask] = np.concatenate([column.types for column in sequences])
    ids, types, real = *torch.from_numpy(padded), torch.from_numpy(mask)
    # oneDNN compiles a kernel for each number of tokens (3 ms, bf16); round ones are also faster.
    layout = Layout.of(real, real.shape, _round_up(int(lengths.sum()), 16))
    batch = Batch(ids, real, types, layout, tuple(spans), labels, indices)
    return _with_common_counts(batch) if max_length else batch


def _targets(task: Task, labels: np.ndarray) -> Tensor:
    """Labels [n] in the form of `Batch.labels`."""
    if task.kind == "regression":
        # In fp64, because fp32 rounds labels that are large compared to their range, such as dates.
        labels = (labels.astype(np.float64) - task.low) / (task.high - task.low)
    dtype = torch.int64 if task.kind == "classification" else torch.float32
    return torch.from_numpy(labels).to(dtype)


def _with_common_counts(batch: Batch) -> Batch:
    """Pad each task of a batch to as many examples as its B sequences can hold."""
    spans: list[Span] = []
    rows, labels, real = [], {}, {}
    for span in batch.spans:
        most = len(batch.input_ids) // span.width
        spans.append(replace(span, start=spans[-1].stop if spans else 0, count=most))
        block_rows = torch.arange(span.start, span.stop).view(span.width, span.count)
        missing = 0, most - span.count
        rows.append(F.pad(block_rows, missing).flatten())
        real[span.task] = F.pad(torch.ones(span.count), missing)
        known = batch.labels[span.task]
        labels[span.task] = F.pad(known, (0, 0) * (known.dim() - 1) + missing)
    return replace(batch, spans=tuple(spans), rows=torch.cat(rows), labels=labels, real=real)


def _round_up(number: int, steps: int) -> int:
    """Round `number` up to one of `steps` evenly spaced numbers from a power of 2 to the next."""
    step = max(1, 2 ** (number.bit_length() - 1) // steps)
    return step * math.ceil(number / step)


def subset(data: TaskData, examples: np.ndarray) -> TaskData:
    """The examples of a dataset with these indices [n]."""
    columns = tuple(column.take(examples) for column in data.columns)
    labels = None if data.labels is None else data.labels[examples]
    return replace(data, columns=columns, labels=labels, ids=[data.ids[i] for i in examples])


def _shares(sizes: np.ndarray, sampling: str, factors: np.ndarray | float = 1.0) -> np.ndarray:
    """Divide sizes.sum() examples among the tasks, their shares multiplied by factors [tasks]."""
    weights = factors * (sizes / sizes.max()) ** sampling_exponent(sampling)
    ends = np.cumsum(weights)
    # The cumulative sums are rounded, so that the shares add up to the sum of the sizes.
    return np.diff(np.round(sizes.sum() * ends / ends[-1]), prepend=0).astype(np.int64)


def _pool(datasets: Mapping[str, TaskData], picks: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [N, 4]: task index, example, its tokens, and those of its longest sequence."""
    parts = []
    for index, (data, examples) in enumerate(zip(datasets.values(), picks, strict=True)):
        lengths = np.stack([column.lengths[examples] for column in data.columns])
        task = np.full(len(examples), index)
        parts.append(np.stack([task, examples, lengths.sum(0), lengths.max(0)], axis=1))
    return np.concatenate(parts)


def _cut(pool: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Cut `_pool` rows into batches [n, 2] of at most `most` tokens, or one longer example."""
    ends, start = np.cumsum(pool[:, 2]), 0
    while start < len(pool):
        before = ends[start] - pool[start, 2]
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield pool[start:stop, :2]
        start = stop
