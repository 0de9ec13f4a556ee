"""The encoder's forward and backward pass as CUDA graphs, one pair a shape of batch.

A small batch's time on a GPU is that of launching kernels; a graph launches all of them at once.
Heads, losses and the optimiser's step stay outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.batches import Batch
from fastlora.bert.model import Layout
from fastlora.model import MultitaskBert


class GraphedEncoder:
    """`MultitaskBert.embed` for batches in training, captured when a shape comes first.

    A gradient lies where the next replay writes: it must be used before. Seeds are drawn in the
    graph, from PyTorch's generator, so masks change with each replay.
    """

    def __init__(self, model: MultitaskBert) -> None:
        self.model = model
        self.graphs: dict[tuple[int, int, int], Any] = {}
        self.pool: Any = None  # of memory: what one graph no longer needs, the next may use

    def __call__(self, batch: Batch) -> Tensor:
        """The pooled states [B, H] of a batch that `collate` filled up to a common shape."""
        layout = batch.layout
        tensors = [batch.input_ids, batch.attention_mask, batch.token_type_ids]
        tensors += [t for t in (layout.index, layout.source, layout.mask) if t is not None]
        shape = (layout.batch, layout.length, tensors[3].shape[0])
        if shape not in self.graphs:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            # Capturing runs the passes some times: this must not change a run's random numbers.
            with torch.random.fork_rng([batch.input_ids.device]):
                self.graphs[shape] = torch.cuda.make_graphed_callables(
                    _Embed(self.model, batch), tuple(tensors), pool=self.pool
                )
        return self.graphs[shape](*tensors)


class _Embed(nn.Module):
    """The model's `embed` as a function of tensors alone; only the encoder's parameters are its."""

    def __init__(self, model: MultitaskBert, batch: Batch) -> None:
        super().__init__()
        self.encoder, self.embed, self.batch = model.encoder, model.embed, batch

    def forward(self, ids: Tensor, real: Tensor, types: Tensor, *places: Tensor) -> Tensor:
        old = self.batch
        layout = Layout(old.layout.batch, old.layout.length, *places)
        return self.embed(Batch(ids, real, types, layout, old.spans, old.labels, old.indices))
