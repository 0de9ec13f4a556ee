"""Attention of packed tokens against its definition, on masks and padding of any kind."""

import pytest
import torch

from fastlora.bert.attention import attention
from fastlora.bert.layout import Groups, Layout

HEADS, WIDTH = 2, 4


def definition(qkv, keep, real, bias=0.0):
    """[B, S, 3H] -> [B, S, H], by autograd."""
    B, S, _ = qkv.shape
    q, k, v = qkv.view(B, S, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / WIDTH**0.5 + bias).masked_fill(~real[:, None, None, :], -torch.inf)
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
    found = attention(flat, layout, HEADS, drop, 0.3 if dropout else 0.0)
    torch.testing.assert_close(found[:tokens], expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found[:tokens] * weights).sum().backward()  # nobody reads what padding filled up
    torch.testing.assert_close(flat.grad[:tokens], square.grad[real])
    assert not flat.grad[tokens:].any()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("S", [6, 20])
def test_the_first_place_of_a_row_may_be_padding_and_computed(S, own):
    """As in left-padded batches, of which heads read the first place."""
    real = torch.arange(S) >= torch.tensor([[S - 2], [0], [1]])
    layout = Layout.of(real, real.shape, first=True)
    computed = real.clone()
    computed[:, 0] = True
    bias = None if own else torch.zeros(1, HEADS, S, S, dtype=torch.float64)
    square = torch.randn(*real.shape, 3 * HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    flat = layout.unpad(square.detach()).requires_grad_()
    expected = definition(square, None, real) * computed[..., None]
    found = layout.pad(attention(flat, layout, HEADS, lambda p: p, 0.0, bias=bias))
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(layout.pad(flat.grad), square.grad * computed[..., None])


def test_each_position_is_computed_once():
    real = torch.arange(6) >= torch.tensor([[4], [0], [1]])
    layout = Layout.of(real, real.shape, tokens=int(real.sum()) + 4, first=True)
    assert len(layout.index) == len(set(layout.index.tolist())) == real.sum() + 4


@pytest.mark.parametrize("padded", [False, True])
def test_a_bias_is_added_to_the_scores(padded):
    real = torch.arange(7) < torch.tensor([[7], [7 - 4 * padded]])
    layout = Layout.of(real, real.shape)
    bias = torch.randn(1, HEADS, 7, 7, dtype=torch.float64, requires_grad=True)
    square = torch.randn(2, 7, 3 * HEADS * WIDTH, dtype=torch.float64)
    expected = definition(square, None, real, bias)[real]
    found = attention(layout.unpad(square), layout, HEADS, lambda p: p, 0.0, bias=bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), bias)[0] for y in (found, expected)))


@pytest.mark.parametrize("left", [False, True])
def test_a_long_row_makes_no_other_row_long(left):
    """Rows are computed in groups of similar lengths, and none reads another, not even its NaN."""
    lengths = torch.cat((torch.tensor([90, 0]), torch.randint(1, 25, (40,))))
    column = torch.arange(90)
    real = (column.flip(0) if left else column) < lengths[:, None]
    layout = Layout.of(real, real.shape, tokens=int(lengths.sum()) + 5)
    sizes = [masked.numel() // HEADS for masked in Groups.of(layout, HEADS).masked]
    assert len(sizes) > 1 and sum(sizes) < real.numel() / 2
    square = torch.randn(*real.shape, 3 * HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    flat = layout.unpad(square.detach()).requires_grad_()
    expected = definition(square, torch.tensor(2.0), real)[real]
    found = attention(flat, layout, HEADS, lambda p: p * 2, 0.5)[: len(expected)]
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(flat.grad[: len(expected)], square.grad[real])
    broken = real.nonzero()[:, 0] == 5
    flat = torch.where((layout.index // 90 == 5)[:, None], torch.nan, flat.detach())
    again = attention(flat, layout, HEADS, lambda p: p * 2, 0.5)[: len(expected)]
    torch.testing.assert_close(again[~broken], expected[~broken].detach())
    assert again[broken].isnan().all()


def test_a_gradient_of_a_gradient_is_refused():
    flat, layout = torch.randn(6, 3 * HEADS * WIDTH, requires_grad=True), Layout(2, 3)
    found = attention(flat, layout, HEADS, lambda p: p, 0.0)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(found.square().sum(), flat, create_graph=True)
