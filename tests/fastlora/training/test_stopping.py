"""A library leaves its host's process alone: signals, random states, malloc, process groups."""

import ctypes
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.cli.process import command_stop
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.runs.export import export
from fastlora.runs.session import run_training
from fastlora.runs.trained import load, merge_encoder
from fastlora.training.checkpoint import latest_checkpoint
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import read_encoder
from fastlora.training.stopping import Stop

HEARS_CTRL_C = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="started in the background by a shell, which makes the tests ignore Ctrl-C",
)


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def states():
    """What a run could change, in a form that compares."""
    kind, keys, *rest = np.random.get_state()
    numpy = (kind, keys.tolist(), *rest)
    return handlers(), torch.get_rng_state().tolist(), random.getstate(), numpy


def at_step(monkeypatch, number, action):
    """Have something happen in a run just before it takes a step."""
    step = Trainer.step

    def patched(self, plan):
        if self.progress.step == number:
            action()
        return step(self, plan)

    monkeypatch.setattr(Trainer, "step", patched)


def raises(error):
    def function(*_):
        raise error

    return function


@pytest.fixture(autouse=True)
def another_state():
    """None that a seed of the library's would lead to."""
    torch.manual_seed(987654321)


@pytest.mark.parametrize("changes", [{}, {"mode": "frozen"}])
def test_a_run_leaves_handlers_and_random_states_alone(tiny_config, monkeypatch, changes):
    before, within = states(), []
    at_step(monkeypatch, 2, lambda: within.append(handlers()))
    run_training(tiny_config(**changes), quiet=True)
    assert states() == before
    assert within[-1] == before[0]
    load(tiny_config().out, "cpu")
    assert states() == before


@contextmanager
def unusual_modes():
    """All that a caller may have changed about how PyTorch computes."""
    with ExitStack() as stack:
        for mode in (torch.inference_mode(), torch.autocast("cpu"), torch.device("meta")):
            stack.enter_context(mode)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield


def modes():
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *grad, torch.is_autocast_enabled("cpu"), torch.empty(0).device, torch.get_default_dtype()


def test_the_callers_modes_change_nothing_and_are_left_alone(tiny_config, tmp_path):
    def outcome(name):
        config = tiny_config(out=tmp_path / name, max_steps=2, tasks=("sst",))
        run_training(config, quiet=True)
        trained = load(config.out, "cpu")
        merge_encoder(trained, "sst", tmp_path / f"{name} merged")
        export(trained, "sst", tmp_path / f"{name} exported", merged=True)
        return trained.model.state_dict(), trained.predict(["a good film"])

    state, *others = outcome("usual")
    with unusual_modes():
        before = modes()
        found, *others_found = outcome("unusual")
        assert modes() == before
    assert others_found == others
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_so_does_a_run_that_fails_and_one_that_does_not_start(tiny_config, tmp_path):
    before = states()
    with pytest.raises(RunError, match="diverged"):
        run_training(tiny_config(mode="full", lr=1e30, warmup=0.0, epochs=3, clip=1e30), quiet=True)
    run_training(tiny_config(out=tmp_path / "dry"), quiet=True, dry_run=True)
    read_encoder(find_inputs(tiny_config()).source)
    assert states() == before


@HEARS_CTRL_C
def test_ctrl_c_is_the_hosts(tiny_config, monkeypatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    before = states()
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config(), quiet=True)
    assert states() == before


def test_a_thread_may_train_and_another_stop_it(tiny_config, monkeypatch):
    config, stop, ends = tiny_config(), Stop(), []

    def train():
        try:
            ends.append(run_training(config, quiet=True, stop=stop))
        except Interrupted as error:
            ends.append(error)

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: setattr(stop, "asked", True))
        for _ in range(2):
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            stop = Stop()
    assert isinstance(ends[0], Interrupted) and ends[1].steps > 3
    assert "stopped after step 3, saved" in (config.out / "train.log").read_text()


def test_a_thread_may_train_with_signals_that_only_the_main_one_could_hear(tiny_config):
    ends, before = [], handlers()
    stop = Stop(signal.SIGINT, signal.SIGTERM)
    train = partial(run_training, tiny_config(max_steps=2), quiet=True, stop=stop)
    thread = threading.Thread(target=lambda: ends.append(train()))
    thread.start()
    thread.join()
    assert ends[0].steps == 2 and handlers() == before


def test_runs_of_two_threads_do_not_disturb_each_other(tiny_config, tmp_path):
    """Each ends as it does alone, and the caller's random state is as it was."""

    def weights(name):
        files = sorted((tmp_path / name / "adapter").glob("*.safetensors"))
        return {key: tensor for file in files for key, tensor in load_file(file).items()}

    def train(seed, name):
        run_training(tiny_config(seed=seed, out=tmp_path / name), quiet=True)

    train(1, "alone")
    before = states()
    threads = [threading.Thread(target=train, args=(seed, str(seed))) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states() == before
    alone, beside, other = weights("alone"), weights("1"), weights("2")
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert not all(torch.equal(alone[name], other[name]) for name in alone)


def test_the_callers_process_group_survives(tiny_config, tmp_path, monkeypatch):
    """One process of two, in a group of its own, so that it need not wait for the other."""
    begin = dist.init_process_group
    group = {"init_method": f"file://{tmp_path / 'store'}", "rank": 0, "world_size": 1}
    monkeypatch.setenv("WORLD_SIZE", "2")
    begin("gloo", **group)
    try:
        run_training(tiny_config(max_steps=1), quiet=True)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    group["init_method"] += "-2"
    monkeypatch.setattr(dist, "init_process_group", lambda backend: begin(backend, **group))
    run_training(tiny_config(max_steps=1, out=tmp_path / "own"), quiet=True)
    assert not dist.is_initialized()


def test_a_group_without_an_address_is_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK expected, but not set"):
        run_training(tiny_config(max_steps=1), quiet=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", raises(RuntimeError("Connection closed by peer")))
    with pytest.raises(RunError, match="processes cannot be reached: Connection closed"):
        run_training(tiny_config(max_steps=1), quiet=True)


IMPORTS = """
import importlib, pkgutil, random, signal
import numpy as np
import rich.style  # it draws a number from Python's generator, whoever imports it
import torch
import fastlora, fastlora.bert, fastlora.kernels

def states():
    kind, keys, *rest = np.random.get_state()
    numbers = sorted(signal.valid_signals())
    return {
        "signals": [signal.getsignal(number) for number in numbers],
        "torch": torch.get_rng_state().tolist(),
        "torch's seed": torch.initial_seed(),
        "random": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }

before, count = states(), 0
for package in (fastlora, fastlora.bert, fastlora.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
            count += 1
        except ModuleNotFoundError as error:
            if error.name.startswith("fastlora"):
                raise
after = states()
print(count, *(name for name in before if before[name] != after[name]), sep=",")
"""


def in_a_process(code, *arguments):
    """What a program prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_any_module_changes_nothing():
    count, *changed = in_a_process(IMPORTS).split(",")
    assert int(count) > 40 and changed == []


MALLOC = """
import ctypes, sys
from pathlib import Path
from fastlora import TrainConfig, run_training
from fastlora.cli.process import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

class Facts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in "usmblks fsmblks uordblks fordblks k".split()]

libc.mallinfo2.restype = Facts

def is_mapped():
    before, place = libc.mallinfo2().hblkhd, libc.malloc(1 << 26)
    mapped = libc.mallinfo2().hblkhd - before
    libc.free(place)
    return mapped >= 1 << 26

data, model, out = sys.argv[1:]
config = TrainConfig(data=Path(data), model=model, out=Path(out), device="cpu", max_steps=1)
found = [is_mapped()]
run_training(config, quiet=True)
found.append(is_mapped())
keep_freed_memory()
found.append(is_mapped())
print(*found)
"""


@pytest.mark.parametrize(("error", "lines"), [(OSError(28, "full"), 0), (ValueError("x"), 1)])
def test_a_command_prints_no_full_disk_of_a_thread(monkeypatch, error, lines):
    """The thread of TensorBoard, whose error is raised in the main thread, too."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    command_stop()

    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert len(printed) == lines


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc tells what a large block is",
)
def test_a_run_leaves_malloc_alone(tiny_config):
    """With malloc as it was, a large block is a mapping; to a command, a part of the heap."""
    config = tiny_config()
    found = in_a_process(MALLOC, config.data, config.model, config.out)
    assert found == "True True False"


@HEARS_CTRL_C
def test_the_first_signal_asks_and_a_later_one_does_what_it_did():
    stop, before = Stop(signal.SIGINT, signal.SIGTERM), handlers()
    stop.echo = 60.0
    with stop:
        assert not stop.asked
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)  # at once: those that torchrun passes on
            assert stop.asked
        stop.echo = 0.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def commanded(config, *flags):
    """The exit code of `fastlora train`."""
    given = ["--data", config.data, "--model", config.model, "--out", config.out, "--quiet", *flags]
    with pytest.raises(SystemExit) as end:
        main(["train", "--device", "cpu", *map(str, given)])
    return end.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_finishes_its_step_and_saves(tiny_config, monkeypatch, number):
    config, before = tiny_config(), handlers()
    at_step(monkeypatch, 1, lambda: signal.raise_signal(number))
    assert commanded(config) == 130
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-000002"]
    assert handlers() == before


@HEARS_CTRL_C
def test_a_second_ctrl_c_stops_a_command_at_once(tiny_config, monkeypatch):
    def press_twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)

    config, before = tiny_config(), handlers()
    at_step(monkeypatch, 1, press_twice)
    assert commanded(config) == 130
    assert latest_checkpoint(config.out / "checkpoints") is None
    assert handlers() == before
