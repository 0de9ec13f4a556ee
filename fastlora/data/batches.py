"""Batches: a seeded plan of each epoch, and the padded tensors of one batch of mixed tasks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.bert.layout import Layout
from fastlora.data.reading import TaskData
from fastlora.data.tokenizer import Encoded

# Examples are sorted by length inside windows of about this many batches: enough that a batch
# holds similar lengths, few enough that an epoch stays shuffled.
WINDOW = 50


@dataclass(frozen=True)
class Span:
    """The rows of one task in a batch: `start` to `start + count * width`.

    With width 2, the first `count` rows are the first sentences and the next `count` rows the
    second sentences of the same examples. `tokens` is their range of the batch's real tokens.
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
    """One step's examples, all tasks in one [B, S] block of sequences.

    `input_ids` and `token_type_ids` are int64 [B, S], `attention_mask` is bool [B, S]. `labels`
    maps a task to int64 [n] (classes) or float32 [n] (values); `indices` maps it to the examples'
    positions in their TaskData. With `rows`, an int64 list of the block's rows, spans count in
    it, and `real` maps a task to float32 [n], 0 for an example that only fills up.
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
        block = (self.input_ids, self.attention_mask, self.token_type_ids, self.rows)
        tensors = (*block, self.layout.index, self.layout.mask)
        return [t for t in (*tensors, *self.labels.values(), *self.real.values()) if t is not None]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device, without waiting for the copy where that is possible."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            token_type_ids=self.token_type_ids.to(device, non_blocking=True),
            layout=self.layout.to(device),
            labels={t: y.to(device, non_blocking=True) for t, y in self.labels.items()},
            rows=None if self.rows is None else self.rows.to(device, non_blocking=True),
            real={t: r.to(device, non_blocking=True) for t, r in self.real.items()},
        )


def plan_epoch(
    datasets: Mapping[str, TaskData],
    tokens_per_batch: int,
    seed: int,
    epoch: int,
    sampling: str = "proportional",
    copies: int = 1,
) -> list[np.ndarray]:
    """Plan the batches of one epoch: int64 [n, 2] each, rows (task index, example).

    A pure function of its arguments, so (epoch, position) is all a resumed run has to know. A
    batch mixes tasks, is of similar lengths and holds at most `tokens_per_batch` real tokens, or
    one longer example. `sampling` shares the epoch's N examples out "proportional" to the tasks'
    sizes, to their square roots ("sqrt") or equally ("uniform"), where small tasks repeat. With
    `copies`, `datasets` holds the same tasks so many times, and a batch the same examples of each.
    """
    tasks = len(datasets) // copies
    datasets = dict(islice(datasets.items(), tasks))
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    sizes = np.array([len(data) for data in datasets.values()])
    picks = []
    for size, share in zip(sizes, _shares(sizes, sampling), strict=True):
        rounds = [rng.permutation(size) for _ in range(-(-share // size))]
        picks.append(np.concatenate(rounds)[:share])
    pool = rng.permutation(_pool(datasets, picks))
    _, _, tokens, longest = pool.T
    window = np.cumsum(tokens) // (tokens_per_batch * WINDOW)
    # Up in one window and down in the next: a batch across their border is of one length too.
    order = np.lexsort((np.where(window % 2, -longest, longest), window))
    plan = list(_cut(pool[order], tokens_per_batch))
    return [
        np.concatenate([plan[i] + (copy * tasks, 0) for copy in range(copies)])
        for i in rng.permutation(len(plan))
    ]


def eval_batches(datasets: Mapping[str, TaskData], tokens_per_batch: int) -> Iterator[Batch]:
    """Yield every example once, shortest first; `Batch.indices` says where results belong."""
    pool = _pool(datasets, [np.arange(len(data)) for data in datasets.values()])
    for part in _cut(pool[np.argsort(pool[:, 3], kind="stable")], tokens_per_batch):
        yield collate(datasets, part)


def collate(
    datasets: Mapping[str, TaskData], plan_batch: np.ndarray, positions: int | None = None
) -> Batch:
    """Gather the planned examples ([n, 2], as `plan_epoch` gives them) into one Batch.

    With an encoder's `positions`, sentences of no task and examples that are not real are added,
    so that few shapes of batches occur: CUDA graphs are made for each shape.
    """
    spans: list[Span] = []
    sequences: list[tuple[np.ndarray, ...]] = []
    labels: dict[str, Tensor] = {}
    indices: dict[str, np.ndarray] = {}
    for index, (name, data) in enumerate(datasets.items()):
        examples = plan_batch[plan_batch[:, 0] == index, 1]
        if not len(examples):
            continue
        gathered = [_gather(column, examples) for column in data.columns]
        start, first = (spans[-1].stop, spans[-1].tokens[1]) if spans else (0, 0)
        last = first + sum(len(ids) for _, ids, _ in gathered)
        spans.append(Span(name, start, len(examples), len(gathered), (first, last)))
        sequences += gathered
        indices[name] = examples
        if data.labels is not None:
            kind = np.int64 if data.task.kind == "classification" else np.float32
            labels[name] = torch.from_numpy(data.labels[examples].astype(kind))
    longest = max(lengths.max() for lengths, _, _ in sequences)
    if positions:
        longest, fill = _fill(np.concatenate([lengths for lengths, _, _ in sequences]), positions)
        zeros = np.zeros(fill.sum(), np.int8)
        sequences.append((fill, zeros, zeros))
    lengths, flat_ids, flat_types = map(np.concatenate, zip(*sequences, strict=True))
    mask = np.arange(longest) < lengths[:, None]
    # Padding is masked everywhere, so any id of the vocabulary does; 0 always is one.
    padded = np.zeros((2, *mask.shape), np.int64)
    padded[0][mask] = flat_ids
    padded[1][mask] = flat_types
    ids, types = torch.from_numpy(padded)
    real = torch.from_numpy(mask)
    # oneDNN makes a kernel for each number of tokens (3 ms, in bf16), and is faster at round ones.
    layout = Layout.of(real, real.shape, _grid(int(lengths.sum()), 16))
    batch = Batch(ids, real, types, layout, tuple(spans), labels, indices)
    return _with_room(batch) if positions else batch


def _with_room(batch: Batch) -> Batch:
    """The batch with as many examples a task as its sentences allow, those it lacks not real."""
    spans: list[Span] = []
    rows, labels, real = [], {}, {}
    for span in batch.spans:
        most = len(batch.input_ids) // span.width
        spans.append(replace(span, start=spans[-1].stop if spans else 0, count=most))
        block_rows = torch.arange(span.start, span.stop).view(span.width, span.count)
        missing = 0, most - span.count
        rows.append(F.pad(block_rows, missing).flatten())
        real[span.task] = F.pad(torch.ones(span.count), missing)
        labels[span.task] = F.pad(batch.labels[span.task], missing)
    return replace(batch, spans=tuple(spans), rows=torch.cat(rows), labels=labels, real=real)


def _fill(lengths: np.ndarray, positions: int) -> tuple[int, np.ndarray]:
    """The length of a batch's square, and those of sentences to add to it.

    Each has a token at least, for the mean over none is none, and the square has some padding.
    """
    length = min(positions, 32 * math.ceil(lengths.max() / 32))
    rows, tokens = _grid(len(lengths) + 1, 4), _grid(int(lengths.sum()) + 1, 16)
    while not (count := rows - len(lengths)) <= (rest := tokens - lengths.sum()) < count * length:
        if rest < count:
            tokens = _grid(tokens + 1, 16)
        else:
            rows = _grid(rows + 1, 4)
    return length, rest // count + (np.arange(count) < rest % count)


def _grid(number: int, steps: int) -> int:
    """`number` rounded up to one of `steps` numbers between powers of two."""
    step = max(1, 2 ** (number.bit_length() - 1) // steps)
    return step * math.ceil(number / step)


def subset(data: TaskData, examples: np.ndarray) -> TaskData:
    """The examples with these indices [n]."""
    columns = []
    for column in data.columns:
        lengths, ids, types = _gather(column, examples)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns.append(Encoded(ids, offsets, None if column.types is None else types, 0))
    labels = None if data.labels is None else data.labels[examples]
    return replace(data, columns=tuple(columns), labels=labels, ids=[data.ids[i] for i in examples])


def _gather(column: Encoded, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take n sequences: their lengths [n], and the ids and types of all their tokens."""
    ends = column.offsets[examples + 1]
    lengths = ends - column.offsets[examples]
    positions = np.arange(lengths.sum()) + np.repeat(ends - np.cumsum(lengths), lengths)
    types = np.zeros(len(positions), np.int8) if column.types is None else column.types[positions]
    return lengths, column.ids[positions], types


def _shares(sizes: np.ndarray, sampling: str) -> np.ndarray:
    """Divide sizes.sum() examples among the tasks."""
    weights = sizes ** {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}[sampling]
    ends = np.cumsum(weights)
    # The borders are rounded, not the shares: so the sum stays.
    return np.diff(np.round(sizes.sum() * ends / ends[-1]), prepend=0).astype(np.int64)


def _pool(datasets: Mapping[str, TaskData], picks: Sequence[np.ndarray]) -> np.ndarray:
    """[N, 4]: task index, example, its tokens, and those of its longest sequence."""
    parts = []
    for index, (data, examples) in enumerate(zip(datasets.values(), picks, strict=True)):
        lengths = np.stack([np.diff(column.offsets)[examples] for column in data.columns])
        task = np.full(len(examples), index)
        parts.append(np.stack([task, examples, lengths.sum(0), lengths.max(0)], axis=1))
    return np.concatenate(parts)


def _cut(pool: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Cut `_pool` rows into batches [n, 2] of at most `most` tokens, or one longer example."""
    ends = np.cumsum(pool[:, 2])
    start = 0
    while start < len(pool):
        before = ends[start] - pool[start, 2]
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield pool[start:stop, :2]
        start = stop
