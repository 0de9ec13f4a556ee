"""Derivatives of every kind and of every input, on each route, against PyTorch's own."""

import pytest
import torch
from oracle import DEVICE, DTYPES, NAMES, SEED, check, make, reference, same_mask
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacrev, jvp, vmap

from fastlora.kernels import Term, forced_route, lora_grouped, lora_linear

# From within PyTorch's forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

M, K, N = 14, 16, 24
ROUTES = pytest.mark.parametrize("route", NAMES)
ROWS = pytest.mark.parametrize("ranged", [False, True], ids=["uniform", "ranged"])


def terms(factors, ranged, p=0.2):
    """Two terms on two blocks of the output, or one on some rows and one on others."""
    ends = ((0, 9), (5, 12)) if ranged else ((0, None), (0, None))
    return [
        Term(*pair, 0.5, p, stream=i, start=start, stop=stop, column=i * N // 2)
        for i, (pair, (start, stop)) in enumerate(zip(factors, ends, strict=True))
    ]


def problem():
    return make(M, K, N, [(3, N // 2), (8, N // 2)])


def tensors(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]


def assert_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@ROUTES
@ROWS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trains", [("bias",), ("weight",), ("weight", "bias")], ids="+".join)
def test_trainable_weight_and_bias(route, ranged, dtype, trains):
    mask = same_mask("reference") if "weight" in trains else None
    check(route, problem(), lambda f: terms(f, ranged), dtype, trains=trains, mask=mask)


@ROUTES
@ROWS
@pytest.mark.parametrize("need_dx", [True, False])
def test_gradient_penalty(route, ranged, need_dx):
    """The gradients of the squares of all gradients, with dropout and a trainable bias."""
    how = dict(trains=("bias",), penalty=True)
    check(route, problem(), lambda f: terms(f, ranged), torch.float32, need_dx, **how)


@ROUTES
def test_gradient_penalty_on_the_slope_alone(route):
    """As in WGAN-GP: the slope is a function of x, A and B, and the loss has other parts."""
    x, weight, A, B = tensors((M, K), (N, K), (4, K), (N, 4))
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def loss(op):
        y = op(x, weight, None, [Term(A, B, 0.5, 0.2)], SEED)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.mean() + (slope.norm(dim=-1) - 1).square().mean(), leaves)

    with forced_route(route):
        found = loss(lora_grouped)
    assert_same(found, loss(lambda *a: reference(*a, mask=same_mask(route))))


@ROUTES
def test_an_adapter_that_two_layers_share(route):
    """With `create_graph`, too, each layer adds its own part of the gradient and no other's."""
    x, weight, A, B = tensors((M, K), (K, K), (4, K), (K, 4))
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def op(op, x):
        return op(x, weight / K, None, [Term(A, B, 0.1, 0.2)], SEED)

    def both_orders(form):
        y = op(form, op(form, x)).square().sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().mean() for g in first), leaves)]

    with forced_route(route):
        found = both_orders(lora_grouped)
        y = op(lora_grouped, op(lora_grouped, x)).square().sum()
        assert_same(torch.autograd.grad(y, leaves), found[:3])
    assert_same(found, both_orders(lambda *a: reference(*a, mask=same_mask(route))))


@ROUTES
def test_second_derivative_where_only_the_bias_trains(route):
    x, weight, bias, A, B = tensors((M, K), (N, K), (N,), (4, K), (N, 4))
    bias.requires_grad_()
    with forced_route(route):
        y = lora_linear(x, weight, bias, A, B, 0.5)
        (first,) = torch.autograd.grad(y.square().sum(), bias, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), bias)
    torch.testing.assert_close(second, torch.full_like(bias, 2.0 * M))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_both_orders(p):
    x, weight, *rest = tensors((4, 5), (6, 5), (6,), (2, 5), (6, 2), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, *rest)]

    def op(x, bias, A, B):
        return lora_linear(x, weight, bias, A, B, 0.7, p, SEED)

    with forced_route("reference"):
        assert torch.autograd.gradcheck(op, inputs)
        assert torch.autograd.gradgradcheck(op, inputs)


@ROUTES
def test_third_derivatives(route):
    x, weight, A, B = tensors((3, K), (N, K), (4, K), (N, 4))
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def third(op):
        y = op(x, weight, None, [Term(A, B, 0.5)]).pow(4).mean()
        for _ in range(2):
            parts = torch.autograd.grad(y, leaves, create_graph=True)
            y = sum(part.square().mean() for part in parts)
        return torch.autograd.grad(y, leaves)

    with forced_route(route):
        found = third(lora_grouped)
    for mine, other in zip(found, third(reference), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@ROUTES
def test_many_gradients_at_once(route):
    """`is_grads_batched`, which vectorised Jacobians and Hessians use, and vmap over backward."""
    x, weight, bias, A, B, many = tensors((M, K), (N, K), (N,), (4, K), (N, 4), (3, M, N))
    leaves = [t.requires_grad_() for t in (x, bias, A, B)]
    with forced_route(route):
        y = lora_linear(x, weight, bias, A, B, 0.5)
        batched = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)

        def backward(grad):
            return torch.autograd.grad(y, leaves, grad, retain_graph=True)

        mapped = vmap(backward)(many)
        one_by_one = [backward(grad) for grad in many]
        linear = lambda x: lora_linear(x, weight, bias, A, B, 0.5)  # noqa: E731
        slopes = jacobian(lambda x: linear(x).sum(0), x, vectorize=True)
        curves = hessian(lambda x: linear(x).square().sum(), x[:2].detach(), vectorize=True)
    expected = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
    assert_same(batched, expected)
    assert_same(mapped, expected)
    merged = weight + 0.5 * B @ A
    torch.testing.assert_close(slopes, merged[:, None].expand(N, M, K), rtol=1e-4, atol=1e-4)
    block = 2 * merged.T @ merged
    torch.testing.assert_close(curves[0, :, 0], block, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(curves[1, :, 1], block, rtol=1e-4, atol=1e-4)


class Adapted(torch.nn.Module):
    """A frozen layer with two terms of half of its rows and columns each."""

    def __init__(self, op):
        super().__init__()
        self.op = op
        weight, bias, *factors = tensors((N, K), (N,), (4, K), (N // 2, 4), (2, K), (N, 2))
        self.weight, self.bias = (torch.nn.Parameter(t, False) for t in (weight, bias))
        self.factors = torch.nn.ParameterList(factors)

    def forward(self, x):
        A, B, C, D = self.factors
        parts = [Term(A, B, 0.5, column=N // 2, start=0, stop=2), Term(C, D, 2.0)]
        return self.op(x, self.weight, self.bias, parts)


def transforms(layer, x):
    """What `torch.func` makes of a layer and inputs [samples, rows, K]."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    return [
        vmap(layer)(x),
        *grad(loss)(parameters, x).values(),
        *vmap(grad(loss), in_dims=(None, 0))(parameters, x).values(),  # per sample
        *jvp(layer, (x,), (x.flip(0),)),
        jacrev(lambda x: layer(x).sum(1))(x[0]),
    ]


@ROUTES
def test_torch_func(route):
    (x,) = tensors((5, 3, K))
    with forced_route(route):
        found = transforms(Adapted(lora_grouped), x)
    assert_same(found, transforms(Adapted(reference), x))


@ROUTES
def test_vmap_with_a_seed_draws_one_mask_for_all_samples(route):
    x, weight, A, B = tensors((5, M, K), (N, K), (4, K), (N, 4))

    def op(x):
        return lora_linear(x, weight, None, A, B, 0.5, 0.4, SEED)

    with forced_route(route):
        found = vmap(op)(x)
    plain = [reference(part, weight, None, [Term(A, B, 0.5, 0.4)], SEED) for part in x]
    torch.testing.assert_close(found, torch.stack(plain), rtol=1e-4, atol=1e-4)


@ROUTES
def test_forward_mode(route):
    x, weight, A, B, *directions = tensors((M, K), (N, K), (4, K), (N, 4), (M, K), (4, K), (N, 4))

    def derivative(op):
        with forward_ad.dual_level():
            pairs = zip((x, A, B), directions, strict=True)
            dual, A_dual, B_dual = (forward_ad.make_dual(*pair) for pair in pairs)
            y = op(dual, weight, None, [Term(A_dual, B_dual, 0.5, 0.2)], SEED)
            return tuple(forward_ad.unpack_dual(y))

    with forced_route(route):
        found = derivative(lora_grouped)
    assert_same(found, derivative(reference))


@ROUTES
@pytest.mark.parametrize("shape", [(0, K), (3, 0, K)])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_batch_without_rows_gives_zeros(route, shape, trainable):
    x, weight, bias, *factors = tensors(shape, (N, K), (N,), (4, K), (N, 4), (2, K), (N, 2))
    leaves = [t.requires_grad_() for t in (x, *factors, *([weight, bias] if trainable else []))]
    parts = [Term(*factors[:2], 0.5, 0.2), Term(*factors[2:], 0.5, 0.2, start=0, stop=0)]
    with forced_route(route):
        y = lora_grouped(x, weight, bias, parts)
        assert y.shape == (*shape[:-1], N)
        y.sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
