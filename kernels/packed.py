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
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
LIMIT = 32  # forms of one weight; the oldest goes first, as adapters come and go


def form(forms: dict | None, key: Hashable, make: Callable[[], T]) -> T:
    """A form of a weight: made for this call alone, or kept among `forms`."""
    if forms is None:
        return make()
    found = forms.get(key)
    if found is None:
        # A list of the keys, for another thread may change the dictionary meanwhile.
        for oldest in list(forms)[: max(0, len(forms) - LIMIT + 1)]:
            forms.pop(oldest, None)
        found = forms[key] = make()
    return found


class Packed:
    """The packed forms of one frozen weight, made at their first use.

    They are made again when the weight is another tensor, lies elsewhere or has a new version.
    After a write that PyTorch does not see, the owner calls `clear`. Copying or pickling an owner
    gives the copy an empty `Packed` of its own. Safe for several threads.
    """

    def __init__(self) -> None:
        self._current: tuple[tuple, StorageWeakRef, dict] | None = None
        self._kept: list[Any] = []

    def forms(self, weight: Tensor) -> dict | None:
        """The forms of this weight as it is now, for `Call`; None where no change could be seen."""
        if weight.is_inference():
            return None  # it counts no versions
        place = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight._version
        current = self._current
        # An expired storage's place in memory may be another's by now.
        if current is None or current[0] != place or current[1].expired():
            current = self._current = place, StorageWeakRef(weight.untyped_storage()), {}
        return current[2]

    def keep(self, *used: Any) -> None:
        """Hold what a captured CUDA graph reads, for as long as this object lives."""
        self._kept += used

    def clear(self) -> None:
        """Forget all forms: the weight has changed."""
        self._current = None

    def __reduce__(self) -> tuple:
        return Packed, ()
