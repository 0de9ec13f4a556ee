"""Frozen weights on a CPU: oneDNN's GEMM on packed copies, which follow their weights."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels.frozen import Linear

PACKED = [torch.float32]
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKED.append(torch.bfloat16)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
)


class Products(TorchDispatchMode):
    """Counts the products on packed weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def layer(dtype, frozen=True):
    torch.manual_seed(0)
    return Linear(24, 40).to(dtype).requires_grad_(not frozen)


def unpacked(linear):
    """PyTorch's own layer with the same weights."""
    plain = nn.Linear(24, 40).to(linear.weight.dtype)
    plain.load_state_dict(linear.state_dict())
    return plain


def y_and_dx(linear, x):
    x = x.clone().requires_grad_()
    y = linear(x)
    return [y, *torch.autograd.grad(y.sum(), x)]


@pytest.mark.parametrize("dtype", PACKED)
def test_as_near_the_truth_as_pytorch(dtype):
    linear, x = layer(dtype), torch.randn(7, 5, 24, dtype=dtype)
    with Products() as products:
        ours = y_and_dx(linear, x)
    assert products.count == 2
    plain = unpacked(linear)
    theirs, truth = y_and_dx(plain, x), y_and_dx(plain.double(), x.double())
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (other - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("change", ["in place", "other data", "another in its place"])
def test_a_changed_weight_is_packed_again(dtype, change):
    linear, x = layer(dtype), torch.randn(3, 24, dtype=dtype)
    memory = bytearray(linear.weight.nbytes)

    def put(weight):
        linear.weight.data = torch.frombuffer(memory, dtype=dtype).view(40, 24).copy_(weight)

    put(linear.weight)
    y_and_dx(linear, x)
    if change == "in place":
        with torch.no_grad():
            linear.weight.neg_()
    elif change == "other data":
        linear.weight.data = -linear.weight.data
    else:
        put(-linear.weight)
    for mine, other in zip(y_and_dx(linear, x), y_and_dx(unpacked(linear), x), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("frozen", "context"),
    [(False, nullcontext()), (True, torch.autocast("cpu", torch.bfloat16))],
    ids=["trainable", "autocast"],
)
def test_pytorchs_own_product_where_packing_would_be_wrong(frozen, context):
    linear, x = layer(torch.float32, frozen), torch.randn(3, 24)
    with Products() as products, context:
        linear(x)
    assert products.count == 0
