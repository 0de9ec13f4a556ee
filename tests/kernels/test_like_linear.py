"""What `nn.Linear` and plain low-rank products can do, the operation can do, on every route."""

import pytest
import torch
from oracle import DEVICE, DTYPES, NAMES, SEED, judge, make, reference, same_mask
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from fastlora.kernels import Linear, Packed, Term, forced_route, lora_grouped, lora_linear

M, K, N, R = 14, 16, 24, 4
ROUTES = pytest.mark.parametrize("route", NAMES)


@pytest.fixture
def problem():
    """x, weight, bias, A, B in fp32."""
    torch.manual_seed(0)
    return [torch.randn(s, device=DEVICE) for s in ((M, K), (N, K), (N,), (R, K), (N, R))]


def assert_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def merged(weight, A, B, scale):
    return weight + scale * B @ A


@ROUTES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_autocast_with_fp32_parameters(route, packed, trains):
    """The output is in the half type, gradients are in fp32, and so is a trainable bias's."""
    half = torch.bfloat16 if route == "reference" or torch.bfloat16 in DTYPES else torch.float16
    x, weight, bias, grad, factors = make(M, K, N, [(R, N)])
    owned = [Packed()] if packed else []

    def run(op, dtype, autocast, *more):
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in (x, *factors[0])]
        b = bias.to(DEVICE, dtype).requires_grad_(trains)
        with torch.autocast(DEVICE, half, enabled=autocast):
            y = op(
                leaves[0], weight.to(DEVICE, dtype), b, [Term(*leaves[1:], 0.5, 0.2)], SEED, *more
            )
        return [y, *torch.autograd.grad(y, [*leaves, b][: 3 + trains], grad.to(DEVICE, y.dtype))]

    mask = same_mask(route)
    truth, theirs = (
        run(reference, dtype, autocast, mask)
        for dtype, autocast in ((torch.float64, False), (torch.float32, True))
    )
    with forced_route(route):
        ours = run(lora_grouped, torch.float32, True, *owned)
    assert [t.dtype for t in ours] == [half, *[torch.float32] * (3 + trains)]
    judge(route, ours, theirs, truth, half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_double_precision_under_autocast(dtype, problem):
    """PyTorch's own products leave it as it is, too; no kernel of Triton's takes it."""
    x, weight, bias, A, B = (t.double() for t in problem)
    leaves = [t.requires_grad_() for t in (x, A, B.float())]
    with forced_route("reference"), torch.autocast(DEVICE, dtype):
        y = lora_linear(leaves[0], weight, bias, *leaves[1:], 0.5)
    assert y.dtype == torch.float64
    expected = linear(x, merged(weight, A, leaves[2].double(), 0.5), bias)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), leaves))
    with pytest.raises(RuntimeError), torch.autocast(DEVICE, dtype):
        lora_linear(x.float(), weight, bias, A, B, 0.5)


@ROUTES
@pytest.mark.parametrize("packed", [None, Packed()], ids=["plain", "packed"])
def test_no_terms(route, packed, problem):
    x, weight, bias, *_ = problem
    leaves = x.requires_grad_(), bias.requires_grad_()
    with forced_route(route):
        y = lora_grouped(x, weight, bias, (), packed=packed)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaves)
    plain = linear(x, weight, bias)
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad(plain.square().sum(), leaves, create_graph=True)
    assert_same(first, expected)
    assert_same(second, torch.autograd.grad(expected[0].square().sum(), leaves))


@ROUTES
@pytest.mark.parametrize("seed", [None, 5])
def test_meta_device(route, seed, problem):
    x, weight, bias, A, B = (t.to("meta") for t in problem)
    seed = None if seed is None else torch.tensor(seed, device="meta")
    terms = [Term(A, B, 0.5, 0.1), Term(A, B[:8], 0.5, 0.1, start=2, stop=5, column=8)]
    with forced_route(route):
        y = lora_grouped(x.view(2, M // 2, K), weight, bias, terms, seed)
        assert Linear(K, N, device="meta").requires_grad_(False)(x).shape == (M, N)
    assert y.device.type == "meta"
    assert y.shape == (2, M // 2, N)


@ROUTES
def test_fake_tensors(route, problem):
    with forced_route(route), FakeTensorMode() as mode:
        x, weight, bias, A, B = (mode.from_tensor(t) for t in problem)
        y = lora_linear(x, weight, bias, A.requires_grad_(), B, 0.5, 0.1)
        assert y.shape == (M, N)
        y.sum().backward()
        assert A.grad.shape == A.shape


@ROUTES
def test_jagged_sentences(route, problem):
    """Nested tensors of sentences without padding, for which PyTorch draws the masks."""
    x, weight, bias, A, B = problem
    A.requires_grad_()
    sentences = [x[:3], x[3:8], x[8:]]
    nested = torch.nested.nested_tensor(sentences, layout=torch.jagged)
    with forced_route(route):
        y = lora_linear(nested, weight, bias, A, B, 0.5)
        (found,) = torch.autograd.grad(y.values().sum(), A)
        dropped = lora_linear(nested, weight, bias, A, B, 0.5, 0.9)
    expected = linear(x, merged(weight, A, B, 0.5), bias)
    torch.testing.assert_close(y.values(), expected, rtol=1e-4, atol=1e-4)
    (plain,) = torch.autograd.grad(expected.sum(), A)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dropped.values(), expected)


class Marked(torch.Tensor):
    """A subclass, as others use for sharded or quantised tensors."""


@ROUTES
def test_subclasses_of_tensors(route, problem):
    x, weight, bias, A, B = problem
    expected = linear(x, merged(weight, A, B, 0.5), bias)
    with forced_route(route):
        for marked in range(5):
            inputs = [t.as_subclass(Marked) if i == marked else t for i, t in enumerate(problem)]
            y = lora_linear(*inputs, 0.5)
            assert isinstance(y, Marked)
            torch.testing.assert_close(y.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4)


@ROUTES
def test_flop_counter(route, problem):
    """Forward and backward count at least the base layer's, and the low-rank products with them."""
    x, weight, bias, A, B = problem
    x.requires_grad_()

    def count(op):
        with FlopCounterMode(display=False) as counter:
            op().sum().backward()
        return counter.get_total_flops()

    with forced_route(route):
        ours = count(lambda: lora_linear(x, weight, bias, A, B, 0.5, 0.1))
    base = count(lambda: linear(x, weight, bias))
    assert base == 4 * M * N * K
    assert ours >= base + 4 * M * R * (N + K)


@ROUTES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(route, problem):
    x, *rest = problem
    with forced_route(route):
        traced = torch.jit.trace(lambda x: lora_linear(x, *rest, 0.5), x)
        torch.testing.assert_close(traced(x[:5]), lora_linear(x[:5], *rest, 0.5))


@ROUTES
@pytest.mark.parametrize("shape", [(M, K), (2, M // 2, K), (K,)])
def test_the_output_can_be_changed_in_place(route, shape, problem):
    x, weight, bias, A, B = problem
    x = x.flatten()[: torch.Size(shape).numel()].view(shape)
    A.requires_grad_()
    with forced_route(route):
        y = lora_linear(x, weight, bias, A, B, 0.5).mul_(2).relu_()
        (found,) = torch.autograd.grad(y.square().sum(), A)
    plain = linear(x, merged(weight, A, B, 0.5), bias).mul(2).relu()
    (expected,) = torch.autograd.grad(plain.square().sum(), A)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@ROUTES
def test_rows_that_share_their_memory(route, problem):
    x, weight, bias, A, B = problem
    with forced_route(route):
        y = lora_linear(x[:1].expand(5, K), weight, bias, A, B, 0.5)
    expected = linear(x[:1], merged(weight, A, B, 0.5), bias).expand(5, N)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@ROUTES
@pytest.mark.parametrize("seed", [False, True])
def test_whatever_the_default_device_is(route, seed, problem):
    """What is cached must not lie there: so these have sizes and rates that no other test has."""
    x, *rest = problem
    x, p = x[: 11 + seed], 0.123 + 0.1 * seed
    with forced_route(route):
        torch.set_default_device("meta")
        try:
            y = lora_linear(x, *rest, 0.5, p, SEED if seed else None)
        finally:
            torch.set_default_device(None)
        assert y.isfinite().all()
        if seed:
            assert torch.equal(lora_linear(x, *rest, 0.5, p, SEED), y)


def test_few_rows_on_a_cpu_draw_the_masks_that_many_do(problem):
    """Plain PyTorch computes them, with the same masks from a seed."""
    x, weight, bias, A, B = problem
    terms = [Term(A.requires_grad_(), B.requires_grad_(), 0.5, 0.3, stream=2, start=3)]

    def run():
        y = lora_grouped(x, weight, bias, terms, SEED)
        return [y, *torch.autograd.grad(y.square().sum(), (A, B))]

    few = run()
    with forced_route("reference"):
        assert_same(few, run())


def test_two_losses_of_one_optimiser():
    """A step leaves the other loss's parameters as they are; no hook of ours counts a change."""
    layers = [torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2))) for _ in range(2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer, x = torch.optim.AdamW(parameters), torch.randn(3, 4)
    first, second = (layer(x).square().sum() for layer in layers)
    versions = [p._version for p in layers[1].parameters()]
    first.backward()
    optimizer.step()
    assert [p._version for p in layers[1].parameters()] == versions
    second.backward()
