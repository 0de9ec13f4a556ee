"""Data-parallel training under torchrun: a process for each GPU (nccl) or share of a CPU (gloo).

The processes add up the gradients of the trainable parameters and the requests to stop in one flat
tensor at each step. So the model needs no wrapper, and a process may have no rows of a task.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlora.errors import RunError, UserError, in_place_of
from fastlora.training.inputs import rank_and_world

_LOST = RuntimeError, RunError, "the run's other processes cannot be reached: "


class World:
    """The processes of a run, as one of them sees them; RunError if one cannot be reached."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = rank_and_world()
        self.device = device
        self.created_group = self.size > 1 and not dist.is_initialized()
        if self.created_group:
            with in_place_of(ValueError, UserError), in_place_of(*_LOST):
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter], stop: bool) -> bool:
        """Add up the gradients of all processes in place; returns whether one wants to stop."""
        if self.size == 1:
            return stop
        parameters = list(parameters)
        # Parameters of a task that no process has rows of must get no gradient, because AdamW
        # would move them even with a gradient of zero.
        flags = torch.tensor([*(float(p.grad is not None) for p in parameters), float(stop)])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), flags.to(self.device)])
        self.sum(flat)
        *present, stop_votes = flat[-len(flags) :].tolist()
        start = 0
        for p, votes in zip(parameters, present, strict=True):
            p.grad = flat[start : start + p.numel()].view_as(p) if votes else None
            start += p.numel()
        return stop_votes > 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            with in_place_of(*_LOST):
                dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(1, device=self.device)).item()

    def close(self) -> None:
        """Destroy the process group if this object created it."""
        if self.created_group and dist.is_initialized():
            dist.destroy_process_group()
