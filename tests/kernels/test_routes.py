"""Every route against the fp64 reference with the same mask, by the 2x criterion.

Kernels run natively on a GPU and in Triton's interpreter on a CPU, on memory poisoned with NaN.
"""

import os
from dataclasses import asdict, replace

import pytest
import torch
from oracle import DEVICE, DTYPES, NAMES, SEED, check, lora_qkv, make, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastlora.files import write_json
from fastlora.kernels import (
    Packed,
    Term,
    forced_route,
    lora_grouped,
    lora_linear,
)
from fastlora.kernels.call import Call, Copies
from fastlora.kernels.routes import implementation
from fastlora.kernels.triton import tuning
from fastlora.training import tuner

pytest.importorskip("triton", reason="Triton is for Linux only")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", NAMES)
@pytest.mark.parametrize("blocks", [(0, 2), (1,), (0, 1, 2)])
def test_packed_query_key_value(route, dtype, blocks):
    # Two tiles of rows and more than one of columns, the last in part; fp16 has larger ones.
    M, H = (40, 20) if dtype == torch.float32 else (77, 40)
    inputs = make(M, H, 3 * H, [(8, H) for _ in blocks])

    def terms(factors):
        places = zip(factors, blocks, strict=True)
        return [Term(*f, 2.0, 0.1, stream=b, column=b * H) for f, b in places]

    check(route, inputs, terms, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", NAMES)
def test_rows_of_several_adapters(route, dtype):
    """Own ranks, scales, dropouts and columns; an empty segment, an overlap, rows of none."""
    half = 2 if dtype == torch.float32 else 1  # as its tiles are
    H, facts = 24, [
        # rank, scale, p, first row, end, block
        (3, 2.0, 0.1, 0, 70, 0),
        (17, 0.5, 0.5, 0, 70, 2),
        (8, 1.0, 0.0, 70, 133, 0),
        (5, 1.0, 0.2, 70, 70, 1),
        (72, 0.3, 0.3, 40, 100, 1),
        (4, 1.5, 0.1, 40, 133, 0),
    ]  # fmt: skip
    inputs = make(150 // half, 37, 3 * H, [(fact[0], H) for fact in facts])

    def terms(factors):
        return [
            Term(*f, scale, p, i, start // half, stop // half, column=block * H)
            for i, (f, (_, scale, p, start, stop, block)) in enumerate(
                zip(factors, facts, strict=True)
            )
        ]

    check(route, inputs, terms, dtype)


@pytest.mark.parametrize("route", NAMES)
def test_strided_and_three_dimensional_input(route):
    torch.manual_seed(0)
    wide = torch.randn(4, 9, 40, device=DEVICE)
    weight = torch.randn(24, 20, device=DEVICE) / 5
    A, B = torch.randn(8, 20, device=DEVICE), torch.randn(24, 8, device=DEVICE)
    with forced_route(route):
        for x in (wide[..., ::2], wide[..., :20], wide[:, ::3, 20:], wide[0, 0, :20]):
            y = lora_linear(x, weight, None, A, B, 0.5)
            torch.testing.assert_close(y, x @ (weight + 0.5 * B @ A).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", NAMES)
def test_no_rows(route):
    inputs = make(0, 16, 24, [(4, 24)])
    with forced_route(route):
        y, dx, dA, dB = run(
            lora_grouped, inputs, lambda f: [Term(*f[0], 1.0, 0.1)], torch.float32, torch.float32
        )
    assert y.shape == (0, 24)
    assert dx.shape == (0, 16)
    assert not dA.any()
    assert not dB.any()


@pytest.mark.parametrize("route", NAMES)
def test_an_adapter_trains_the_same_alone_or_in_company(route):
    x, weight, bias, grad, factors = make(70, 16, 16, [(8, 16), (8, 16)])
    own = slice(30, 64)

    def company(f):
        return [
            Term(*f[0], 1.0, 0.3, stream=1, start=30, stop=64),
            Term(*f[1], 1.0, 0.3, stream=2, start=64, stop=70),
        ]

    with forced_route(route):
        y, dx, dA, dB, *_ = run(
            lora_grouped, (x, weight, bias, grad, factors), company, torch.float32, torch.float32
        )
        alone = run(
            lora_grouped,
            (x[own], weight, bias, grad[own], factors[:1]),
            lambda f: [Term(*f[0], 1.0, 0.3, stream=1)],
            torch.float32,
            torch.float32,
        )
    for mine, theirs in zip((y[own], dx[own], dA, dB), alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [None, Packed()], ids=["plain", "packed"])
@pytest.mark.parametrize("route", NAMES)
def test_tensors_changed_in_place_are_used(route, packed):
    """Copies follow an optimiser's step, and a merged weight; a factor also through `.data`."""
    x, weight = torch.randn(9, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    A, B = torch.randn(4, 16, device=DEVICE), torch.randn(12, 4, device=DEVICE)
    with forced_route(route):
        for tensor in (B, A, weight, B.data, A.data):
            lora_grouped(x, weight, None, [Term(A, B, 1.0)], packed=packed)
            tensor.mul_(3)
            torch.testing.assert_close(
                lora_grouped(x, weight, None, [Term(A, B, 1.0)], packed=packed),
                x @ (weight + B @ A).T,
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("route", NAMES)
@pytest.mark.parametrize("fused", [False, True])
def test_factors_are_used_after_a_step_of_an_optimiser(route, fused):
    """A fused one leaves the versions of its parameters as they are."""
    packed = Packed()
    x, weight = torch.randn(9, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    A, B = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((4, 16), (12, 4)))
    optimizer = torch.optim.AdamW([A, B], lr=0.1, fused=fused)
    with forced_route(route):
        for _ in range(2):
            y = lora_grouped(x, weight, None, [Term(A, B, 1.0)], packed=packed)
            y.square().sum().backward()
            optimizer.step()
            found = lora_grouped(x, weight, None, [Term(A, B, 1.0)], packed=packed)
            torch.testing.assert_close(found, x @ (weight + B @ A).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", NAMES)
def test_negative_cases(route):
    """B = 0 changes nothing, p = 0 ignores the seed, W0 stays, an adapter changes the output."""
    x, weight, bias = (torch.randn(s, device=DEVICE) for s in ((64, 32), (32, 32), (32,)))
    A, B = torch.randn(8, 32, device=DEVICE), torch.zeros(32, 8, device=DEVICE)
    before = weight.clone()
    with forced_route(route):
        y = lora_linear(x, weight, bias, A, B, 1.0, 0.5, SEED)
        with_p_0 = lora_linear(x, weight, bias, A, B + 1, 1.0, 0.0, SEED)
        changed = lora_linear(x, weight, bias, A, B + 1, 1.0, 0.5, SEED)
        assert torch.equal(lora_linear(x, weight, bias, A, B + 1, 1.0), with_p_0)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(weight, before)
    assert not torch.allclose(changed, y)


class CountLaunches(TorchDispatchMode):
    """Counts our kernels' launches and PyTorch's operations that compute."""

    FREE = ("aten::view", "aten::empty", "aten::new_empty", "aten::slice", "aten::t",
            "aten::detach", "aten::fill_", "aten::permute", "aten::lift_fresh",
            "aten::split", "aten::split_with_sizes")  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        inner = tuning.launch

        def launch(kernel, grid, *rest):
            self.names.append(getattr(kernel, "__name__", "kernel"))
            with _disable_current_modes():  # the interpreter computes with PyTorch, too
                return inner(kernel, grid, *rest)

        monkeypatch.setattr(tuning, "launch", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] not in self.FREE:
            self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("owned", [True, False])
def test_launches_of_route_gemm(monkeypatch, owned):
    """Forward 2 and the factors' copy, backward 4 and one a term.

    Without an owner, each fills its own buffers.
    """
    H, M = 16, 32
    x, weight, bias, grad, factors = make(M, H, 3 * H, [(8, H), (8, H)])
    x, weight, bias, grad = (t.to(DEVICE, torch.float32) for t in (x, weight, bias, grad))
    terms = [
        Term(*(f.to(DEVICE, torch.float32) for f in pair), 1.0, 0.1, 0, 0, M, column)
        for pair, column in zip(factors, (0, 2 * H), strict=True)
    ]
    call = Call(weight, terms, SEED, Copies({} if owned else None), "gemm")
    later, gemm = call._replace(changed=False), implementation("gemm")
    _, saved = gemm.forward(x, bias, call)  # packs the frozen weight
    gemm.backward(grad, None, saved, later, need_dx=True)  # makes the tables of rows
    with CountLaunches(monkeypatch) as counted:
        _, saved = gemm.forward(x, bias, call)
        forward, counted.names = counted.names, []
        gemm.backward(grad, None, saved, later, need_dx=True)
    # W0 beside zeros where B goes, zeros where A goes, and both factors of both terms.
    fill = ["aten::copy_", "aten::new_zeros", "aten::_foreach_copy_"]
    assert forward == [*(["aten::_foreach_copy_"] if owned else fill), "lora_down", "aten::addmm"]
    backward = ["aten::mm", "lora_add", "lora_outer", *["aten::mm"] * 3]
    assert counted.names == [*([] if owned else fill), *backward]


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_scoring_and_training_share_the_packed_weight(first):
    """One copy of [W0 | B] serves both, whichever comes first."""
    H, packed = 16, Packed()
    x, weight, _, _, ((A, B),) = make(32, H, H, [(8, H)])
    x, weight, A, B = (t.to(DEVICE, torch.float32) for t in (x, weight, A, B))
    factors = A.requires_grad_(), B.requires_grad_()

    def op(p):
        return lora_grouped(x, weight, None, [Term(*factors, 2.0, p)], packed=packed)

    with forced_route("gemm"):
        with first():
            op(0.0)
        op(0.5).sum().backward()
        with torch.no_grad():
            B.add_(1)
        y = op(0.0)
    assert len(packed.copies(weight)) == 1
    torch.testing.assert_close(y, x @ weight.T + 2 * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)


def test_saved_activations_are_x_u_and_the_seed(capsys):
    M, H, r = 4096, 768, 32
    if DEVICE == "cpu":
        M, H, r = 64, 192, 8  # the interpreter is slow; the ratio depends on r / H only
    x = torch.randn(M, H, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(3 * H, H, device=DEVICE, dtype=torch.float16)
    factors = {
        name: (
            torch.randn(r, H, device=DEVICE, requires_grad=True),
            torch.randn(H, r, device=DEVICE, requires_grad=True),
        )
        for name in ("query", "value")
    }
    known = {weight.data_ptr()} | {f.data_ptr() for pair in factors.values() for f in pair}

    def saved_by(op):
        saved = {}

        def pack(t):
            saved[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            op()
        return sum(size for pointer, size in saved.items() if pointer not in known)

    def eager_pair():
        y = torch.nn.functional.linear(x, weight)
        for (A, B), column in zip(factors.values(), (0, 2 * H), strict=True):
            dropped = torch.nn.functional.dropout(x.float(), 0.1)
            y[:, column : column + H] += (dropped @ A.T @ B.T * 0.5).half()
        return y

    with forced_route("gemm"):
        ours = saved_by(lambda: lora_qkv(x, weight, None, factors, 0.5, 0.1, SEED))
    alone = x.numel() * x.element_size()
    eager = saved_by(eager_pair)
    with capsys.disabled():
        print(f"\nsaved: {ours / alone:.3f}x of x; by the eager pair {eager / alone:.2f}x")
    assert ours <= 1.1 * alone


def test_route_by_environment(monkeypatch):
    from fastlora.kernels import route

    monkeypatch.setenv("FASTLORA_SELF_CHECK", "0")  # see test_selfcheck.py
    monkeypatch.setenv("FASTLORA_ROUTE", "gemm")
    assert route(DEVICE).name == "gemm"
    monkeypatch.setenv("FASTLORA_ROUTE", "triton")  # there was one of this name
    with pytest.raises(ValueError, match=r"is 'triton' \(expected reference or gemm"):
        route(DEVICE)
    if DEVICE == "cpu":
        monkeypatch.setenv("FASTLORA_ROUTE", "gemm")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="but here: PyTorch's own GEMMs on cpu"):
            route(DEVICE)
        monkeypatch.undo()
    monkeypatch.delenv("FASTLORA_ROUTE", raising=False)
    assert route("cpu").name == "reference"
    assert os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda"


def test_measured_blocks_go_before_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "MEASURED", {})
    shipped = tuning.config(90, torch.float16, 8192)
    measured = replace(shipped, down=tuning.Blocks(m=16, warps=8))
    file = tmp_path / "blocks.json"
    write_json(file, {tuning.key_of(90, torch.float16, 8192): asdict(measured)})
    tuner.load(file)
    assert tuning.config(90, torch.float16, 8192) == measured
    assert tuning.config(90, torch.float16, 512) == tuning.SHIPPED["90/small"]
    file.write_text('{"90/fp16/large": {"down": {}}}')
    with pytest.raises(ValueError, match=r"blocks\.json: not a table .*delete it"):
        tuner.load(file)
