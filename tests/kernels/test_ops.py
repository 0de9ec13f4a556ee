"""The fused operation against the fp64 reference: values, gradients, and what it saves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference

from fastlora.kernels import Term, forced_route, lora_grouped, lora_linear

SEED = torch.tensor(99)


@pytest.fixture(autouse=True)
def fused():
    """The fused form on small inputs, too, which plain PyTorch computes otherwise."""
    with forced_route("reference"):
        yield


def _factors(K, N, r, dtype=torch.float64):
    return (
        torch.randn(r, K, dtype=dtype, requires_grad=True),
        torch.randn(N, r, dtype=dtype, requires_grad=True),
    )


def _leaves(x, terms):
    return [x, *(f for t in terms for f in (t.lora_A, t.lora_B))]


def _run(op, x, weight, bias, terms, grad):
    y = op(x, weight, bias, terms, SEED)
    return [y, *torch.autograd.grad((y * grad).sum(), _leaves(x, terms))]


@settings(deadline=None, max_examples=40)
@given(
    M=st.integers(0, 60),
    K=st.integers(1, 40),
    N=st.integers(1, 40),
    r=st.sampled_from([1, 3, 5, 17, 32]),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
)
def test_one_projection_equals_the_reference_in_fp64(M, K, N, r, p, bias):
    torch.manual_seed(0)
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(N, K, dtype=torch.float64)
    b = torch.randn(N, dtype=torch.float64) if bias else None
    terms = [Term(*_factors(K, N, r), 2.0, p, stream=3)]
    grad = torch.randn(M, N, dtype=torch.float64)
    for found, expected in zip(
        _run(lora_grouped, x, weight, b, terms, grad),
        _run(reference, x, weight, b, terms, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_projection_with_adapters_on_rows_and_columns(p):
    torch.manual_seed(0)
    x = torch.randn(7, 5, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    terms = [
        Term(*_factors(16, 8, 3), 2.0, p, 1, start=0, stop=20, column=0),
        Term(*_factors(16, 8, 2), 0.5, p, 2, start=20, stop=35, column=16),
        Term(*_factors(16, 8, 4), 1.5, p, 1, start=5, stop=30, column=8),
        Term(*_factors(16, 8, 4), 1.5, p, 1, start=9, stop=9, column=8),
    ]
    grad = torch.randn(7, 5, 24, dtype=torch.float64)
    for found, expected in zip(
        _run(lora_grouped, x, weight, bias, terms, grad),
        _run(reference, x, weight, bias, terms, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_gradcheck():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    A, B = _factors(5, 6, 2)
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, weight, bias, A, B, 0.7, 0.4, SEED), (x, A, B)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_data_with_fp32_factors(dtype):
    """At most 2x (3x for gradients) the error that plain PyTorch makes in the same dtype."""
    torch.manual_seed(0)
    x = torch.randn(64, 48, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(40, 48, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    A, B = _factors(48, 40, 8)
    grad = torch.randn(64, 40, dtype=torch.float64)
    truth = _run(reference, x, weight, bias, [Term(A, B, 0.5, 0.1)], grad)

    def half(t, dtype=dtype):
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    plain_terms = [Term(half(A), half(B), 0.5, 0.1)]
    plain = _run(reference, half(x), half(weight), half(bias), plain_terms, half(grad))
    master_terms = [Term(half(A, torch.float32), half(B, torch.float32), 0.5, 0.1)]
    ours = _run(lora_grouped, half(x), half(weight), half(bias), master_terms, half(grad))
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    for i, (mine, theirs, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        limit = (2 if i == 0 else 3) * (theirs - exact).abs().max() + 1e-6
        assert (mine - exact).abs().max() <= limit


def test_zero_B_is_exactly_the_frozen_layer_and_the_weight_never_changes():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 8), torch.randn(6, 8), torch.randn(6)
    before = weight.clone()
    A = torch.randn(4, 8, requires_grad=True)
    B = torch.zeros(6, 4, requires_grad=True)
    y = lora_linear(x, weight, bias, A, B, 1.0, 0.5, SEED)
    assert torch.equal(y, lora_grouped(x, weight, bias, []))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    y.sum().backward()
    assert torch.equal(weight, before)
    assert B.grad.abs().sum() > 0
    assert not A.grad.any()


def test_what_requires_no_gradient_gets_none():
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    A, B = _factors(8, 6, 2, torch.float32)
    lora_linear(x, weight, bias, A.detach(), B, 1.0).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert bias.grad is None
    assert A.grad is None
    assert B.grad is not None


def test_saved_for_backward_are_x_u_and_the_seed():
    M, K, r = 512, 768, 32
    x = torch.randn(M, K, requires_grad=True)
    weight = torch.randn(3 * K, K)
    terms = [
        Term(*_factors(K, K, r, torch.float32), 1.0, 0.1, i, column=c)
        for i, c in enumerate((0, 2 * K))
    ]
    known = {t.data_ptr() for t in (weight, *_leaves(x, terms)[1:])}
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_grouped(x, weight, None, terms)
    activations = sum(size for pointer, size in saved.items() if pointer not in known)
    assert activations <= 1.1 * x.numel() * x.element_size()


def test_non_contiguous_input():
    torch.manual_seed(0)
    x = torch.randn(8, 20, dtype=torch.float64).T[::2]
    weight = torch.randn(6, 8, dtype=torch.float64)
    terms = [Term(*_factors(8, 6, 2), 1.0)]
    torch.testing.assert_close(
        lora_grouped(x, weight, None, terms), reference(x, weight, None, terms)
    )


@pytest.mark.parametrize(
    ("x", "A", "B", "message"),
    [
        ((3, 7), (2, 8), (6, 2), "x has 7 features"),
        ((3, 8), (2, 7), (6, 2), "lora_A is"),
        ((3, 8), (2, 8), (6, 3), "lora_A is"),
        ((3, 8), (2, 8), (7, 2), "reach column 7"),
    ],
)
def test_wrong_shapes(x, A, B, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.randn(x), torch.randn(6, 8), None, torch.randn(A), torch.randn(B), 1.0)


def test_without_a_seed_masks_follow_torchs_generator():
    x, weight = torch.randn(30, 8), torch.randn(6, 8)
    terms = [Term(torch.randn(2, 8), torch.randn(6, 2), 1.0, dropout_p=0.5)]

    def draw():
        return lora_grouped(x, weight, None, terms)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
