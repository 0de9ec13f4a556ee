"""Every shipped configuration compiled for GPUs from T4 to Blackwell, with none: what that made.

Prints a table: registers, spills, shared memory, tensor-core instruction, instructions a dropout
element, and for the T4 the bound from bytes, tensor cores and issue for M = 4096, H = 768, r = 32.
"""

import pytest
import torch
import triton
from compiled import aot

from fastlora.kernels.triton import tuning

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = [
    (75, HALF, "75/fp16"),
    (75, SINGLE, "any/fp32"),
    *[(80, dtype, row) for dtype in (HALF, BRAIN) for row in ("any", "80/small", "80")],
    (80, SINGLE, "any/fp32"),
    *[(90, dtype, row) for dtype in (HALF, BRAIN) for row in ("90/small", "90")],
    (90, SINGLE, "any/fp32"),
    *[(chip, dtype, "any") for chip in (89, 100, 120) for dtype in (HALF, BRAIN)],
]
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
SHARED_LIMIT |= {100: 227 << 10, 120: 99 << 10}
ALU_LIMIT = 12
M, H, R = 4096, 768, 32
# A T4: SMs, clock, DRAM bytes/s, fp16 tensor FLOP/s; instructions an SM issues and its integer
# and float lanes take, a clock.
SMS, CLOCK, BYTES, FLOPS, ISSUE, LANES = 40, 1.59e9, 320e9, 65e12, 4, 2
rows = []


def bound(name, c, classes, warps):
    """Microseconds that a kernel cannot beat on a T4, and which bound that is."""
    depth = H  # of g in down and outer with IN_BLOCK, a block's width; else K
    tiles, slots = -(-M // c["BLOCK_M"]), c["SLOTS"]
    if name == "lora_down":
        loops, moved = slots * tiles * -(-depth // c["BLOCK_K"]), M * H * (1 + c["HAS_COPY"])
        moved, flops = moved * (slots if c["IN_BLOCK"] else 1), 2 * M * H * R * slots
    elif name == "lora_outer":
        loops = -(-depth // c["BLOCK_K"]) * tiles * slots
        moved, flops = M * H * (slots if c["IN_BLOCK"] else 1), 2 * M * H * R * slots
    else:
        columns = 3 * H if c["IN_BLOCK"] else H
        loops, moved = tiles * -(-columns // c["BLOCK_N"]) * slots, 2 * M * columns
        flops = 2 * M * H * R * slots
    issued = loops * warps * sum(classes.values()) / (ISSUE * SMS * CLOCK)
    lanes = loops * warps * classes["ALU"] / (LANES * SMS * CLOCK)
    bounds = {
        "bytes": 2 * moved / BYTES,
        "tensor cores": flops / FLOPS,
        "issue": max(issued, lanes),
    }
    which = max(bounds, key=bounds.get)
    return 1e6 * bounds[which], which


def dropout_cost(capability, dtype, row, key, compiled, threads):
    """ALU instructions an element that the mask adds to a kernel's inner loop."""
    kernel, constants = key
    plain = dict(constants, HAS_DROPOUT=False)
    for (other, facts), (arguments, blocks) in aot.variants(capability, dtype, row, p=0.0).items():
        if other is kernel and dict(facts) == plain:
            other = aot.compile_launch(capability, kernel, arguments, plain, blocks)
            without = aot.loop_classes(other)
            added = aot.loop_classes(compiled)["ALU"] - without["ALU"]
            return added * threads / (plain["BLOCK_M"] * (plain.get("BLOCK_K") or plain["BLOCK_N"]))
    raise AssertionError(f"{kernel.__name__} has no variant without dropout")


@pytest.mark.parametrize(("capability", "dtype", "row_name"), CASES)
def test_shipped_configuration(capability, dtype, row_name):
    row = tuning.SHIPPED[row_name]
    for key, (arguments, blocks) in aot.variants(capability, dtype, row).items():
        kernel, constants = key
        c = dict(constants)
        compiled = aot.compile_launch(capability, kernel, arguments, c, blocks)
        registers, stack, mma = aot.inspect(compiled)
        name = kernel.__name__
        flags = "+".join(f for f in sorted(c) if c[f] is True) or "-"
        alu = time = ""
        if c.get("HAS_DROPOUT") and dtype != SINGLE:
            cost = dropout_cost(capability, dtype, row, key, compiled, 32 * blocks.warps)
            alu = f"{cost:.1f}"
            assert cost <= ALU_LIMIT, f"{name} {flags}: {cost:.1f} instructions an element"
        if capability == 75 and dtype == HALF:
            classes = aot.loop_classes(compiled)
            time = "{:.0f} us ({})".format(*bound(name, c, classes, blocks.warps))
        dtype_name = tuning.DTYPE_NAMES[dtype]
        rows.append(
            (f"sm_{capability}", dtype_name, row_name, name, flags.replace("HAS_", "").lower(),
             registers, stack, compiled.metadata.shared, ",".join(mma) or "-", alu, time)
        )  # fmt: skip
        assert stack == 0, f"{name} {flags} spills {stack} bytes"
        assert compiled.metadata.shared <= SHARED_LIMIT[capability]
        if dtype != SINGLE:
            assert mma, f"{name} {flags} has no tensor-core instruction"


@pytest.mark.parametrize(("capability", "dtype", "row_name"), CASES)
def test_widest_tiles_of_ranks(capability, dtype, row_name):
    """A tile has up to 64 ranks; the table is of 32."""
    found = aot.variants(capability, dtype, tuning.SHIPPED[row_name], r=64)
    for (kernel, constants), (arguments, blocks) in found.items():
        compiled = aot.compile_launch(capability, kernel, arguments, dict(constants), blocks)
        _, stack, mma = aot.inspect(compiled)
        name = f"{kernel.__name__} {dict(constants)}"
        assert stack == 0, f"{name} spills {stack} bytes"
        assert compiled.metadata.shared <= SHARED_LIMIT[capability]
        assert mma or dtype == SINGLE, name


def test_table(capsys):
    gemm = max(2 * M * 3 * H * H / FLOPS, 2 * M * 4 * H / BYTES)
    header = ("chip", "type", "row", "kernel", "flags", "regs", "stack", "shared", "mma",
              "alu/elem", "T4 bound")  # fmt: skip
    widths = [max(len(str(r[i])) for r in (*rows, header)) for i in range(len(header))]
    with capsys.disabled():
        print(f"\nTriton {triton.__version__}; M = {M}, H = {H}, r = {R}; on a T4 the frozen GEMM "
              f"is bound to {1e6 * gemm:.0f} us (computed, not measured)")  # fmt: skip
        for line in (header, *rows):
            print("  ".join(f"{cell!s:<{w}}" for cell, w in zip(line, widths, strict=True)))
    assert rows
