"""A GPU's code path without the GPU: each kernel's PTX, executed on the CPU.

Forward and backward run so, small and odd shapes, and are judged as every route is: as compiled for
a T4, and for an A100 and an L4, where copies run in the background and bf16 has tensor cores.
"""

import pytest
import torch
from compiled import aot, ptx_cpu
from oracle import check, make

from fastlora.kernels import Term
from fastlora.kernels.triton import tuning

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="PTX is run where no GPU is")
T4 = (75, torch.float16, "75/fp16")
# The rows "any", "80/small" and "80" copy for two and for three turns of the loop.
NEWER = [(80, torch.float16, "80"), (80, torch.bfloat16, "80/small"), (89, torch.bfloat16, "any")]


@pytest.fixture
def chip(request):
    """Capability, dtype, and the name of the row of block sizes."""
    return getattr(request, "param", T4)


@pytest.fixture
def executed(chip):
    """Names of the kernels that ran from their PTX, and whether they copy in the background."""
    names, (capability, _, row) = [], chip

    def execute(kernel, grid, arguments, constants, blocks):
        compiled = aot.compile_launch(capability, kernel, arguments, constants, blocks)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ("m16n8k16" if capability >= 80 else "m16n8k8") in ptx
        names.append(kernel.__name__)
        names.extend(["a copy in the background"] * ("cp.async" in ptx))
        if not all(grid):
            return
        passed = aot.passed(kernel, arguments)
        ptx_cpu.run(compiled.asm["ptx"], grid, passed, compiled.metadata.shared)

    with aot.launches_to(execute, capability, tuning.SHIPPED[row]):
        yield names


@pytest.mark.parametrize("without", [0, 1])  # rows without the term, which takes other kernels
@pytest.mark.parametrize(
    ("M", "K", "N", "r", "p"),
    [(37, 72, 80, 17, 0.1), (70, 64, 64, 32, 0.1), (5, 33, 41, 5, 0.5), (16, 80, 72, 8, 0.0)],
)
def test_one_projection(executed, without, M, K, N, r, p):
    inputs = make(M, K, N, [(r, N)])
    check("gemm", inputs, lambda f: [Term(*f[0], 0.5, p, 7, 0, M - without)], torch.float16)
    assert {"lora_down", "lora_outer"} <= set(executed)
    assert executed.count("lora_add") == 1 + without  # for dx, and for y


def test_an_input_without_gradient(executed):
    inputs = make(37, 72, 80, [(17, 80)])
    check("gemm", inputs, lambda f: [Term(*f[0], 0.5, 0.1, stream=7)], torch.float16, need_dx=False)
    assert set(executed) == {"lora_down", "lora_outer"}


@pytest.mark.parametrize("chip", NEWER, indirect=True)
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize(("M", "K", "N", "r", "p"), [(37, 272, 208, 16, 0.1), (5, 33, 41, 5, 0.5)])
def test_one_projection_on_newer_gpus(executed, chip, without, M, K, N, r, p):
    inputs = make(M, K, N, [(r, N)])
    check("gemm", inputs, lambda f: [Term(*f[0], 0.5, p, 7, 0, M - without)], chip[1])
    assert {"lora_down", "lora_outer"} <= set(executed)
    assert ("a copy in the background" in executed) == (K % 16 == 0)  # they are of 16 bytes


def test_packed_query_and_value(executed):
    H = 48
    inputs = make(50, H, 3 * H, [(8, H), (8, H)])

    def terms(factors):
        places = zip(factors, (0, 2), strict=True)
        return [Term(*f, 2.0, 0.1, stream=b, column=b * H) for f, b in places]

    check("gemm", inputs, terms, torch.float16)


def test_rows_of_several_adapters(executed):
    H = 32
    inputs = make(60, H, 3 * H, [(3, H), (17, H), (8, H)])

    def terms(f):
        return [
            Term(*f[0], 2.0, 0.1, stream=1, start=0, stop=23, column=0),
            Term(*f[1], 0.5, 0.5, stream=2, start=10, stop=40, column=2 * H),
            Term(*f[2], 1.0, 0.0, stream=3, start=30, stop=30, column=H),
        ]

    check("gemm", inputs, terms, torch.float16)
    assert "lora_add" in executed
