"""The compile-stage hook for a T4: what it changes, and when it is in place."""

import threading

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

from fastlora.kernels import route  # noqa: E402
from fastlora.kernels.triton import tuning, turing  # noqa: E402

RUNTIME = triton.knobs.runtime


def current():
    return RUNTIME.add_stages_inspection_hook


@pytest.fixture(autouse=True)
def same_hook_afterwards():
    before = current()
    yield
    assert current() is before


class Options:
    num_stages = 1


def replaced(hook, capability=75, stages=1):
    """Whether the hook replaces the stage of a kernel."""
    options, table = Options(), {"ttgir": "stock"}
    options.num_stages = stages
    hook(object(), table, options, None, capability)
    return table["ttgir"] != "stock"


def test_it_leaves_other_kernels_alone():
    hook, table = turing.Hook(), {"ttgir": lambda module, metadata: "stock"}
    assert replaced(hook)
    assert not replaced(hook, 80)
    assert not replaced(hook, 75, stages=2)
    hook(object(), table, Options(), None, 75)
    assert table["ttgir"]("module { tt.func public @their_kernel() }", {}) == "stock"


def test_it_is_in_place_only_inside():
    before = current()
    with turing.compiling(75):
        assert replaced(current())
        with turing.compiling(75):
            assert replaced(current())
        assert replaced(current())
    assert current() is before
    with pytest.raises(KeyError), turing.compiling(75):
        raise KeyError
    assert current() is before
    with turing.compiling(80):
        assert current() is before


def test_its_key_is_the_same_each_time():
    """Triton keys compiled kernels by it: another key would compile them again."""
    keys = set()
    for _ in range(2):
        with turing.compiling(75):
            keys.add(current()())
    assert len(keys) == 1
    assert all(keys.pop())


def test_it_chains_to_the_hook_that_was_there(monkeypatch):
    calls = []

    def earlier(*stage):
        calls.append(stage)
        return "earlier", "hash"

    monkeypatch.setattr(RUNTIME, "add_stages_inspection_hook", earlier)
    with turing.compiling(75):
        key, digest = current()()
        assert key.startswith("earlier")
        assert key != "earlier"
        assert digest.startswith("hash")
        assert replaced(current())
    assert len(calls) == 2
    assert current() is earlier


def test_a_hook_that_others_put_there_meanwhile_stays(monkeypatch):
    """It may call ours for good: by then, ours changes nothing."""
    monkeypatch.setattr(RUNTIME, "add_stages_inspection_hook", None)
    with turing.compiling(75):
        ours = current()

        def theirs(*stage):
            return ours(*stage)

        RUNTIME.add_stages_inspection_hook = theirs
    assert current() is theirs
    assert not replaced(ours)
    assert ours() == ("", "")
    with turing.compiling(75):
        assert replaced(current())
    assert current() is theirs


def test_threads_that_launch_at_once():
    """The hook stays until the last of them is out."""
    first_in, last_in, first_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with turing.compiling(75):
            first_in.set()
            last_in.wait(10)
        first_out.set()

    def last():
        first_in.wait(10)
        with turing.compiling(75):
            last_in.set()
            first_out.wait(10)
            seen.append(replaced(current()))

    before = current()
    threads = [threading.Thread(target=f) for f in (first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True]
    assert current() is before


@pytest.mark.parametrize(("capability", "expected"), [(75, True), (80, False), (0, False)])
def test_launches_on_a_t4_happen_under_it(monkeypatch, capability, expected):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: seen.append(current() is not None and replaced(current()))

    monkeypatch.setattr(tuning, "capability", lambda _device: capability)
    tuning.launch(Kernel(), (1,), {"x_ptr": torch.zeros(1)}, {}, tuning.Blocks())
    assert seen == [expected]


def test_an_untested_triton_compiles_without_it(monkeypatch):
    before = current()
    assert turing.problem() == ""
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "3.3.1" in turing.problem()
    with turing.compiling(75):
        assert current() is before


def test_asking_for_the_route_installs_nothing(monkeypatch):
    before = current()
    monkeypatch.setenv("FASTLORA_SELF_CHECK", "0")
    monkeypatch.setattr(tuning, "capability", lambda _device: 75)
    # Answers are kept by device: these are nobody else's.
    assert route("cuda:98", torch.float16).why == "Triton kernels for sm_75"
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "not one of" in route("cuda:99", torch.float16).why
    assert current() is before
