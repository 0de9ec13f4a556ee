"""MultitaskBert: one encoder pass over rows of all tasks, one head per task.

Shapes at line ends: B rows (sentences) of the batch, S sequence, T real tokens, H hidden,
n examples of one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.bert.model import BertModel, SelfAttention
from fastlora.data.batches import Batch
from fastlora.data.tasks import Task
from fastlora.errors import UserError
from fastlora.kernels import draw_seed
from fastlora.lora.config import LoraConfig
from fastlora.lora.layer import DEFAULT, LoRALinear, draw_number
from fastlora.lora.model import inject, use_adapter
from fastlora.lora.routing import Segment
from fastlora.lora.together import project_together
from fastlora.multitask.heads import head_class

VARIANT = "@"


def plain(name: str) -> str:
    """The adapter or task that `name` is a variant of: "sts@2" has the random numbers of "sts"."""
    return name.partition(VARIANT)[0]


def project(attention: SelfAttention, x: Tensor) -> Tensor:
    """Query, key and value, with LoRA on any of them, in one product: [T, H] -> [T, 3H]."""
    return project_together((attention.query, attention.key, attention.value), x)


def adapt_encoder(encoder: BertModel, settings: Mapping[str, LoraConfig]) -> dict[str, LoRALinear]:
    """Put LoRA on minBERT, whose query, key and value stay one product; returns the layers."""
    fuse_projections(encoder)
    return inject(encoder, settings, draws_as={name: plain(name) for name in settings})


def fuse_projections(encoder: BertModel) -> None:
    """Let query, key and value of each layer be one product."""
    for module in encoder.modules():
        if isinstance(module, SelfAttention):
            module.projection = project


class MultitaskBert(nn.Module):
    """An encoder with a head per task, and LoRA adapters: one for all tasks, one each, or both.

    The order of `tasks` is that of the rows in a batch; `pairs` is "separate" or "joint" encoding.
    Tasks named "sts@0", "sts@1" are variants of one: each has its own adapters and head, and the
    random numbers that "sts" alone would have. Raises UserError for a name that no module can have.
    """

    def __init__(self, encoder: BertModel, tasks: Mapping[str, Task], pairs: str) -> None:
        super().__init__()
        self.encoder = encoder
        fuse_projections(encoder)
        self.tasks = dict(tasks)
        self.heads = nn.ModuleDict()
        self.settings: dict[str, LoraConfig] = {}  # of the adapters
        self.adapted: dict[str, LoRALinear] = {}  # the encoder's layers that have some
        seed = draw_number()
        for name, task in tasks.items():
            if hasattr(self.heads, name):
                raise UserError(f"task {name!r}: PyTorch's modules use this name; choose another")
            config, new_head = encoder.config, head_class(task, pairs)
            # A head's initial weights depend only on the seed and the task's name.
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(seed ^ crc32(plain(name).encode()))
                self.heads[name] = new_head(config.hidden_size, task, config.hidden_dropout_prob)

    def adapt(self, settings: Mapping[str, LoraConfig]) -> None:
        """Freeze the encoder and put LoRA on it: "default" for all tasks, others for theirs."""
        self.adapted = adapt_encoder(self.encoder, settings)
        self.settings = dict(settings)

    def adapters(self, task: str) -> tuple[str, ...]:
        """The adapters on a task's rows: the shared one, the task's own, or both."""
        shared = DEFAULT + task[len(plain(task)) :]
        return tuple(name for name in (shared, task) if name in self.settings)

    def unit(self, task: str) -> str:
        """What trains a task: tasks of different units share no trainable parameter."""
        return next(iter(self.adapters(task)), "")

    def embed(self, batch: Batch) -> Tensor:
        """Mean-pooled states of the batch's sentences: fp32 [B, H]."""
        layout = batch.layout
        with self._adapters_on(batch):
            states = self.encoder.encode(batch.input_ids, layout, batch.token_type_ids)
        real = batch.attention_mask.float()
        sums = torch.bmm(real.unsqueeze(1), layout.pad(states[-1].float())).squeeze(1)
        return sums / real.sum(1, keepdim=True)

    def _adapters_on(self, batch: Batch) -> AbstractContextManager[None]:
        """A block in which each row of real tokens has its task's adapters."""
        # Within a scope, the compiler would break its graph at each layer.
        compiled = self.encoder.encoder._compiled_call_impl is not None
        if not self.settings or (compiled and self.settings.keys() == {DEFAULT}):
            return nullcontext()
        seed = draw_seed(batch.input_ids.device) if self.training else None
        together, *others = {self.adapters(span.task) for span in batch.spans}
        if not others:
            return use_adapter(self.adapted.values(), *together, seed=seed)
        segments = []
        for name in self.settings:
            # One range: what shares an adapter stands together.
            if own := [s for s in batch.spans if name in self.adapters(s.task)]:
                segments.append(Segment(name, own[0].tokens[0], own[-1].tokens[1]))
        return use_adapter(self.adapted.values(), rows=segments, seed=seed)

    def forward(self, batch: Batch, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """Each task's outputs [n, outputs] for its examples in the batch.

        `pooled` are its sentences' states [B, H], where they are known.
        """
        rows = self.embed(batch) if pooled is None else pooled
        rows = rows if batch.rows is None else rows.index_select(0, batch.rows)
        return {
            span.task: self.heads[span.task](*rows[span.start : span.stop].split(span.count))
            for span in batch.spans
        }


def task_losses(
    tasks: Mapping[str, Task], outputs: Mapping[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    """Each task's loss [], summed over its examples, from the heads' outputs [n, outputs].

    A classification has the cross-entropy. A regression has the squared error, divided by the
    variance of labels spread evenly over the task's range: then always predicting the middle
    costs about 1, as always predicting the most frequent class does.
    """
    losses = {}
    for name, output in outputs.items():
        task, labels = tasks[name], batch.labels[name]  # [n]
        if task.kind == "classification":
            each = F.cross_entropy(output.float(), labels, reduction="none")
        else:
            # Subtracting `low` from the labels, not adding it to the output, keeps all digits.
            width = task.high - task.low
            error = (width * output.float().squeeze(-1) - (labels - task.low)) / width
            each = 12 * error.square()
        losses[name] = each @ batch.real[name] if name in batch.real else each.sum()
    return losses
