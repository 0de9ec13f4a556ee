"""The operation under `torch.compile` and `torch.export`, and as an operator."""

import pytest
import torch
from oracle import DEVICE, NAMES, SEED

from fastlora.kernels import Linear, Packed, Term, forced_route, lora_grouped, lora_linear
from fastlora.kernels.autograd import lora, lora_backward

ROUTES = pytest.mark.parametrize("route", NAMES)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()  # nothing guards the route


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


@ROUTES
# A `Packed` holds copies of the weight, which know of neither seed nor p.
@pytest.mark.parametrize(
    ("seed", "p", "packed"),
    [(SEED, 0.3, None), (SEED, 0.3, Packed()), (SEED, 0.0, None), (None, 0.0, Packed())],
    ids=["plain", "packed", "plain-p0", "packed-no-seed"],
)
def test_compiles_without_a_graph_break(route, seed, p, packed):
    x, weight, bias, A, B = tensors((20, 8), (12, 8), (12,), (4, 8), (12, 4))
    leaves = [t.requires_grad_() for t in (x, bias, A, B)]

    def op(x):
        y = lora_grouped(x, weight, bias, [Term(A, B, 0.5, p)], seed, packed)
        return y.square().sum()

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with forced_route(route):
        found, expected = (torch.autograd.grad(f(x), leaves) for f in (compiled, op))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@ROUTES
def test_compiled_without_a_seed_draws_new_masks(route):
    x, weight, A, B = tensors((20, 8), (12, 8), (4, 8), (12, 4))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def op(x):
        return lora_linear(x, weight, None, A, B, 0.5, 0.3)

    # Each row has a mask of its own, so ten copies of x are ten draws.
    rows = x.repeat(10, 1)
    with forced_route(route):
        first, second = op(rows), op(rows)
        torch.manual_seed(7)
        third = op(rows)
        torch.manual_seed(7)
        assert torch.equal(op(rows), third)
    assert not torch.equal(first, second)
    mean = torch.stack([op(rows) for _ in range(10)]).view(100, 20, 12).mean(0)
    torch.testing.assert_close(mean, x @ (weight + 0.5 * B @ A).T, rtol=0.2, atol=1)


@ROUTES
def test_other_numbers_of_rows_take_the_same_graph(route):
    x, weight, A, B = tensors((20, 8), (12, 8), (4, 8), (12, 4))
    op = torch.compile(
        lambda x: lora_grouped(x, weight, None, [Term(A, B, 0.5, 0.3, stop=5)], SEED),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    with forced_route(route):
        for rows in (20, 9, 13):
            expected = lora_grouped(x[:rows], weight, None, [Term(A, B, 0.5, 0.3, stop=5)], SEED)
            torch.testing.assert_close(op(x[:rows]), expected, rtol=1e-4, atol=1e-4)


@ROUTES
def test_what_no_operator_takes_compiles_too(route):
    """A trainable weight, no terms, and a step under autocast."""
    x, weight, A, B = tensors((20, 8), (12, 8), (4, 8), (12, 4))
    leaves = [t.requires_grad_() for t in (weight, A, B)]

    def op(x, terms):
        with torch.autocast(DEVICE, torch.bfloat16):
            return lora_grouped(x, weight, None, terms, SEED)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with forced_route(route):
        for terms in ([Term(A, B, 0.5)], []):
            found, expected = compiled(x, terms), op(x, terms)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected)
        found, expected = (
            torch.autograd.grad(f(x, [Term(A, B, 0.5)]).sum(), leaves) for f in (compiled, op)
        )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


class Adapted(torch.nn.Module):
    """A layer with an adapter on all rows, or on the first of them."""

    def __init__(self, stop):
        super().__init__()
        weight, *factors = tensors((12, 8), (4, 8), (6, 4))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.factors = torch.nn.ParameterList(factors)
        self.stop = stop

    def forward(self, x):
        terms = [Term(*self.factors, 0.5, stop=self.stop, column=6)]
        return lora_grouped(x, self.weight, None, terms)


@ROUTES
@pytest.mark.parametrize("stop", [None, 2])
def test_export(route, stop):
    layer, (x,) = Adapted(stop), tensors((5, 8))
    rows = {"x": {0: torch.export.Dim("rows", min=3, max=64)}}
    with forced_route(route):
        program = torch.export.export(layer, (x,), dynamic_shapes=rows)
        assert not [n for n in program.graph.nodes if "fastlora" in str(n.target)]
        (other,) = tensors((31, 8))
        torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Linear, Adapted])
def test_export_with_few_rows_and_many(kind):
    """However many rows decide between two forms in eager mode: an exported program has one."""
    layer = kind(1000, 1000).requires_grad_(False) if kind is Linear else Adapted(None)
    x = torch.randn(5, 1000 if kind is Linear else 8)
    rows = torch.export.Dim("rows", min=2, max=1_000_000)
    torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))


# A term of 7 rows of 9 is saved and packed in another form.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "end"), [("reference", 9), ("gemm", 9), ("reference", 7), ("gemm", 7)]
)
def test_opcheck(route, end):
    x, weight, bias, A, B, C, D = tensors((9, 8), (8, 8), (8,), (3, 8), (4, 3), (2, 8), (4, 2))
    factors = [t.requires_grad_() for t in (A, B, C, D)]
    rest = SEED, [1.0, 0.1, 2.0, 0.0], [1, 0, 9, 0, 2, 0, end, 4], route
    # Where a term has no rows, u stays unwritten: two runs have other numbers there.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] * (end == 9 or route == "reference")
    leaves = x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(lora, (*leaves, weight, factors, *rest), test_utils=checks)
    fixed = weight, [t.detach() for t in factors], *rest
    y, saved = lora(x.detach(), None, *fixed)
    torch.library.opcheck(lora_backward, (torch.randn_like(y), x.detach(), saved, True, *fixed))
