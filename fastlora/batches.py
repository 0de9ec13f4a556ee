"""Batches: a seeded plan of each epoch, and the padded tensors of one batch of mixed tasks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastlora.data import TaskData

# Examples are sorted by length inside windows of about this many batches: enough that a batch
# holds similar lengths, few enough that an epoch stays shuffled.
WINDOW = 50


@dataclass(frozen=True)
class Span:
    """The rows of one task in a batch: `start` to `start + count * width`.

    With width 2, the first `count` rows are the first sentences and the next `count` rows the
    second sentences of the same examples.
    """

    task: str
    start: int
    count: int
    width: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.count * self.width


@dataclass(frozen=True)
class Batch:
    """One step's examples, all tasks in one [B, S] block of sequences.

    `input_ids` and `token_type_ids` (or None) are int64 [B, S], `attention_mask` is bool [B, S].
    `labels` maps a task to int64 [n] (classes) or float32 [n] (values); `indices` maps it to the
    examples' positions in their TaskData. `tokens` counts real tokens, padding left out.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    spans: tuple[Span, ...]
    labels: dict[str, Tensor]
    indices: dict[str, np.ndarray]
    examples: int
    tokens: int

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device, without waiting for the copy where that is possible."""
        types = self.token_type_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            token_type_ids=None if types is None else types.to(device, non_blocking=True),
            labels={t: y.to(device, non_blocking=True) for t, y in self.labels.items()},
        )


def plan_epoch(
    datasets: Mapping[str, TaskData],
    tokens_per_batch: int,
    seed: int,
    epoch: int,
    sampling: str = "proportional",
) -> list[np.ndarray]:
    """Plan the batches of one epoch: int64 [n, 2] each, rows (task index, example).

    A pure function of its arguments, so (epoch, position) is all a resumed run has to know. The
    tasks are pooled; a batch holds sequences of similar length and at most `tokens_per_batch`
    real tokens, or one longer example. `sampling` gives each task a share of the epoch's N
    examples in proportion to its size ("proportional"), to the square root of it ("sqrt"), or the
    same for all ("uniform"); small tasks then repeat, large ones are cut, and N stays.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    sizes = np.array([len(data) for data in datasets.values()])
    picks = [
        _repeated_permutation(rng, size, count)
        for size, count in zip(sizes, _shares(sizes, sampling), strict=True)
    ]
    pool = rng.permutation(_pool(picks))
    tokens, longest = _measure(datasets, pool)
    windows = np.clip(round(tokens.sum() / (tokens_per_batch * WINDOW)), 1, len(pool))
    plan = []
    for window in np.array_split(np.arange(len(pool)), windows):
        ordered = window[np.argsort(longest[window], kind="stable")]
        plan += [pool[part] for part in _cut(ordered, tokens[ordered], tokens_per_batch)]
    return [plan[i] for i in rng.permutation(len(plan))]


def shard(plan_batch: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Take one of `parts` similar shares of a batch, for data-parallel ranks and accumulation."""
    return plan_batch[part::parts]


def eval_batches(datasets: Mapping[str, TaskData], tokens_per_batch: int) -> Iterator[Batch]:
    """Yield every example once, shortest first; `Batch.indices` says where results belong."""
    pool = _pool([np.arange(len(data)) for data in datasets.values()])
    tokens, longest = _measure(datasets, pool)
    ordered = np.argsort(longest, kind="stable")
    for part in _cut(ordered, tokens[ordered], tokens_per_batch):
        yield collate(datasets, pool[part])


def collate(datasets: Mapping[str, TaskData], plan_batch: np.ndarray) -> Batch:
    """Gather the planned examples ([n, 2], as `plan_epoch` gives them) into one Batch."""
    spans: list[Span] = []
    blocks = []
    labels: dict[str, Tensor] = {}
    indices: dict[str, np.ndarray] = {}
    for index, (name, data) in enumerate(datasets.items()):
        examples = plan_batch[plan_batch[:, 0] == index, 1]
        if not len(examples):
            continue
        start = spans[-1].stop if spans else 0
        spans.append(Span(name, start, len(examples), len(data.columns)))
        blocks += [(column, examples) for column in data.columns]
        indices[name] = examples
        if data.labels is not None:
            kind = np.int64 if data.task.kind == "classification" else np.float32
            labels[name] = torch.from_numpy(data.labels[examples].astype(kind))
    ids, types, mask = _pad(blocks)
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        token_type_ids=None if types is None else torch.from_numpy(types),
        spans=tuple(spans),
        labels=labels,
        indices=indices,
        examples=len(plan_batch),
        tokens=int(mask.sum()),
    )


def _pad(blocks: list) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Lay (Encoded, examples) blocks below each other: ids, types or None, and mask, [B, S]."""
    lengths = [
        column.offsets[examples + 1] - column.offsets[examples] for column, examples in blocks
    ]
    rows = sum(map(len, lengths))
    width = max((int(length.max()) for length in lengths), default=1)
    steps = np.arange(width)
    mask = np.zeros((rows, width), bool)
    # Padding is masked everywhere, so any id of the vocabulary does; 0 always is one.
    ids = np.zeros((rows, width), np.int64)
    types = None
    if any(column.types is not None for column, _ in blocks):
        types = np.zeros((rows, width), np.int64)
    row = 0
    for (column, examples), length in zip(blocks, lengths, strict=True):
        block = slice(row, row + len(examples))
        mask[block] = real = steps < length[:, None]
        flat = (column.offsets[examples][:, None] + steps)[real]
        ids[block][real] = column.ids[flat]
        if types is not None and column.types is not None:
            types[block][real] = column.types[flat]
        row += len(examples)
    return ids, types, mask


def _shares(sizes: np.ndarray, sampling: str) -> np.ndarray:
    """Divide sizes.sum() examples among the tasks; largest remainders take what is left over."""
    power = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}[sampling]
    exact = sizes.sum() * sizes**power / (sizes**power).sum()
    shares = np.floor(exact + 1e-9).astype(np.int64)
    rest = sizes.sum() - shares.sum()
    shares[np.argsort(shares - exact, kind="stable")[:rest]] += 1
    return shares


def _repeated_permutation(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    rounds = [rng.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(rounds)[:count]


def _pool(picks: list[np.ndarray]) -> np.ndarray:
    tasks = np.repeat(np.arange(len(picks)), [len(pick) for pick in picks])
    return np.stack([tasks, np.concatenate(picks)], axis=1)


def _measure(datasets: Mapping[str, TaskData], pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count, for each planned example, all its tokens and those of its longest sequence."""
    total = np.empty(len(pool), np.int64)
    longest = np.empty(len(pool), np.int64)
    for index, data in enumerate(datasets.values()):
        lengths = np.stack([np.diff(column.offsets) for column in data.columns])
        of_task = pool[:, 0] == index
        total[of_task] = lengths.sum(0)[pool[of_task, 1]]
        longest[of_task] = lengths.max(0)[pool[of_task, 1]]
    return total, longest


def _cut(items: np.ndarray, tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Cut items into runs of at most `most` tokens, as even as the fewest possible runs allow."""
    ends = np.cumsum(tokens)
    fewest = len(_greedy_cuts(ends, most))
    # The smallest limit that needs no more runs spreads what would be a tiny last run.
    limits = np.linspace(min(ends[-1] / (fewest + 1), most), most, 9)
    cuts = next(cuts for x in limits if len(cuts := _greedy_cuts(ends, x)) == fewest)
    return np.split(items, cuts)


def _greedy_cuts(ends: np.ndarray, limit: float) -> list[int]:
    cuts: list[int] = []
    start = 0
    while True:
        done = ends[start - 1] if start else 0
        # At least one item a run: a single item may be longer than the limit.
        start = max(start + 1, int(np.searchsorted(ends, done + limit, side="right")))
        if start >= len(ends):
            return cuts
        cuts.append(start)
