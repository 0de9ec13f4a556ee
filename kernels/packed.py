"""Packed copies of a frozen weight, held by whoever owns the weight.

A product is faster on a weight that lies in memory as the product wants it: oneDNN's blocks on a
CPU, [W0 | B] for route "gemm", another type under autocast. A copy is only right while the weight
stays the same, and a write through `.data`, NumPy or a collective operation leaves no trace that
a cache could look for. So nothing here is packed unasked: an owner who knows when its weights
change makes a `Packed` for each and passes it to every call; all others compute on the weight as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
LIMIT = 32  # forms of one weight; the oldest goes first, as adapters come and go


class Forms(NamedTuple):
    """Where a call finds the packed forms of its weight, and leaves what it makes."""

    kept: dict | None = None  # None: nobody keeps them, each is made for this call alone
    graph: list | None = None  # while a CUDA graph is captured, takes what the graph will read

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The form that is kept by this key, or else what `make` returns, kept from now on."""
        kept = {} if self.kept is None else self.kept
        found = kept.get(key)
        if found is None:
            # A list of the keys, for another thread may change the dictionary meanwhile.
            for oldest in list(kept)[: max(0, len(kept) - LIMIT + 1)]:
                kept.pop(oldest, None)
            # What is made in inference mode could not be saved for backward later, or changed.
            with torch.inference_mode(False), torch.no_grad():
                found = kept[key] = make()
        if self.graph is not None:
            self.graph.append(found)
        return found


class Packed:
    """The packed forms of one frozen weight, made at their first use.

    They are made again when the weight is another tensor, lies elsewhere or has a new version.
    The forms may also be of several tensors, as the weights of layers that are one product.
    After a write that PyTorch does not see, the owner calls `clear`. Copying or pickling an owner
    gives the copy an empty `Packed` of its own. Safe for several threads.
    """

    def __init__(self) -> None:
        self._current: tuple[list[tuple], list[StorageWeakRef], dict] | None = None
        self.graph: list[Any] = []  # what captured CUDA graphs read, for as long as this object

    def forms(self, *tensors: Tensor) -> dict | None:
        """The forms of these tensors as they are now; None where no change could be seen."""
        if any(t.is_inference() for t in tensors):
            return None  # they count no versions
        places = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t._version) for t in tensors]
        current = self._current
        # An expired storage's place in memory may be another's by now.
        if current is None or current[0] != places or any(ref.expired() for ref in current[1]):
            storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
            current = self._current = places, storages, {}
        return current[2]

    def clear(self) -> None:
        """Forget all forms: the weight has changed."""
        self._current = None

    def __reduce__(self) -> tuple:
        return Packed, ()
