"""Tensor cores on a T4 (sm_75) with stock Triton.

Triton 3.4 and later silently compile `tl.dot` for sm_75 to scalar FMA with spills. So this hook
replaces the TTGIR stage by the sm_80 one without pipelining, and relabels its MMA layouts from
version 2.0, sm_80's, to 2.1, Turing's. It acts on launches with `num_stages=1` and, because Triton
has one hook for the whole process, only while a kernel of ours is launched on such a chip (not only
compiled: the hook's key is part of the look-up of compiled kernels).
"""

import hashlib
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import triton

TESTED = ((3, 6), (3, 9))  # the versions that the tests compile with, first and last
KERNELS = {"lora_down", "lora_add", "lora_outer"}
KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # of this version of the hook


def problem() -> str:
    """Why the hook cannot work with the Triton that is here, or ""."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if TESTED[0] <= version <= TESTED[1]:
        return ""
    return f"Triton {triton.__version__} is not one of {TESTED[0]} to {TESTED[1]}"


class Hook:
    """Triton's stage hook, which first calls the one that was there before: see the module's text.

    It does nothing without `users`, threads in `compiling`: others may have stored it for good.
    """

    def __init__(self, earlier: Any = None, users: int = 1) -> None:
        self.earlier, self.users = earlier, users

    def __call__(self, *stage: Any) -> Any:
        """Replace the stage; without arguments (Triton 3.7 and later), answer the cache key."""
        before = self.earlier(*stage) if self.earlier else ("", "")
        if not stage:
            key = KEY if self.users else ""
            return before[0] + key, before[1] + key
        backend, stages, options, _, capability = stage
        if self.users and capability == 75 and options.num_stages == 1 and "ttgir" in stages:
            stages["ttgir"] = partial(_ttgir, backend, stages["ttgir"], options)
        return None


_lock = threading.Lock()


@contextmanager
def compiling(capability: int) -> Iterator[None]:
    """Inside, our kernels compile for sm_75 with tensor cores, unless there is a `problem`."""
    if capability != 75 or problem():
        yield
        return
    runtime: Any = triton.knobs.runtime
    with _lock:
        hook = runtime.add_stages_inspection_hook
        if not isinstance(hook, Hook):
            hook = runtime.add_stages_inspection_hook = Hook(hook, users=0)
        hook.users += 1
    try:
        yield
    finally:
        with _lock:
            hook.users -= 1
            # If another library has installed a hook meanwhile, it stays.
            if not hook.users and runtime.add_stages_inspection_hook is hook:
                runtime.add_stages_inspection_hook = hook.earlier


def _ttgir(backend: Any, stock: Any, options: Any, module: Any, metadata: dict) -> Any:
    if not KERNELS.issuperset(re.findall(r"tt\.func public @(\w+)", str(module))):
        return stock(module, metadata)
    from triton._C.libtriton import ir

    module = backend.make_ttgir(module, metadata, options, 80)
    text = str(module).replace("cuda:80", "cuda:75")
    text = text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1")
    # Triton's parser reads from files only.
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(text)
        file.flush()
        relabelled = ir.parse_mlir_module(file.name, module.context)
    relabelled.context = module.context
    return relabelled
