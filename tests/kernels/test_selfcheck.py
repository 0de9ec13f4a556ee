"""Kernels that compute wrongly or crash where they are used first: what happens instead.

The device is the CPU, said to be a GPU of sm_80, on which Triton's interpreter runs the kernels.
"""

import threading
import warnings
from dataclasses import replace

import pytest
import torch
from oracle import reference

from fastlora.kernels import Term, lora_grouped, ops, route, routes, selfcheck
from fastlora.kernels.triton import tuning

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
import triton.language as tl  # noqa: E402

from fastlora.kernels.triton import kernels  # noqa: E402
from fastlora.kernels.triton import route as triton_route  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted on a CPU")
PASSED, FAILED = "self-check passed", "Triton's kernels failed their self-check on cpu: "

ALL_KERNELS = {"lora_down", "lora_add", "lora_outer"}
SMALL_PROBLEMS = [(24, 16, *others) for _, _, *others in selfcheck.PROBLEMS]


def as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(selfcheck, "_found", {})
    routes._detect.cache_clear()
    routes._warn_once.cache_clear()


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """The kernels' launches, by name. Problems of one tile make the interpreter fast."""
    tile, launches, inner = tuning.Blocks(m=128), [], tuning.launch
    config = tuning.Config(down=tile, add=tile, outer=replace(tile, k=32))

    def launch(kernel, *rest):
        launches.append(kernel.__name__)
        inner(kernel, *rest)

    monkeypatch.setattr(selfcheck, "PROBLEMS", SMALL_PROBLEMS[-1:])
    monkeypatch.setattr(ops, "MIN_FUSED_WORK", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "capability", lambda _device: 80)
    monkeypatch.setattr(tuning, "config", lambda *_: config)
    monkeypatch.setattr(tuning, "launch", launch)
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTLORA_ROUTE", raising=False)
    as_in_a_new_process(monkeypatch)
    yield launches
    routes._detect.cache_clear()


def notes_in(tmp_path):
    return [*(tmp_path / "cache" / "self_checks").glob("*")]


def test_kernels_that_pass_are_used_and_later_processes_do_not_check_them(
    gpu, monkeypatch, tmp_path, recwarn
):
    assert route() == ("gemm", f"Triton kernels for sm_80; {PASSED}")
    assert {*gpu} == ALL_KERNELS
    gpu.clear()
    as_in_a_new_process(monkeypatch)
    assert PASSED in route().why
    assert not gpu
    (note,) = notes_in(tmp_path)
    note.unlink()
    note.mkdir()  # damaged
    for attribute, value in ((None, None), ("__version__", "3.999")):
        if attribute:
            monkeypatch.setattr(triton, attribute, value)
        as_in_a_new_process(monkeypatch)
        gpu.clear()
        assert PASSED in route().why
        assert gpu, "what the note is not of was not checked"
    assert not recwarn.list


def test_a_cache_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert PASSED in route().why
    gpu.clear()
    assert PASSED in route().why
    assert not gpu, "one process checked twice"


@triton.jit
def bits_of_the_next_row(seed, stream, row, column, threshold, BLOCK_K: tl.constexpr):
    return TRUE_BITS(seed, stream, row + 1, column, threshold, BLOCK_K)


TRUE_BITS = kernels.keep_bits


def wrong_mask(monkeypatch):
    monkeypatch.setattr(kernels, "keep_bits", bits_of_the_next_row)
    return r"y has a relative error of .*, expected at most .*, dropout 0.1\)"


def wrong_forward(monkeypatch):
    slightly = lambda *a, **k: 1.0001 * a[3]  # noqa: E731
    monkeypatch.setattr(triton_route, "add", slightly)
    return r"dx has a relative error .* dropout 0.0\)"


def wrong_backward(monkeypatch):
    inner = triton_route.outer
    slightly = lambda *a, **k: [1.0001 * part for part in inner(*a, **k)]  # noqa: E731
    monkeypatch.setattr(triton_route, "outer", slightly)
    return r"dA has a relative error .* dropout 0.0\)"


def unwritten(monkeypatch):
    monkeypatch.setattr(tuning, "launch", lambda *_: None)
    return "relative error of nan"


def no_compiler(monkeypatch):
    def launch(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(tuning, "launch", launch)
    return "RuntimeError: Failed to find C compiler. Please specify via CC"


@pytest.mark.parametrize(
    "plant", [wrong_mask, wrong_forward, wrong_backward, unwritten, no_compiler]
)
def test_a_fault_ends_in_the_reference_with_one_warning(monkeypatch, tmp_path, plant):
    found = plant(monkeypatch)
    monkeypatch.setattr(selfcheck, "PROBLEMS", SMALL_PROBLEMS)
    x, weight, A, B = (torch.randn(s) for s in ((9, 16), (12, 16), (4, 16), (12, 4)))
    terms, seed = [Term(A, B, 1.0, 0.5)], torch.tensor(1)
    with pytest.warns(RuntimeWarning, match=f"{FAILED}.*{found}") as caught:
        y = lora_grouped(x, weight, None, terms, seed)
        lora_grouped(x, weight, None, terms, seed)
    assert len(caught) == 1
    assert "fastlora doctor" in str(caught[0].message)
    torch.testing.assert_close(y, reference(x, weight, None, terms, seed))
    assert route().name == "reference"
    assert FAILED in route().why
    monkeypatch.setenv("FASTLORA_ROUTE", "gemm")
    with pytest.raises(ValueError, match=f"FASTLORA_ROUTE is 'gemm', but {FAILED}.*{found}"):
        lora_grouped(x, weight, None, terms, seed)
    monkeypatch.setenv("FASTLORA_ROUTE", "reference")
    assert route() == ("reference", "forced by FASTLORA_ROUTE")
    assert not notes_in(tmp_path), "a later process must check again"


def test_each_device_has_its_own_verdict_and_a_switch_turns_the_check_off(gpu, monkeypatch):
    assert route("cpu").name == "gemm"
    with pytest.warns(RuntimeWarning, match="self-check on cuda:98"):
        assert route("cuda:98").name == "reference"  # there is none
    assert route("cpu").name == "gemm"
    monkeypatch.setenv("FASTLORA_SELF_CHECK", "0")
    assert route("cuda:98").name == "gemm"


def test_the_callers_modes_and_random_numbers_do_not_matter(gpu):
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert PASSED in route().why
    assert torch.equal(before, torch.get_rng_state())


def test_threads_check_once(gpu, monkeypatch):
    route()
    once = len(gpu)
    selfcheck._found.clear()
    monkeypatch.setenv("FASTLORA_CACHE", "/dev/null")
    threads = [threading.Thread(target=route) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu) == 2 * once


def test_nothing_is_checked_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="cannot run while a CUDA graph is captured"):
        assert route("cuda:0").name == "reference"
    assert not gpu
    assert not selfcheck._found, "it must be checked after the capture"


@pytest.mark.slow
def test_first_use_while_torch_compile_traces(gpu):
    torch._dynamo.reset()
    x, weight, A, B = (torch.randn(s) for s in ((9, 16), (12, 16), (4, 16), (12, 4)))
    seed = torch.tensor(1)

    def op(x):
        return lora_grouped(x, weight, None, [Term(A, B, 1.0, 0.5)], seed)

    y = torch.compile(op, fullgraph=True, backend="eager")(x)
    assert {*gpu} == ALL_KERNELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(op(x), y)
