"""What one call of the operation is, as the routes see it, and the packed copies of its weight.

A product is faster on a weight that lies in memory as the product wants it: oneDNN's blocks on a
CPU, [W0 | B] for route "gemm", another type under autocast. A copy is only right while the weight
stays the same, and a write through `.data`, NumPy or a collective operation leaves no trace. So
nothing is packed unasked: an owner who knows when its frozen weights change makes a `Packed` for
each and passes it to every call; all others compute on the weight as it is.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.kernels.dropout import keep_scale

LIMIT = 32  # forms of one weight; the oldest goes first, as adapters come and go


class Term(NamedTuple):
    """One adapter's low-rank update of a block of the output.

    It reads rows [start, stop) of x (leading dimensions flattened) and adds to those rows of y,
    columns [column, column + N). The mask's rows count from `start`, so that an adapter trains
    the same alone or in company.
    """

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r (or alpha / sqrt(r), rsLoRA)
    dropout_p: float = 0.0  # probability to drop an element of the branch's input
    stream: int = 0  # 32 bits that separate the masks of terms that share a seed
    start: int = 0
    stop: int | None = None
    column: int = 0

    @property
    def c(self) -> float:
        """The factor of u B^T: scale / (1 - p)."""
        return self.scale * keep_scale(self.dropout_p)

    @property
    def rows(self) -> tuple[int, int]:
        """First row and end of a term that has an end."""
        assert self.stop is not None
        return self.start, self.stop


class Forms(NamedTuple):
    """Where a call finds the packed forms of its weight, and leaves what it makes."""

    kept: dict | None = None  # None: nobody keeps them, each is made for this call alone
    graph: list | None = None  # while a CUDA graph is captured, takes what the graph will read

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The form that is kept by this key, or else what `make` returns, kept from now on."""
        if self.kept is None:
            return make()
        found = self.kept.get(key)
        if found is None:
            # A list of the keys, for another thread may change the dictionary meanwhile.
            for oldest in list(self.kept)[: 1 - LIMIT]:
                self.kept.pop(oldest, None)
            # What is made in inference mode could not be saved for backward later, or changed.
            with torch.inference_mode(False), torch.no_grad():
                found = self.kept[key] = make()
        if self.graph is not None:
            self.graph.append(found)
        return found


class Call(NamedTuple):
    """One call's inputs besides x. Each term has an end; its factors are fp32 or in x's type."""

    weight: Tensor  # [N, K]
    terms: Sequence[Term]
    seed: Tensor | None
    forms: Forms = Forms()  # the packed forms of the weight
    route: str = "reference"
    changed: bool = True  # whether the factors may have changed since they were packed

    @property
    def factors(self) -> list[Tensor]:
        """A and B of the first term, A and B of the next."""
        return [factor for term in self.terms for factor in term[:2]]


class Packed:
    """The packed forms of one frozen weight, made at their first use.

    They are made again when the weight is another tensor, lies elsewhere or has a new version.
    The forms may also be of several tensors, as the weights of layers that are one product.
    After a write that PyTorch does not see, the owner calls `clear`; a `watched` one sees such
    writes by itself, for reading the weight once more at each use. Copying or pickling an owner
    gives the copy an empty `Packed` of its own. Safe for several threads.
    """

    def __init__(self, watched: bool = False) -> None:
        self.watched = watched
        self._current: tuple[list, list[StorageWeakRef], dict] | None = None
        self.graph: list[Any] = []  # what captured CUDA graphs read, for as long as this object

    def forms(self, *tensors: Tensor) -> dict | None:
        """The forms of these tensors as they are now; None where no change could be seen."""
        if any(t.is_inference() for t in tensors):
            return None  # they count no versions
        places: list = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t._version) for t in tensors]
        if self.watched:
            places += map(_marks, tensors)
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
        return Packed, (self.watched,)


def _marks(tensor: Tensor) -> bytes:
    """A hash of each row's bits, by which a write is noticed, wherever in the row it was."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    if left := rows.shape[1] * rows.element_size() % 8:
        rows = torch.nn.functional.pad(rows, (0, (8 - left) // rows.element_size()))
    words = rows.contiguous().view(torch.int64)
    return ((words ^ (words >> 31)) * _odd_numbers(words.shape[1])).sum(1).numpy().tobytes()


@lru_cache(maxsize=64)
def _odd_numbers(count: int) -> Tensor:
    draw = torch.Generator("cpu").manual_seed(0)
    return torch.randint(-(2**62), 2**62, (count,), generator=draw, device="cpu") * 2 + 1
