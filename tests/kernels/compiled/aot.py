"""Compiles the launches that the routes make, for GPUs that are not here, and reads the result."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlora.kernels.call import Call, Term
from fastlora.kernels.routes import implementation
from fastlora.kernels.triton import tuning, turing

KINDS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
FAMILIES = ("MMA", "LDG", "LDS", "STS", "BAR")


@contextmanager
def launches_to(function, capability, row=None):
    """Launches of a GPU of that capability, in the block sizes of a row, go to `function`."""
    launch, find, config = tuning.launch, tuning.capability, tuning.config
    tuning.launch = function
    tuning.capability = lambda _device: capability
    if row is not None:
        tuning.config = lambda *_: row
    try:
        yield
    finally:
        tuning.launch, tuning.capability, tuning.config = launch, find, config


@cache
def _compile(kernel, capability, signature, constants, aligned, warps, stages):
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants},
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = dict(num_warps=warps, num_stages=stages)
    with turing.compiling(capability):
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_launch(capability, kernel, arguments, constants, blocks):
    """The compiled kernel of a launch, specialised as Triton would at run time."""
    constants = dict(constants)
    signature, aligned = {}, []
    for name in kernel.arg_names:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = KINDS[value.dtype]
            offset = value.storage_offset() * value.element_size()
            if offset % 16 == 0:
                aligned.append(name)
        elif name in constants or is_constant(value):
            constants.setdefault(name, value)
            signature[name] = "constexpr"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned.append(name)
    items = [tuple(d.items()) for d in (signature, constants)]
    return _compile(kernel, capability, *items, tuple(aligned), blocks.warps, blocks.stages)


def is_constant(value):
    """Whether Triton makes this argument a constant."""
    return value is None or (isinstance(value, int) and value == 1)


def passed(kernel, arguments):
    """What a launch passes to the compiled kernel, in its order."""
    values = (arguments[name] for name in kernel.arg_names if name in arguments)
    return [value for value in values if not is_constant(value)]


def sample(dtype, M=8, H=768, r=32, p=0.1):
    """Inputs of query, key and value with LoRA on query and value: x, bias, grad, call."""
    x, grad = torch.zeros(M, H, dtype=dtype), torch.zeros(M, 3 * H, dtype=dtype)
    weight, bias = torch.zeros(3 * H, H, dtype=dtype), torch.zeros(3 * H, dtype=dtype)
    factors = torch.zeros(r, H), torch.zeros(H, r)
    terms = [Term(*factors, 1.0, p, stream=c, stop=M, column=c) for c in (0, 2 * H)]
    return x, bias, grad, Call(weight, terms, torch.tensor(1))


def all_launches(dtype, p=0.1, r=32):
    """Every kind of launch that the route makes on a dtype."""
    x, bias, grad, call = sample(dtype, r=r, p=p)
    first, second = call.terms
    halves = call._replace(terms=[first._replace(stop=4), second])
    route = implementation("gemm")
    for made, need_dx in ((call, True), (halves, True), (call, False)):
        _, saved = route.forward(x, bias, made)
        route.backward(grad, x, saved, made, need_dx)


def variants(capability, dtype, row, p=0.1, r=32):
    """{(kernel, constants): (arguments, blocks)} of `all_launches`."""
    found = {}

    def capture(kernel, grid, arguments, constants, blocks):
        found.setdefault((kernel, tuple(sorted(constants.items()))), (arguments, blocks))

    with launches_to(capture, capability, row):
        all_launches(dtype, p, r)
    return found


def dump(kernel, flag):
    """What `cuobjdump` prints of a compiled kernel."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout


def inspect(kernel):
    """Registers and stack, and tensor-core instructions."""
    usage = dump(kernel, "-res-usage")
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    kinds = r"(?:wg)?mma[\w.]*?\.m\d+n\d+k\d+|tcgen05\.mma"
    mma = sorted(set(re.findall(kinds, kernel.asm["ptx"])))
    return registers, stack, mma


@cache
def loop_classes(kernel):
    """The classes of the inner loop's SASS, for which the disassembler takes half a second."""
    sass = dump(kernel, "-sass")
    code = [(int(a, 16), t.strip()) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loop = []
    for address, text in code:
        branch = re.search(r"BRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            body = [t for a, t in code if int(branch[1], 16) <= a <= address]
            # The innermost of nested loops is the one that counts.
            if (
                not loop
                or any("MMA" in t for t in body) > any("MMA" in t for t in loop)
                or (len(body) < len(loop) and any("MMA" in t for t in body))
            ):
                loop = body
    classes = collections.Counter()
    for text in loop:
        op = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        classes[next((f for f in FAMILIES if f in op), "ALU")] += 1
    return classes
