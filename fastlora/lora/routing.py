"""Which adapters act on which rows: chosen for a model, or for a block of code.

`set_adapter` writes its choice on the layers. `use_adapter` opens a scope: the choice holds in this
thread (or asynchronous task) until the block ends. Activation checkpointing runs layers again after
that, possibly on another thread, so the choice is also stored on the frame object that PyTorch's
non-reentrant checkpoint has for a forward pass and its recomputation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import UserError

if TYPE_CHECKING:
    from fastlora.lora.layer import LoRALinear


class Segment(NamedTuple):
    """Rows [start, stop) of the leading dimension that use one adapter."""

    adapter: str
    start: int
    stop: int


class Choice(NamedTuple):
    """The adapters that act: on all rows and added up, or each on its own segments of rows."""

    names: tuple[str, ...] = ()
    segments: tuple[Segment, ...] | None = None
    rows: int | None = None  # that an input must have, if adapters are given row by row
    seed: Tensor | None = None  # int64 [], for all masks; None: each layer draws its own


class _Scope(NamedTuple):
    layers: frozenset[LoRALinear]
    choice: Choice
    graph_task: int  # number of the backward pass in which it was opened, or -1


_lock = Lock()
_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("adapter scopes", default=())


@contextmanager
def scope(layers: Iterable[LoRALinear], choice: Choice) -> Iterator[None]:
    """Make a choice hold for these layers in a block of code."""
    opened = _Scope(frozenset(layers), choice, torch._C._current_graph_task_id())
    _count(opened.layers, 1)
    _scopes.set((*_scopes.get(), opened))
    try:
        yield
    finally:
        # ContextVar.reset would not do, because generators may close their scopes in any order.
        _scopes.set(tuple(other for other in _scopes.get() if other is not opened))
        _count(opened.layers, -1)


def _count(layers: Iterable[LoRALinear], change: int) -> None:
    with _lock:
        for layer in layers:
            layer.scopes += change


def pick(
    adapters: Sequence[str], rows: Sequence[str | Segment | None] | None, seed: Tensor | None
) -> Choice:
    """The choice of `adapters` for all rows or, by `rows`, of one or none for each, or segments."""
    if rows is None:
        return Choice(tuple(dict.fromkeys(adapters)), seed=seed)
    if adapters:
        raise UserError(f"rows and {', '.join(adapters)} are given (expected one of the two)")
    segments, count = [row for row in rows if isinstance(row, Segment)], None
    if not segments or len(segments) < len(rows):
        segments, count = [], 0
        for name, run in groupby(rows):
            start, count = count, count + len(list(run))
            if name is not None:
                segments.append(Segment(str(name), start, count))
    for segment in segments:
        if not 0 <= segment.start <= segment.stop:
            raise UserError(f"rows has {segment} (expected 0 <= start <= stop)")
    return Choice(tuple(dict.fromkeys(s.adapter for s in segments)), tuple(segments), count, seed)


def adapter_names(layers: Iterable[LoRALinear]) -> tuple[str, ...]:
    """The adapters of some layers, each once."""
    return tuple(dict.fromkeys(name for layer in layers for name in layer.settings))


def check_names(layers: Iterable[LoRALinear], adapters: Sequence[str]) -> None:
    """Raise UserError for an adapter that none of these layers has."""
    known = adapter_names(layers)
    for name in adapters:
        if name not in known:
            named = "" if name is None else f" named {name!r}"
            there = ", ".join(map(repr, known)) or "none"
            raise UserError(f"the model has no adapter{named} (its adapters: {there})")


def active_adapters(layer: LoRALinear) -> tuple[str, ...]:
    """The adapters that are active on a layer now; UserError if they are chosen by row."""
    if (choice := choice_of(layer)).segments is not None:
        raise UserError("adapters are chosen by row here (expected the same for all rows)")
    return choice.names


def choice_of(layer: LoRALinear) -> Choice:
    """The choice that applies to a layer now; UserError if that cannot be known."""
    covering = (s for s in reversed(_scopes.get()) if layer in s.layers)
    innermost, graph_task = next(covering, None), torch._C._current_graph_task_id()
    if graph_task == -1:
        choice = innermost.choice if innermost else layer.default_choice()
        if innermost and (layer.training or torch.is_grad_enabled()):
            layer.was_scoped = True
        if (frame := _checkpoint_frame()) is not None:
            noted = vars(frame).setdefault("fastlora_choices", {})
            noted[layer] = choice if noted.get(layer, choice) == choice else None
        return choice
    # In a backward pass: a scope was opened within it, or this is a recomputation.
    if innermost is not None and innermost.graph_task == graph_task:
        return innermost.choice
    if not layer.was_scoped:
        return layer.default_choice()
    noted = getattr(_checkpoint_frame(), "fastlora_choices", {}).get(layer)
    if noted is None:
        what = "a LoRALinear is recomputed in backward, where its adapters in forward are unknown"
        raise UserError(f"{what} (expected checkpoint(use_reentrant=False), not nested)")
    return noted


def _checkpoint_frame() -> Any:
    """The frame of the non-reentrant checkpoint that we run in, or None.

    PyTorch has no function for it. It is in the closure of the innermost hook on saved tensors:
    directly in the forward pass, as a weak reference in the recomputation.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = inspect.unwrap(hooks[0]) if hooks else None
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint" or not pack.__closure__:
        return None
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    if "frame" in cells:
        return cells["frame"].cell_contents
    return cells["target_frame_ref"].cell_contents() if "target_frame_ref" in cells else None
