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

from fastlora.bert.model import BertModel, Layer, SelfAttention
from fastlora.data.batches import Batch
from fastlora.data.tasks import Task
from fastlora.errors import UserError
from fastlora.kernels import draw_seed, linear_gelu
from fastlora.lora.config import LoraConfig
from fastlora.lora.layer import DEFAULT, LoRALinear, draw_number
from fastlora.lora.model import inject, use_adapter
from fastlora.lora.routing import Segment
from fastlora.lora.together import has_hooks, product_of, project_together
from fastlora.multitask.heads import head_class


def project(attention: SelfAttention, x: Tensor) -> Tensor:
    """Query, key and value, with LoRA on any of them, as one product: [T, H] -> [T, 3H]."""
    return project_together((attention.query, attention.key, attention.value), x)


class FusedDense(nn.Sequential):
    """A linear layer and its activation, as one operation where no gradient is needed."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        linear, activation = self
        found = None if torch.is_grad_enabled() else product_of(linear, input)
        if not found or found.terms or type(activation) is not nn.GELU or has_hooks(activation):
            return super().forward(input)
        return linear_gelu(input, *found[:2], activation.approximate, found.packed)


def fuse(encoder: BertModel) -> None:
    """Compute query, key and value as one product, and GELU with what it is applied to."""
    for module in encoder.modules():
        if isinstance(module, SelfAttention):
            module.projection = project
        elif isinstance(module, Layer):
            module.intermediate.__class__ = FusedDense


class MultitaskBert(nn.Module):
    """An encoder with a head for each task, and LoRA adapters: a shared one, one a task, or both.

    `pairs` says whether the encoder reads the two sentences of a pair "separate" or "joint". The
    rows of a batch are in the order of `tasks`. Raises UserError for a task whose name
    `nn.ModuleDict` cannot hold.
    """

    def __init__(self, encoder: BertModel, tasks: Mapping[str, Task], pairs: str) -> None:
        super().__init__()
        self.encoder = encoder
        fuse(encoder)
        self.tasks = dict(tasks)
        self.heads = nn.ModuleDict()
        self.settings: dict[str, LoraConfig] = {}  # by the adapter's name
        self.adapted: dict[str, LoRALinear] = {}  # the encoder's layers with adapters, by name
        seed = draw_number()
        for name, task in tasks.items():
            if hasattr(self.heads, name):
                raise UserError(f"task {name!r}: PyTorch's modules use this name; choose another")
            config, new_head = encoder.config, head_class(task, pairs)
            # A head's initial weights depend only on the seed and the task's name.
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(seed ^ crc32(name.encode()))
                self.heads[name] = new_head(config.hidden_size, task, config.hidden_dropout_prob)

    def adapt(self, settings: Mapping[str, LoraConfig]) -> None:
        """Freeze the encoder and add adapters: "default" for all tasks, others named as a task."""
        self.adapted = inject(self.encoder, settings)
        self.settings = dict(settings)

    def adapters(self, task: str) -> tuple[str, ...]:
        """The names of the adapters on a task's rows: the shared one, the task's, or both."""
        return tuple(name for name in (DEFAULT, task) if name in self.settings)

    def training_group(self, task: str) -> str:
        """The name of the group of tasks that train parameters in common with a task.

        It is that of the adapter that they share, or of the task's own; "" without adapters, where
        all tasks are one group.
        """
        return next(iter(self.adapters(task)), "")

    def embed(self, batch: Batch, adapted: bool = True) -> Tensor:
        """Mean-pooled states of the batch's sentences, with adapters or without: fp32 [B, H]."""
        layout = batch.layout
        with self._adapters_on(batch) if adapted else use_adapter(self.adapted.values()):
            states = self.encoder.encode(batch.input_ids, layout, batch.token_type_ids)
        real = batch.attention_mask.float()
        sums = torch.bmm(real.unsqueeze(1), layout.pad(states[-1].float())).squeeze(1)
        return sums / real.sum(1, keepdim=True)

    def _adapters_on(self, batch: Batch) -> AbstractContextManager[None]:
        """A `with` block in which each row of real tokens uses its task's adapters."""
        # A compiled graph breaks at each layer inside `use_adapter`, which one shared adapter does
        # not need, because it is always active.
        compiled = self.encoder.encoder._compiled_call_impl is not None
        if not self.settings or (compiled and self.settings.keys() == {DEFAULT}):
            return nullcontext()
        seed = draw_seed(batch.input_ids.device) if self.training else None
        together, *others = {self.adapters(span.task) for span in batch.spans}
        if not others:
            return use_adapter(self.adapted.values(), *together, seed=seed)
        segments = []
        for name in self.settings:
            # The shared adapter is on all rows, another one on its task's: one range of rows each.
            if spans := [s for s in batch.spans if name in self.adapters(s.task)]:
                segments.append(Segment(name, spans[0].tokens[0], spans[-1].tokens[1]))
        return use_adapter(self.adapted.values(), rows=segments, seed=seed)

    def forward(self, batch: Batch, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """Each task's outputs [n, outputs] for its examples in the batch, as heads.py defines them.

        `pooled` are the states [B, H] that `embed` gives, where the caller has them already.
        """
        rows = self.embed(batch) if pooled is None else pooled
        rows = rows if batch.rows is None else rows.index_select(0, batch.rows)
        return {
            span.task: self.heads[span.task](*rows[span.start : span.stop].split(span.count))
            for span in batch.spans
        }


def task_losses(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    batch: Batch,
    class_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each task's loss [], summed over its examples, from the heads' outputs [n, outputs].

    A classification has the cross-entropy, an example of it times the weight of its class where the
    task has `class_weights`, fp32 [classes] by task. A multilabel task has the mean of the classes'
    binary cross-entropies. A regression has the squared error, divided by the
    variance of labels spread evenly over the task's range: then always predicting the middle
    costs about 1, as always predicting the most frequent class does.
    """
    losses = {}
    for name, output in outputs.items():
        task, labels = tasks[name], batch.labels[name]  # [n]
        if task.kind == "classification":
            weights = (class_weights or {}).get(name)
            each = F.cross_entropy(output.float(), labels, weights, reduction="none")
        elif task.kind == "multilabel":
            entropies = F.binary_cross_entropy_with_logits(output.float(), labels, reduction="none")
            each = entropies.mean(-1)
        else:
            each = 12 * (output.float().squeeze(-1) - labels).square()
        losses[name] = each @ batch.real[name] if name in batch.real else each.sum()
    return losses
