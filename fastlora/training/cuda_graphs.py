"""A training step as a CUDA graph for each shape of batch: forward, backward, optimizer.

On a GPU, a small batch takes as long as the launches of its kernels; a graph needs one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.data.batches import Batch

WARM_UPS = 3  # steps before a capture, in which nothing may compile or synchronise


class GraphedStep:
    """Runs `step(batch, shares)` as a CUDA graph, captured at the first batch of each shape.

    `step` changes the optimizer's parameters and state, and `others`, in place, and leaves no
    gradient. Seeds are drawn in the graph, from PyTorch's generator, so masks change with each
    replay; learning rates are tensors.
    """

    def __init__(
        self,
        step: Callable[[Batch, Tensor], None],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        others: list[Tensor],
    ) -> None:
        self.step, self.optimizer, self.scaler, self.others = step, optimizer, scaler, others
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.pool: Any = None  # the memory pool of all graphs
        for group in optimizer.param_groups:
            group["lr"] = self.parameters[0].new_tensor(group["lr"])
            group["capturable"] = True

    def __call__(self, batch: Batch, shares: Tensor) -> None:
        """Take one step on a batch."""
        tensors = [shares, *batch.tensors()]
        key = (*batch.labels, *(t.shape for t in tensors))
        if key not in self.graphs:
            self.graphs[key] = self._capture(batch, shares), tensors
        graph, inputs = self.graphs[key]
        for read, tensor in zip(inputs, tensors, strict=True):
            read.copy_(tensor)
        graph.replay()

    def _capture(self, batch: Batch, shares: Tensor) -> torch.cuda.CUDAGraph:
        """Capture a step as a graph, and restore what the warm-up steps changed."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        scale = self.scaler.state_dict()
        old = {id(t): t.detach().clone() for t in self._state()}
        with torch.random.fork_rng([shares.device]):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run(batch, shares)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor in self._state():  # moments that are new start at zero
                    tensor.copy_(old[id(tensor)]) if id(tensor) in old else tensor.zero_()
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(scale)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._run(batch, shares)
        return graph

    def _run(self, batch: Batch, shares: Tensor) -> None:
        # What layers derive from a layout must be derived again in each replay.
        self.step(replace(batch, layout=replace(batch.layout, derived={})), shares)

    def _state(self) -> list[Tensor]:
        moments = (self.optimizer.state.get(p, {}).values() for p in self.parameters)
        return [*self.parameters, *self.others, *(t for values in moments for t in values)]
