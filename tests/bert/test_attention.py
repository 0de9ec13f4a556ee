"""Attention on a CPU against its definition, with masks, padding and filled-up tokens."""

import pytest
import torch

from fastlora.bert.attention import cpu_attention
from fastlora.bert.model import Layout

HEADS, WIDTH = 2, 4


def definition(qkv, keep, real):
    """[B, S, 3H] -> [B, S, H], by autograd."""
    B, S, _ = qkv.shape
    q, k, v = qkv.view(B, S, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(~real[:, None, None, :], -torch.inf)
    probabilities = scores.softmax(-1)
    dropped = probabilities if keep is None else probabilities * keep
    return (dropped @ v).transpose(1, 2).reshape(B, S, -1)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("fill", [0, 3])
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2, 4), (20, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients(dtype, lengths, fill, dropout):
    S = max(lengths)
    real = torch.arange(S) < torch.tensor(lengths)[:, None]
    layout = Layout.of(real, real.shape, sum(lengths) + fill)
    tokens = sum(lengths)
    shape = len(lengths), HEADS, S, S
    keep = torch.rand(shape).gt(0.3).to(dtype) / 0.7 if dropout else None
    square = torch.randn(*real.shape, 3 * HEADS * WIDTH, dtype=dtype, requires_grad=True)
    expected = definition(square, keep, real)[real]
    flat = layout.unpad(square.detach()).requires_grad_()
    drop = (lambda p: p) if keep is None else (lambda p: p * keep.view_as(p))
    found = cpu_attention(flat, drop, layout, HEADS)
    torch.testing.assert_close(found[:tokens], expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found[:tokens] * weights).sum().backward()  # nobody reads what padding filled up
    torch.testing.assert_close(flat.grad[:tokens], square.grad[real])
    assert not flat.grad[tokens:].any()
