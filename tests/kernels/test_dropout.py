"""The mask: its definition, its cheap CPU form, and the statistics of both."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastlora.kernels import Dropout, draw_seed, keep_mask
from fastlora.kernels import dropout as module
from fastlora.kernels.call import keep_scale, threshold
from fastlora.kernels.dropout import philox_keep

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
GENERATORS = pytest.mark.parametrize("mask", [keep_mask, philox_keep])


def _scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 in Python integers, as Salmon et al. 2011 give it."""
    c, k = list(counter), list(key)
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        high0, low0 = p0 >> 32, p0 & 0xFFFFFFFF
        high1, low1 = p1 >> 32, p1 & 0xFFFFFFFF
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    ],
)
def test_scalar_philox_gives_the_published_vectors(counter, key, words):
    assert _scalar_philox(counter, key) == words


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_specification_against_scalar_philox(p):
    seed, stream, rows, columns = int(SEED), 7, 5, 19
    expected = np.zeros((rows, columns), bool)
    for row in range(rows):
        for column in range(columns):
            words = _scalar_philox(
                [column // 8, row, stream, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
            )
            lane = column % 8
            half = words[lane // 2] >> (16 * (lane % 2)) & 0xFFFF
            expected[row, column] = half >= round(p * 65536)
    found = philox_keep(SEED, stream, rows, columns, p).numpy()
    np.testing.assert_array_equal(found, expected)


@GENERATORS
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate(mask, p):
    kept = int(mask(SEED, 3, 300, 257, p).sum())
    expected = 1 - threshold(p) / 65536
    assert stats.binomtest(kept, 300 * 257, expected).pvalue > 1e-4


@GENERATORS
def test_rows_columns_streams_and_seeds_are_independent(mask):
    base = mask(SEED, 1, 256, 256, 0.5)
    others = {
        "row": base.roll(1, 0),
        "column": base.roll(1, 1),
        "lane group": base.roll(8, 1),
        "stream": mask(SEED, 2, 256, 256, 0.5),
        "seed": mask(SEED + 1, 1, 256, 256, 0.5),
    }
    for name, other in others.items():
        table = np.array([[int((base & other).sum()), int((base & ~other).sum())],
                          [int((~base & other).sum()), int((~base & ~other).sum())]])  # fmt: skip
        assert stats.chi2_contingency(table).pvalue > 1e-4, name


@GENERATORS
def test_fewer_rows_are_the_head_of_more(mask):
    long = mask(SEED, 1, 100, 24, 0.3)
    assert torch.equal(mask(SEED, 1, 37, 24, 0.3), long[:37])


def test_fewer_rows_than_a_longer_pool_has():
    long = keep_mask(SEED, 1, 4500, 1000, 0.3)  # 4 MiB of lanes and more
    assert torch.equal(keep_mask(SEED, 1, 4000, 1000, 0.3), long[:4000])


def masks_of_many_seeds(count, side):
    """[2 * count, side^2] of 1 and -1: two streams of each seed."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**62, (count,), generator=generator)
    masks = [keep_mask(seed, stream, side, side, 0.5) for seed in seeds for stream in (1, 2)]
    return 2.0 * torch.stack(masks).flatten(1) - 1


def test_masks_of_many_seeds_are_independent():
    """Correlations of all pairs, and how often each keeps, are those of coins."""
    coins = masks_of_many_seeds(150, 256)
    pairs = (coins @ coins.T)[tuple(torch.triu_indices(300, 300, 1))] / 256
    assert stats.kstest(pairs, "norm").pvalue > 1e-4
    assert stats.kstest(coins.sum(1) / 256, "norm").pvalue > 1e-4


def test_no_mask_is_a_part_of_another():
    """As two would be that started in one pool only: one in eight of these overlap there."""
    spectra = torch.fft.rfft(masks_of_many_seeds(6, 512).double(), 2**19)
    for mine, theirs in itertools.combinations(spectra, 2):
        assert torch.fft.irfft(mine * theirs.conj()).abs().max() < 7 * 512


def test_extreme_probabilities():
    assert keep_mask(SEED, 0, 10, 10, 0.0).all()
    assert keep_scale(0.0) == 1.0
    for p in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 <= p < 1"):
            threshold(p)


def test_seed_follows_torch_generator():
    torch.manual_seed(5)
    first = draw_seed(torch.device("cpu"))
    second = draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert draw_seed(torch.device("cpu")) == first != second


def test_dropout_module_scales_masks_and_backpropagates():
    torch.manual_seed(0)
    drop = Dropout(0.25)
    x = torch.randn(64, 33, requires_grad=True)
    y = drop(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] * keep_scale(0.25))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, kept.float() * keep_scale(0.25))
    assert 0.6 < kept.float().mean() < 0.9
    assert torch.equal(drop.eval()(x), x)
    assert drop.train()(torch.empty(0, 4)).shape == (0, 4)


def test_dropout_module_adds_a_residual():
    x, residual = (torch.randn(64, 33, requires_grad=True) for _ in range(2))
    torch.manual_seed(0)
    dropped = Dropout(0.25)(x)
    torch.manual_seed(0)
    y = Dropout(0.25)(x, residual)
    torch.testing.assert_close(y, dropped + residual)
    weights = torch.randn_like(x)
    grad, through = torch.autograd.grad((y * weights).sum(), (x, residual))
    torch.testing.assert_close(grad, torch.autograd.grad((dropped * weights).sum(), x)[0])
    torch.testing.assert_close(through, weights)


def test_cheap_mask_is_used_on_the_cpu(monkeypatch):
    def forbidden(*_):
        raise AssertionError("Philox in tensor operations is for other devices")

    monkeypatch.setattr(module, "philox_keep", forbidden)
    keep_mask(SEED, 0, 4, 4, 0.5)
