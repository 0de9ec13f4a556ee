"""The inputs of one call, in the form that routes take, and packed copies of its weight.

A product is faster on a packed copy: oneDNN's blocks on a CPU, [W0 | B] for route "gemm", another
dtype under autocast. It becomes wrong when the weight changes, and PyTorch does not count writes
through `.data`, NumPy or collectives. So only callers who know when that is pass a `Packed`.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

PLAIN_TYPES = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LANES = 1 << 16  # values of the random number that drops an element or keeps it
LIMIT = 32  # packed copies of one weight; beyond it the oldest is dropped


def is_ordinary(x: Tensor) -> bool:
    """Whether the fused operation accepts x: plain floats that nothing transforms or traces."""
    return (
        type(x) in PLAIN_TYPES
        and x.device.type in ("cpu", "cuda")
        and x.dtype in DTYPES
        and x.layout == torch.strided
        and not x.is_nested
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def threshold(p: float) -> int:
    """The threshold below which a lane drops: p * 2^16, at most that of `dropout.MOST`."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout is {p} (expected 0 <= p < 1)")
    return min(round(p * LANES), LANES - 256)


def keep_scale(p: float) -> float:
    """The factor 1 / (1 - p) of kept values, with p rounded as in `threshold`."""
    return LANES / (LANES - threshold(p))


class Term(NamedTuple):
    """One adapter's low-rank update of rows [start, stop) of the output, flattened to 2-D.

    It adds to columns [column, column + N). The mask's rows count from `start`.
    """

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r (or alpha / sqrt(r), rsLoRA)
    dropout_p: float = 0.0  # dropout rate of the low-rank branch's input
    stream: int = 0  # 32 bits; terms that share a seed have different streams
    start: int = 0
    stop: int | None = None
    column: int = 0

    @property
    def c(self) -> float:
        """The factor of u B^T: scale / (1 - p)."""
        return self.scale * keep_scale(self.dropout_p)

    @property
    def rows(self) -> tuple[int, int]:
        """(start, stop); only for a term whose stop is set."""
        assert self.stop is not None
        return self.start, self.stop


class Copies(NamedTuple):
    """The packed copies that a call may use, and to which it adds those that it makes."""

    kept: dict | None = None  # None: each copy is made for this call alone
    graph: list | None = None  # during CUDA graph capture: what the graph reads

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The copy under this key; if there is none, `make` builds it and it is kept."""
        if self.kept is None:
            return make()
        found = self.kept.get(key)
        if found is None:
            for oldest in list(self.kept)[: 1 - LIMIT]:
                self.kept.pop(oldest, None)  # another thread may have done so
            with torch.inference_mode(False), torch.no_grad():  # so that backward can save it
                found = self.kept[key] = make()
        if self.graph is not None:
            self.graph.append(found)
        return found


class Call(NamedTuple):
    """One call's inputs besides x. Every term has a stop; its factors are fp32 or in x's dtype."""

    weight: Tensor  # [N, K]
    terms: Sequence[Term]
    seed: Tensor | None
    copies: Copies = Copies()  # packed copies of the weight
    route: str = "reference"
    changed: bool = True  # whether the factors may have changed since they were packed

    @property
    def factors(self) -> list[Tensor]:
        """A and B of the first term, A and B of the next."""
        return [factor for term in self.terms for factor in term[:2]]


class Packed:
    """The packed copies of one frozen weight, or of several together, made at their first use.

    They are made again when a weight is another tensor, has moved or has a new version. After a
    write that PyTorch does not count, the owner calls `clear`; a `watched` one detects it by
    hashing the weight at each use. Copying or pickling it gives an empty one. Threads may share it.
    """

    def __init__(self, watched: bool = False) -> None:
        self.watched = watched
        self._current: tuple[list, list[StorageWeakRef], dict] | None = None
        self.graph: list[Any] = []  # what captured CUDA graphs read; kept alive by this object

    def copies(self, *tensors: Tensor) -> dict | None:
        """The copies of these tensors as they are now; None for tensors of inference mode."""
        if any(t.is_inference() for t in tensors):
            return None  # they count no versions, so changes could not be seen
        state: list = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t._version) for t in tensors]
        if self.watched:
            state += map(_row_hashes, tensors)
        current = self._current
        # The memory of an expired storage may belong to another tensor by now.
        if current is None or current[0] != state or any(ref.expired() for ref in current[1]):
            storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
            current = self._current = state, storages, {}
        return current[2]

    def clear(self) -> None:
        """Forget all copies: the weight has changed."""
        self._current = None

    def __reduce__(self) -> tuple:
        return Packed, (self.watched,)


def _row_hashes(tensor: Tensor) -> bytes:
    """A hash of each row's bits, which changes with a write anywhere in the row."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    if left := rows.shape[1] * rows.element_size() % 8:
        rows = torch.nn.functional.pad(rows, (0, (8 - left) // rows.element_size()))
    words = rows.contiguous().view(torch.int64)
    draw = torch.Generator("cpu").manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, words.shape[1:], generator=draw, device="cpu") * 2 + 1
    return ((words ^ (words >> 31)) * odd).sum(1).numpy().tobytes()
