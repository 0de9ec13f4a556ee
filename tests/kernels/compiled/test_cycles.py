"""The T4 cycle model of every shipped kernel, held against a committed table.

After a change that is meant: `FASTLORA_WRITE_CYCLES=1 pytest` on this file writes the table anew.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import triton
from compiled import aot, sm75_cycles

from fastlora.kernels.triton import tuning
from fastlora.kernels.triton.grouped import Plan

TABLE = Path(__file__).with_name("sm75_cycles.json")
GATE = 0.05


def measured():
    """{kernel and flags: units taken and simulated cycles, a turn} of the sm_75 launches."""
    table = {}
    row = tuning.SHIPPED["75/fp16"]
    for (kernel, constants), (arguments, blocks) in aot.variants(75, torch.float16, row).items():
        compiled = aot.compile_launch(75, kernel, arguments, dict(constants), blocks)
        body = sm75_cycles.main_loop(sm75_cycles.decode(compiled))
        flags = [name for name, value in constants if value is True]
        simulated = {
            str(n): round(sm75_cycles.simulate(body, max(1, blocks.warps // 4) * n) / n)
            for n in (2, 4)  # blocks on an SM
        }
        units = sm75_cycles.taken(body, blocks.warps)
        table[" ".join((kernel.__name__, *sorted(flags)))] = units | simulated
    return table


@pytest.fixture(scope="module")
def cycles():
    return measured()


def test_no_kernel_takes_other_cycles_than_the_table_says(cycles, capsys):
    if os.environ.get("FASTLORA_WRITE_CYCLES"):
        TABLE.write_text(json.dumps({"triton": triton.__version__, "cycles": cycles}, indent=1))
    committed = json.loads(TABLE.read_text())
    with capsys.disabled():
        print("\ncycles of a T4's SM, a turn of one block (computed, not measured)")
        for name, row in cycles.items():
            print(f"{name:<36}", "  ".join(f"{unit} {value}" for unit, value in row.items()))
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {committed['triton']}, here is {triton.__version__}")
    assert cycles.keys() == committed["cycles"].keys()
    for name, row in cycles.items():
        for unit, value in row.items():
            known = committed["cycles"][name][unit]
            assert abs(value - known) <= GATE * known, f"{name}: {unit} {known} -> {value}"


def test_the_layer_added_up(cycles, capsys, monkeypatch):
    blocks = tuning.SHIPPED["75/fp16"]
    own = [
        cycles["lora_down HAS_COPY HAS_DROPOUT"]["4"] / (blocks.down.m * blocks.down.k),
        cycles["lora_add HAS_DROPOUT"]["4"] / (blocks.add.m * blocks.add.n),
        cycles["lora_outer HAS_DROPOUT"]["2"] / (blocks.outer.m * blocks.outer.k),
    ]
    x, *_, call = aot.sample(torch.float16, M=4096)
    monkeypatch.setattr(tuning, "programs", lambda _device: 2 * sm75_cycles.SMS)
    with aot.launches_to(None, 75, blocks):
        chunks = -(-4096 // Plan(call, x).chunk(768 // blocks.outer.k))
    assert chunks * 2 * 768 // blocks.outer.k <= 2 * sm75_cycles.SMS
    for clock in sm75_cycles.CLOCKS:
        parts = sm75_cycles.layer(own, clock, chunks)
        ratio = sum(parts.values()) / next(iter(parts.values()))
        with capsys.disabled():
            print(f"\nquery, key and value on a T4 at {clock / 1e9} GHz, computed: {ratio:.3f}x")
            print("  ".join(f"{name} {value:.0f} us" for name, value in parts.items()))
        assert ratio <= 1.25
        # The kernels are bound by their bytes, whatever the clock.
        element = 4096 * 768 * 2 / sm75_cycles.DRAM * 1e6
        assert [parts["dx"], parts["dA"]] == pytest.approx([2 * element, element])
