"""CUDA graphs of a training step, with a recorder of PyTorch's operations in place of a GPU's."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.bert import attention
from fastlora.cli import main
from fastlora.console import Log
from fastlora.data import batches
from fastlora.data.batches import collate
from fastlora.errors import UserError
from fastlora.kernels import dropout, forced_route, ops
from fastlora.kernels.cpu import route as cpu_route
from fastlora.kernels.triton import route as triton_route
from fastlora.multitask.predictor import predict
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import build_model, prepare, to_compute

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_assert_async")
POSITIONS = 64  # of the tiny model
CAPTURING = []  # the graph, while there is one
fork_rng = torch.random.fork_rng


class Graph:
    """Operations on fixed tensors, as a CUDA graph holds them: a replay runs no Python of ours."""

    def __init__(self):
        self.calls, self.written = [], ()

    def record(self, function, args, kwargs):
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        return found

    @torch.no_grad()
    def replay(self):
        with torch.autograd._unsafe_preserve_version_counter(self.written):
            for function, args, kwargs, found in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    """Records operations, and undoes in the end what they changed: a capture computes nothing."""

    def __init__(self):
        super().__init__()
        self.before = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device, which no capture survives"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        return CAPTURING[-1].record(function, args, kwargs or {})


@contextmanager
def capture(graph, pool):
    assert pool == "pool"
    CAPTURING.append(graph)
    recorder = Recorder()
    try:
        with recorder:
            yield
    finally:
        CAPTURING.pop()
        for tensor, before in recorder.before.values():
            tensor.detach().copy_(before)
        graph.written = tuple(tensor for tensor, _ in recorder.before.values())


def recorded(launch):
    """A kernel's launcher that is one operation of a graph; the interpreter is none of PyTorch."""

    @wraps(launch)
    def call(*args, **kwargs):
        if not CAPTURING:
            return launch(*args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            return CAPTURING[-1].record(launch, args, kwargs)

    return call


def philox(seed, stream, rows, columns, p, dtype=torch.bool):
    """The mask as a GPU draws it; the CPU's own reads the seed on the host."""
    return dropout.philox_keep(seed, stream, rows, columns, p).to(dtype)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def recorder(monkeypatch):
    """`torch.cuda`, as far as graphs use it."""
    fakes = {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng(devices=()))
    monkeypatch.setattr(ops, "is_capturing", lambda device: bool(CAPTURING))
    # The recorder watches operations, which a graph does not.
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    monkeypatch.setattr(ops, "MIN_FUSED_WORK", 0)  # a GPU's products are fused however small
    monkeypatch.setattr(attention, "USE_CPU_KERNEL", False)
    monkeypatch.setattr(cpu_route, "keep_mask", philox)
    monkeypatch.setattr(dropout, "keep_mask", philox)
    for name in ("down", "add", "outer"):
        monkeypatch.setattr(triton_route, name, recorded(getattr(triton_route, name)))


def make_trainer(config, graphs):
    setup = prepare(config, find_inputs(config))
    setup = replace(setup, config=replace(setup.config, cuda_graphs=graphs))
    model, _, _ = build_model(setup, setup.inputs.tasks, setup.config)
    to_compute(model, setup.config, setup.device)
    return Trainer(setup, model, None, World(setup.device), Log(quiet=True))


def trained(trainer, plan):
    """The losses of some steps and the weights after them."""
    losses = []
    for batch_plan in plan:
        trainer.sums.zero_()
        trainer.step(batch_plan)
        trainer.progress.step += 1
        losses.append(trainer.sums[:, 0].clone())
    return torch.stack(losses), [p.detach().clone() for p in trainer.parameters]


def shape_of(trainer, plan):
    batch = collate(trainer.setup.train, plan, POSITIONS)
    return (*batch.input_ids.shape, len(batch.layout.index))


@pytest.mark.parametrize("route", ["reference", pytest.param("gemm", marks=pytest.mark.slow)])
def test_graphs_train_as_plain_steps_do(tiny_config, recorder, route):
    """The same losses and weights: new batches, masks and weights reach a replayed graph."""
    config = tiny_config(tokens_per_batch=64, lr=1e-2, warmup=0.0, max_steps=100)
    check_graphs(replace(config, device="cpu"), route)


def test_graphs_scale_losses_of_half_precision(tiny_config, recorder):
    # Few targets, so that the roundings of fp16 do not add up.
    settings = {"lr": 1e-2, "targets": ("query", "value")}
    config = tiny_config(tokens_per_batch=64, warmup=0.0, max_steps=100, **settings)
    check_graphs(replace(config, device="cpu", precision="fp16"), "reference")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_graphs_train_on_a_gpu(tiny_config, route):
    config = tiny_config(tokens_per_batch=64, lr=1e-2, warmup=0.0, max_steps=100)
    check_graphs(replace(config, device="cuda", precision="fp32"), route)


def check_graphs(config, route):
    plain, graphed = (make_trainer(config, graphs) for graphs in (False, True))
    plain.max_length = POSITIONS  # the same filled batches, whose masks are the same
    first, *others = plain.plan(0)
    alike = next(p for p in others if shape_of(plain, p) == shape_of(plain, first))
    one_task = first[first[:, 0] == 0]
    plan = [first, alike, one_task, first]
    expected = trained(plain, plan)
    with forced_route(route):
        predict(graphed.model, graphed.setup.dev)  # kernels' routes pack the factors as they are
        found = trained(graphed, plan)
        outputs = predict(graphed.model, graphed.setup.dev)
    assert len(graphed.graphed.graphs) == 2
    torch.testing.assert_close(found[0], expected[0])
    assert not torch.allclose(found[0][0], found[0][3])
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, scores in predict(plain.model, plain.setup.dev).items():
        torch.testing.assert_close(outputs[name], scores, rtol=1.3e-6, atol=1e-5)  # those of fp32


def test_evaluating_between_replays_changes_nothing(tiny_config, recorder):
    config = tiny_config(tokens_per_batch=64, lr=1e-2, max_steps=100, device="cpu")
    once, twice = (make_trainer(config, graphs=True) for _ in range(2))
    plan = once.plan(0)[:1] * 4
    expected = trained(once, plan)
    first, _ = trained(twice, plan[:2])
    predict(twice.model, twice.setup.dev)
    second, weights = trained(twice, plan[2:])
    assert torch.equal(torch.cat([first, second]), expected[0])
    assert all(map(torch.equal, weights, expected[1]))


def test_what_fills_a_batch_changes_no_gradient(tiny_config, monkeypatch):
    """Sentences of no task, and padding that makes up for a round number of tokens."""
    found, round_up = [], batches._round_up
    for max_length, grid in ((None, None), (None, round_up), (POSITIONS, round_up)):
        monkeypatch.setattr(batches, "_round_up", grid or (lambda number, _: number))
        trainer = make_trainer(tiny_config(tokens_per_batch=256), graphs=False)
        trainer.max_length = max_length
        trainer.model.eval()  # no masks: their shapes differ
        loss = trainer.loss(*trainer.gather(trainer.plan(0)[0]))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainer.parameters if p.grad is not None)])
    for bare, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, bare)


@pytest.mark.parametrize("max_length", [20, POSITIONS])
def test_filled_batches_have_few_shapes(tiny_config, max_length):
    config = tiny_config(tokens_per_batch=256, epochs=3)
    trainer = make_trainer(config, graphs=False)
    shapes, bare_shapes, real, computed = set(), set(), 0, 0
    for plan in (plan for epoch in range(3) for plan in trainer.plan(epoch)):
        batch = collate(trainer.setup.train, plan, max_length)
        bare = collate(trainer.setup.train, plan)
        rows, length = bare.input_ids.shape
        assert torch.equal(batch.input_ids[:rows, :length], bare.input_ids)
        assert torch.equal(batch.attention_mask[:rows, :length], bare.attention_mask)
        assert batch.attention_mask.sum(1).min() >= 1
        assert batch.layout.index is not None and batch.input_ids.shape[1] <= max_length
        tokens = int(bare.attention_mask.sum())
        shapes.add((*batch.input_ids.shape, len(batch.layout.index)))
        bare_shapes.add((rows, length, tokens))
        real += tokens
        computed += len(batch.layout.index)
    assert len(shapes) < len(bare_shapes) / 2
    assert computed < 1.1 * real


def test_what_graphs_cannot_do_is_said(tiny_config, capsys, monkeypatch):
    for wrong in ({"accumulate": 2}, {"compile": True}, {"adapters": "per-task"}, {"mode": "full"}):
        with pytest.raises(UserError, match="cuda_graphs is given"):
            tiny_config(cuda_graphs=True, **wrong)
    with pytest.raises(UserError, match="the device is cpu"):
        config = tiny_config(cuda_graphs=True, device="cpu")
        prepare(config, find_inputs(config))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="one process"):
        patch.setenv("WORLD_SIZE", "2")
        prepare(config, find_inputs(config))
    with pytest.raises(SystemExit, match="2"):
        main(["search", "--cuda-graphs", "--device", "cpu"])
    assert "the device is cpu" in capsys.readouterr().err
