"""Adapters, passes and threads that share one `Packed` do not come between one another."""

import threading

import pytest
import torch
from oracle import DEVICE, NAMES, SEED
from torch.utils.checkpoint import checkpoint

from fastlora.kernels import Packed, Term, forced_route, lora_grouped
from fastlora.kernels.triton import tuning

M, K, N, R = 20, 16, 24, 4

pytestmark = pytest.mark.usefixtures("wide_tiles")


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(N, K, device=DEVICE)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def passes(weight, A, B, packed, ranged=False):
    """Functions of a forward pass, and of backward: y, dx, dA and dB. Both use dropout."""
    x = torch.linspace(-1, 1, M * K, device=DEVICE).view(M, K).requires_grad_()
    rows = dict(start=3, stop=17) if ranged else {}

    def forward():
        return lora_grouped(x, weight, None, [Term(A, B, 2.0, 0.3, **rows)], SEED, packed)

    def backward(y):
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, A, B))]

    return forward, backward


def assert_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("route", "ranged"),
    [(route, ranged) for route in NAMES for ranged in (False, True)],
)
def test_two_adapters_interleaved(weight, route, ranged):
    packed = Packed()
    pairs = [(draw(R, K), draw(N, R)) for _ in range(2)]
    with forced_route(route):
        alone = []
        for pair in pairs:
            forward, backward = passes(weight, *pair, None, ranged)
            alone.append(backward(forward()))
        (forward_a, backward_a), (forward_b, backward_b) = (
            passes(weight, *pair, packed, ranged) for pair in pairs
        )
        for _ in range(2):
            a, b = forward_a(), forward_b()
            assert_same(backward_a(a), alone[0])
            assert_same(backward_b(b), alone[1])


@pytest.mark.parametrize("route", NAMES)
def test_two_views_of_the_same_memory_interleaved(weight, route):
    """A square factor and its transpose begin at the same address and have the same shape."""
    packed, A, B = Packed(), draw(K, K), draw(N, K)
    with forced_route(route):
        forward, backward = passes(weight, A, B, None)
        alone = backward(forward())
        forward, backward = passes(weight, A, B, packed)
        y = forward()
        passes(weight, A.T, B, packed)[0]()
        assert_same(backward(y), alone)


@pytest.mark.parametrize("route", NAMES)
def test_two_threads_with_an_adapter_each(weight, route, monkeypatch):
    packed, failures = Packed(), []
    if DEVICE == "cpu":  # Triton's interpreter runs one kernel at a time
        lock, launch = threading.Lock(), tuning.launch

        def one_at_a_time(*arguments):
            with lock:
                launch(*arguments)

        monkeypatch.setattr(tuning, "launch", one_at_a_time)
    start = threading.Barrier(2)

    def train(pair, alone):
        try:
            start.wait(60)
            with forced_route(route):
                for _ in range(4):
                    forward, backward = passes(weight, *pair, packed)
                    assert_same(backward(forward()), alone)
        except Exception as error:
            failures.append(error)

    threads = []
    for _ in range(2):
        pair = draw(R, K), draw(N, R)
        with forced_route(route):
            forward, backward = passes(weight, *pair, None)
            alone = backward(forward())
        threads.append(threading.Thread(target=train, args=(pair, alone)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def staged():
    """Hooks that give saved tensors back in buffers that they use again, as offloading does."""
    buffers = {}

    def unpack(saved):
        kind = saved.shape, saved.dtype, saved.stride()
        return buffers.setdefault(kind, torch.empty_like(saved)).copy_(saved)

    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack)


@pytest.mark.parametrize("hooks", [staged, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("route", NAMES)
def test_saved_tensors_that_lie_elsewhere_in_backward(weight, route, hooks):
    packed, A, B = Packed(), draw(R, K), draw(N, R)
    with forced_route(route):
        context = hooks()
        for _ in range(2):
            forward, backward = passes(weight, A, B, None)
            alone = backward(forward())
            forward, backward = passes(weight, A, B, packed)
            with context:
                y = forward()
            assert_same(backward(y), alone)
            with torch.no_grad():
                A.mul_(2)
                B.neg_()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", NAMES)
def test_activation_checkpointing(weight, route, reentrant):
    """The masks are drawn again from PyTorch's generator, which the checkpoint sets back."""
    x, A, B, packed = draw(M, K), draw(R, K), draw(N, R), Packed()

    def op(x):
        return lora_grouped(x, weight, None, [Term(A, B, 2.0, 0.3)], packed=packed)

    def gradients(run):
        torch.manual_seed(1)
        A.grad = B.grad = x.grad = None
        y = run()
        y.square().sum().backward()
        return [y.detach(), x.grad, A.grad, B.grad]

    with forced_route(route):
        plain = gradients(lambda: op(x))
        assert_same(gradients(lambda: checkpoint(op, x, use_reentrant=reentrant)), plain)
