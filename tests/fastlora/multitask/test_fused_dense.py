"""A dense layer with its activation, as one operation where no gradient is needed."""

import copy

import pytest
import torch
from torch import nn

from fastlora.bert.model import dense
from fastlora.kernels import Linear
from fastlora.lora.config import LoraConfig
from fastlora.lora.model import inject, merge, pack
from fastlora.multitask.model import FusedDense

WIDTH, WIDE, ROWS = 192, 320, 800  # enough work for the fused operation


def make(activation=None, linear=Linear):
    torch.manual_seed(0)
    layer = dense(linear(WIDTH, WIDE).requires_grad_(False), activation or nn.GELU())
    fused = copy.deepcopy(layer)
    fused.__class__ = FusedDense
    return layer, fused, torch.randn(ROWS, WIDTH)


def check(layer, fused, x):
    """The error against fp64 is at most twice that of the two modules called one by one."""
    with torch.no_grad():
        exact, plain, found = copy.deepcopy(layer).double()(x.double()), layer(x), fused(x)
    limit = 2 * (plain - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    assert found.dtype == plain.dtype and found.shape == plain.shape
    assert (found - exact).abs().max() <= limit


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Tanh()])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_activation_of_the_layer(activation, packed):
    layer, fused, x = make(activation)
    if packed:
        pack(fused)
    check(layer, fused, x)
    check(layer, fused, x[:3])
    check(layer, fused, x.view(2, ROWS // 2, WIDTH).transpose(0, 1))


def test_it_follows_a_merge_and_a_change_of_the_weight():
    layer, fused, x = make()
    both = nn.ModuleList([layer, fused])
    inject(both, LoraConfig(r=4, targets=["dense"]))
    for module in both:
        torch.manual_seed(1)
        nn.init.normal_(module.dense.lora_A["default"])
        nn.init.normal_(module.dense.lora_B["default"], std=0.1)
    both.eval()
    pack(fused)
    check(layer, fused, x)
    merge(both)
    check(layer, fused, x)
    with torch.no_grad():
        for module in both:
            module.dense.weight.mul_(-1)
    check(layer, fused, x)


def test_hooks_and_forwards_of_both_modules_run():
    _, fused, x = make()
    seen = []
    fused.dense.register_forward_hook(lambda module, inputs, output: seen.append("dense"))
    with torch.no_grad():
        fused(x)
    _, fused, x = make()
    fused.activation.register_forward_hook(lambda module, inputs, output: output * 0)
    with torch.no_grad():
        assert seen == ["dense"] and not fused(x).any()
        _, fused, x = make()
        fused.activation.forward = torch.zeros_like
        assert not fused(x).any()


def test_gradients_flow_where_they_are_wanted():
    _, fused, x = make()
    x.requires_grad_()
    fused(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("linear", [Linear, nn.Linear])
def test_under_autocast_it_computes_in_its_type(linear):
    layer, fused, x = make(linear=linear)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), layer(x)) and fused(x).dtype == torch.bfloat16
