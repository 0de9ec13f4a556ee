"""Tensor cores on a T4 (sm_75) with stock Triton.

Triton 3.4 and later compile `tl.dot` for sm_75 to scalar FMA with spills, an eighth of the tensor
cores' rate, and say nothing; upstream no longer supports the chip. The compiler still knows
Turing's instruction, though: the pass that makes MMA layouts picks "version 2.0" for sm_80, and
"2.1" is the layout of Turing's `mma.sync.m16n8k8`. So this hook replaces the TTGIR stage by the
sm_80 one without pipelining (cp.async came with Ampere), and relabels layout and target in the
module's text. Everything after that is stock.

It acts on launches with `num_stages=1`, which the fp16 row for sm_75 has (fp32 has no tensor cores
there). Triton 3.6 does not key its on-disk cache by the hook: `route` installs it before the first
launch, so that no kernel of ours is compiled without it there.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import triton

TESTED = ((3, 6), (3, 9))  # the versions that the tests compile with, first and last
KERNELS = {"lora_down", "lora_fused", "lora_outer", "lora_reduce"}


def install() -> str:
    """Put the hook in Triton, after one that is there already; returns why not, or ""."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        return f"Triton {triton.__version__} is not one of {TESTED[0]} to {TESTED[1]}"
    runtime: Any = triton.knobs.runtime
    earlier = runtime.add_stages_inspection_hook
    if not isinstance(earlier, Hook):
        runtime.add_stages_inspection_hook = Hook(earlier)
    return ""


class Hook:
    """Triton's stage hook: see the module's text."""

    def __init__(self, earlier: Any = None) -> None:
        self.earlier = earlier
        self.key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def __call__(self, *stage: Any) -> Any:
        """Replace the stage; without arguments (Triton 3.7 and later), answer the cache key."""
        before = self.earlier(*stage) if self.earlier else ("", "")
        if not stage:
            return before[0] + self.key, before[1] + self.key
        backend, stages, options, _, capability = stage
        if capability == 75 and options.num_stages == 1 and "ttgir" in stages:
            stages["ttgir"] = partial(_ttgir, backend, stages["ttgir"], options)
        return None


def _ttgir(backend: Any, stock: Any, options: Any, module: Any, metadata: dict) -> Any:
    if not KERNELS.issuperset(re.findall(r"tt\.func public @(\w+)", str(module))):
        return stock(module, metadata)
    from triton._C.libtriton import ir

    module = backend.make_ttgir(module, metadata, options, 80)
    text = str(module).replace("cuda:80", "cuda:75")
    text = text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1")
    # The parser reads files only.
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(text)
        file.flush()
        relabelled = ir.parse_mlir_module(file.name, module.context)
    relabelled.context = module.context
    return relabelled
