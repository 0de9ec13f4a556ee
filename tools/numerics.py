"""Compare random calls of the LoRA operation with fp64, on each route that runs here.

A call has random shapes, dtype, strides, ranks, dropout, rows and columns of adapters, and a random
subset of the tensors that want a gradient. Its error may be twice that of plain PyTorch in the same
dtype (three times for a gradient), as in tests/kernels/oracle.py.

    python tools/numerics.py --count 2000
    python tools/numerics.py --only 1234      # one case again, by its seed
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import torch
from tally import Tally, TimeUp, time_limit

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at its import

from oracle import DEVICE, DTYPES, NAMES, SEED, judge, make, reference, same_mask

from fastlora.kernels import Term, forced_route, lora_grouped

PROBABILITIES = (0.0, 0.0, 0.1, 0.5, 0.9)
LAYOUTS = ("contiguous", "transposed", "every second", "part of wider rows")


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a matrix, in memory of another layout."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every second":
        return tensor.repeat_interleave(2, 1)[:, ::2]
    return torch.cat((tensor, tensor), 1)[:, : tensor.shape[1]] if "wider" in layout else tensor


def case_of(seed: int) -> tuple[str, object]:
    """The description of a random case, and the function that checks it."""
    rng = random.Random(seed)
    route, dtype = rng.choice(NAMES), rng.choice(DTYPES)
    small = DEVICE == "cpu" and route == "gemm"  # in the interpreter, a tile takes milliseconds
    most = 40 if small else 200
    M, K, N = (rng.choice((1, rng.randint(1, most), rng.randint(1, 16))) for _ in range(3))
    terms = rng.randint(1, 3)
    ranks = [
        rng.choice((1, 2, 3, 4, 8, 16, rng.randint(1, 24 if small else 80))) for _ in range(terms)
    ]
    facts = []
    for stream in range(terms):
        start, column = rng.choice((0, rng.randrange(M))), rng.choice((0, rng.randrange(N)))
        stop, width = rng.randint(start, M), N - column
        if rng.random() < 0.6:
            start, stop = 0, M
        scale, p = rng.choice((1.0, 0.5, 2.0, -1.5)), rng.choice(PROBABILITIES)
        facts.append((scale, p, stream, start, stop, column, width))
    layouts = [rng.choice(LAYOUTS) for _ in range(3)]
    names = ["x", *(f"{side}{i}" for i in range(terms) for side in "AB")]
    wants = [name for name in names if rng.random() < 0.7] or [rng.choice(names)]
    has_bias = rng.random() < 0.7
    what = f"seed {seed}: {route} {dtype} M={M} K={K} N={N} ranks={ranks} {facts} {layouts} {wants}"

    def run(inputs: tuple, op: object, dtype: torch.dtype, factor_dtype: torch.dtype) -> list:
        x, weight, bias, grad, factors = inputs
        leaves = {"x": x.to(DEVICE, dtype)}
        for i, (A, B) in enumerate(factors):
            leaves |= {f"A{i}": A.to(DEVICE, factor_dtype), f"B{i}": B.to(DEVICE, factor_dtype)}
        leaves = {
            name: leaf.detach().requires_grad_(name in wants) for name, leaf in leaves.items()
        }
        pairs = [(leaves[f"A{i}"], leaves[f"B{i}"]) for i in range(terms)]
        described = [
            Term(A, B, scale, p, stream, start, stop, column=column)
            for (A, B), (scale, p, stream, start, stop, column, _) in zip(pairs, facts, strict=True)
        ]
        used, other = (
            strided(leaves["x"], layouts[0]),
            strided(weight.to(DEVICE, dtype), layouts[1]),
        )
        y = op(used, other, bias.to(DEVICE, dtype) if has_bias else None, described, SEED)
        wanted = [leaves[name] for name in wants]
        back = strided(grad.to(DEVICE, dtype), layouts[2])
        found = torch.autograd.grad(y, wanted, back, allow_unused=True)
        zeros = [torch.zeros_like(t) for t in wanted]
        # A term of no rows has no gradient in plain PyTorch, or zeros.
        return [y, *(z if f is None else f for f, z in zip(found, zeros, strict=True))]

    def sides(seed: int) -> tuple[list, list, list]:
        """The results of ours, of plain PyTorch, and in fp64, for the numbers of a seed."""
        widths = [(r, fact[-1]) for r, fact in zip(ranks, facts, strict=True)]
        inputs, mask = make(M, K, N, widths, seed), same_mask(route)
        plain = lambda *arguments: reference(*arguments, mask=mask)  # noqa: E731
        with forced_route(route):
            ours = run(inputs, lora_grouped, dtype, torch.float32)
        theirs = run(inputs, plain, dtype, dtype)
        return ours, theirs, run(inputs, plain, torch.float64, torch.float64)

    def check() -> None:
        first = sides(seed)
        try:
            judge(route, *first, dtype)
        except AssertionError:
            # In a result of a few numbers, PyTorch's error may be small by chance. Then those of
            # 31 other draws are judged with it.
            draws = [first, *(sides(seed + i * 10**6) for i in range(1, 32))]
            pooled = [
                [torch.stack(draw) for draw in zip(*side, strict=True)]
                for side in zip(*draws, strict=True)
            ]
            judge(route, *pooled, dtype)

    return what, check


def main() -> int:
    """Check the cases that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; others follow")
    parser.add_argument("--only", type=int, help="check the case of this seed alone")
    given = parser.parse_args()
    first, count = (given.seed, given.count) if given.only is None else (given.only, 1)
    torch.set_num_threads(1)
    tally = Tally("numerics")
    for seed in range(first, first + count):
        what, check = case_of(seed)
        try:
            with time_limit(600):
                check()
        except (Exception, TimeUp) as error:
            tally.add("wrong", f"{what}: {error!r:.300}")
        else:
            tally.add("right", what)
    print(f"seeds {first} to {first + count - 1} on {DEVICE}, routes {', '.join(NAMES)}")
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
