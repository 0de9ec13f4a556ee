"""What only a GPU can show: graphs, Inductor, and the T4's code path on a newer chip."""

import pytest
import torch
from oracle import SEED, check, lora_qkv, make

from fastlora.kernels import Packed, Term, forced_route, lora_grouped
from fastlora.kernels.autograd import lora
from fastlora.kernels.triton import tuning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def problem():
    """x [256, 128], weight [384, 128], adapters of query and value, in fp16 and fp32."""
    torch.manual_seed(0)
    x = torch.randn(256, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    weight = torch.randn(384, 128, device="cuda", dtype=torch.float16) / 11
    adapters = {
        name: (
            torch.randn(8, 128, device="cuda").requires_grad_(),
            torch.randn(128, 8, device="cuda").requires_grad_(),
        )
        for name in ("query", "value")
    }
    return x, weight, adapters


def gradients(y, x, adapters):
    leaves = [x, *(factor for pair in adapters.values() for factor in pair)]
    return torch.autograd.grad(y.float().square().sum(), leaves)


def test_compiled_by_inductor(problem):
    x, weight, adapters = problem
    torch._dynamo.reset()  # nothing guards the route
    with forced_route("gemm"):
        plain = lora_qkv(x, weight, None, adapters, 0.5, 0.1, SEED)
        op = torch.compile(lora_qkv, fullgraph=True)
        compiled = op(x, weight, None, adapters, 0.5, 0.1, SEED)
        torch.testing.assert_close(compiled, plain)
        for mine, theirs in zip(
            gradients(compiled, x, adapters), gradients(plain, x, adapters), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-1)


def test_rows_of_two_adapters_compiled_by_inductor(problem):
    x, weight, adapters = problem
    torch._dynamo.reset()

    def op(x, weight, factors):
        terms = [
            Term(A, B, 0.5, 0.1, stream=i, start=start, stop=stop, column=128 * i)
            for i, ((A, B), start, stop) in enumerate(
                zip(factors, (0, 100), (100, 256), strict=True)
            )
        ]
        return lora_grouped(x, weight, None, terms, SEED)

    with forced_route("gemm"):
        factors = list(adapters.values())
        plain, compiled = (f(x, weight, factors) for f in (op, torch.compile(op, fullgraph=True)))
        torch.testing.assert_close(compiled, plain)
        for mine, theirs in zip(
            gradients(compiled, x, adapters), gradients(plain, x, adapters), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("rows", [((0, 9), (0, 9)), ((2, 9), (0, 4))])
def test_opcheck(rows):
    like = dict(device="cuda", requires_grad=True)
    factors = [torch.randn(shape, **like) for _ in rows for shape in ((3, 8), (4, 3))]
    places = [place for i, ends in enumerate(rows) for place in (i, *ends, 4 * i)]
    x, bias, weight = (torch.randn(shape, device="cuda") for shape in ((9, 8), (8,), (8, 8)))
    arguments = (
        x.requires_grad_(),
        bias,
        weight,
        factors,
        SEED,
        [1.0, 0.1, 2.0, 0.1],
        places,
        "gemm",
    )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]  # as in test_ops.py
    checks += ["test_aot_dispatch_dynamic"] * (rows[0] == rows[1])
    torch.library.opcheck(lora, arguments, test_utils=checks)


def captured(step):
    """A CUDA graph of a step, warmed up as PyTorch asks for, and what it computes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    return graph, static


@pytest.mark.parametrize("owned", [False, True])
def test_graph_replays_draw_new_masks_and_use_new_factors(problem, owned):
    """With a `Packed`, and, without one, on the plain path."""
    x, weight, adapters = problem
    packed = Packed() if owned else None

    def step():
        y = lora_qkv(x, weight, None, adapters, 0.5, 0.5, packed=packed)
        return [y, *gradients(y, x, adapters)]

    with forced_route("gemm"):
        graph, static = captured(step)
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append([t.clone() for t in static])
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert all(t.isfinite().all() for t in outputs[1])
    with torch.no_grad():
        for pair in adapters.values():
            pair[1].zero_()
    graph.replay()
    torch.testing.assert_close(static[0], x @ weight.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_reads_no_memory_that_was_given_away(problem, autocast):
    """What it reads stays with the `Packed`, also when that has forgotten the weight."""
    x, weight, adapters = problem
    packed = Packed()
    x, weight = (t.detach().float() if autocast else t.detach() for t in (x, weight))

    def step():
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            return lora_qkv(x, weight, None, adapters, 0.5, 0.1, SEED, packed)

    with forced_route("gemm"):
        graph, y = captured(step)
    graph.replay()
    expected = y.clone()
    packed.clear()
    taken = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 10, 1 << 18) * 64]
    graph.replay()
    assert torch.equal(y, expected)
    assert all(t.isnan().all() for t in taken)


def test_a_gradient_is_the_same_bits_each_time(problem):
    x, weight, adapters = problem
    with forced_route("gemm"):
        runs = [
            gradients(lora_qkv(x, weight, None, adapters, 0.5, 0.1, SEED), x, adapters)
            for _ in range(3)
        ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("without", [0, 1])  # rows without terms, which take other kernels
def test_the_code_path_of_a_t4(without):
    from compiled import aot
    from native_ptx import launch

    names = []

    def execute(kernel, grid, arguments, constants, blocks):
        compiled = aot.compile_launch(75, kernel, arguments, constants, blocks)
        names.append(kernel.__name__)
        passed = aot.passed(kernel, arguments)
        if all(grid):
            launch(compiled.asm["ptx"], kernel.__name__, grid, passed, compiled.metadata.shared)

    H = 96
    inputs = make(500, H, 3 * H, [(32, H), (17, H)])

    def terms(factors):
        places = zip(factors, (0, 2), strict=True)
        return [Term(*f, 2.0, 0.1, b, 0, 500 - without, b * H) for f, b in places]

    with aot.launches_to(execute, 75, tuning.SHIPPED["75/fp16"]):
        check("gemm", inputs, terms, torch.float16)
    assert {"lora_down", "lora_outer"} <= set(names)
