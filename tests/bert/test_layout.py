"""Squares of similar rows: the least padding, and the same numbers as one square for all."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.bert.attention import cpu_attention
from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout, similar_rows
from fastlora.bert.model import BertModel

LENGTHS = np.array([3, 17, 5, 16, 1, 17, 4, 9])
CONFIG = BertConfig(60, 32, 2, 4, 48, max_position_embeddings=128)


def real(lengths):
    return torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])


def cells_of(groups, lengths):
    return sum(len(rows) * lengths[rows].max() for rows in groups if len(rows))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_no_three_groups_have_less_padding(lengths):
    lengths = np.array(lengths)
    groups = similar_rows(lengths)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    assert 1 <= len(groups) <= 3
    order = np.argsort(-lengths)
    cuts = product(range(len(lengths) + 1), repeat=2)
    least = min(cells_of(np.split(order, sorted(cut)), lengths) for cut in cuts)
    assert cells_of(groups, lengths) == least


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_every_token_has_its_cell_and_padding_is_masked(lengths):
    lengths = np.array(lengths)
    layout = Layout.of(real(lengths), similar_rows(lengths))
    tokens = torch.arange(1.0, 1 + lengths.sum())[:, None]
    cells = layout.pad(tokens)
    assert torch.equal(layout.unpad(cells), tokens)
    rows = [row.tolist() for row in tokens[:, 0].split(lengths.tolist())]
    found = []
    for square in layout.squares:
        own = cells[square.cells].view(square.rows, square.length)
        mask = torch.ones(own.shape).bool() if square.mask is None else square.mask[:, 0, 0]
        assert torch.equal(mask, own > 0)
        assert torch.equal(layout.gather(tokens)[square.cells].view(own.shape)[mask], own[mask])
        found += [row[row > 0].tolist() for row in own]
    assert sorted(found) == sorted(rows)


@pytest.mark.parametrize("scale", [1, 7], ids=["our attention", "PyTorch's"])
def test_several_squares_give_the_states_and_gradients_of_one(scale):
    """With rows over 100 tokens, PyTorch's own attention computes, where nothing is dropped."""
    torch.manual_seed(0)
    model, lengths = BertModel(CONFIG).eval(), LENGTHS * scale
    ids = torch.randint(60, (lengths.sum(),))
    results = []
    for groups in ([slice(None)], similar_rows(lengths)):
        model.zero_grad()
        layout = Layout.of(real(lengths), groups)
        states = model.encode(ids, torch.zeros_like(ids), layout)[-1]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if not n.startswith("pooler")]
        results.append((len(layout.squares), states, *grads))
    assert [result[0] for result in results] == [1, 3]
    for one, several in zip(*(result[1:] for result in results), strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drops", [False, True])
def test_attention_on_a_cpu_is_the_formula_row_by_row(drops):
    """Softmax(q k^T / sqrt(d)) times its dropout mask, times v; and the gradient."""
    torch.manual_seed(0)
    heads, width = 2, 8
    layout = Layout.of(real(LENGTHS), groups := similar_rows(LENGTHS))
    keeps = [
        2.0 * torch.randint(2, (s.rows, heads, s.length, s.length)) if drops else None
        for s in layout.squares
    ]
    qkv = torch.randn(int(LENGTHS.sum()), 3 * width, requires_grad=True)
    keep_of = dict(
        (int(row), None if keep is None else keep[i])
        for rows, keep in zip(groups, keeps, strict=True)
        for i, row in enumerate(rows)
    )
    contexts = []
    for row, own in enumerate(qkv.split(LENGTHS.tolist())):
        q, k, v = own.view(len(own), 3, heads, -1).permute(1, 2, 0, 3)
        probabilities = (q @ k.mT / 2).softmax(-1)
        if drops:
            probabilities = probabilities * keep_of[row][:, : len(own), : len(own)]
        contexts.append((probabilities @ v).transpose(0, 1).flatten(1))
    expected, found = torch.cat(contexts), cpu_attention(qkv, keeps, layout, heads)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    wanted, got = (torch.autograd.grad(y, qkv, grad)[0] for y in (expected, found))
    torch.testing.assert_close(got, wanted)
