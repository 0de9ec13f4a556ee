"""Packed copies of a frozen weight: they follow it, and only its owner has them."""

import copy
import gc
import pickle
import threading
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from oracle import DEVICE, NAMES
from torch import nn

from fastlora.kernels import Linear, Packed, Term, forced_route, lora_grouped
from fastlora.kernels.call import LIMIT

ONEDNN = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
)
PACKED = [torch.float32]
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKED.append(torch.bfloat16)


pytestmark = pytest.mark.usefixtures("wide_tiles")


@pytest.fixture(autouse=True)
def fused():
    """The fused form on small inputs, too, which plain PyTorch computes otherwise."""
    with forced_route("reference"):
        yield


def layer(dtype=torch.float32, packed=True):
    torch.manual_seed(0)
    linear = Linear(24, 40, device=DEVICE, dtype=dtype).requires_grad_(False)
    linear.packed = Packed() if packed else None
    return linear


def unpacked(linear):
    """PyTorch's own layer with the same weights."""
    plain = nn.Linear(24, 40, device=DEVICE, dtype=linear.weight.dtype)
    plain.load_state_dict(linear.state_dict())
    return plain


def y_and_dx(linear, x):
    x = x.clone().requires_grad_()
    y = linear(x)
    return [y, *torch.autograd.grad(y.sum(), x)]


def assert_right(linear, x):
    for mine, other in zip(y_and_dx(linear, x), y_and_dx(unpacked(linear), x), strict=True):
        torch.testing.assert_close(mine, other)


def factors():
    """An adapter's A and B, the same each time."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 24), (40, 4))
    return [torch.randn(s, generator=draw).to(DEVICE).requires_grad_() for s in shapes]


def adapted(linear, x):
    """y, dx, dA and dB of the layer with an adapter."""
    leaves = [x.clone().requires_grad_(), *factors()]
    term = Term(*leaves[1:], 1.0)
    y = lora_grouped(leaves[0], linear.weight, linear.bias, [term], packed=linear.packed)
    return [y, *torch.autograd.grad(y.sum(), leaves)]


def assert_right_adapted(linear, x):
    """As plain PyTorch computes it."""
    leaves = [x.clone().requires_grad_(), *factors()]
    low = leaves[0] @ leaves[1].T @ leaves[2].T
    y = nn.functional.linear(leaves[0], linear.weight, linear.bias) + low
    expected = [y, *torch.autograd.grad(y.sum(), leaves)]
    for mine, other in zip(adapted(linear, x), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@ONEDNN
@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN is for CPUs")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", PACKED)
def test_as_near_the_truth_as_pytorch(dtype, packed):
    linear, x = layer(dtype, packed), torch.randn(7, 5, 24, dtype=dtype)
    ours = y_and_dx(linear, x)
    plain = unpacked(linear)
    theirs, truth = y_and_dx(plain, x), y_and_dx(plain.double(), x.double())
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (other - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("change", ["in place", "other data", "another parameter"])
def test_a_changed_weight_is_packed_again(dtype, change):
    linear, x = layer(dtype), torch.randn(3, 24, dtype=dtype, device=DEVICE)
    assert_right(linear, x)
    if change == "in place":
        with torch.no_grad():
            linear.weight.neg_()
    elif change == "other data":
        linear.weight.data = -linear.weight.data
    else:
        linear.weight = nn.Parameter(-linear.weight, requires_grad=False)
    assert_right(linear, x)


@pytest.mark.parametrize("dtype", PACKED)
def test_another_weight_in_the_same_place_in_memory_is_packed_again(dtype):
    linear, x = layer(dtype).cpu(), torch.randn(3, 24, dtype=dtype)
    memory = bytearray(linear.weight.nbytes)
    for sign in (1, -1):
        weight = sign * linear.weight
        linear.weight.data = torch.frombuffer(memory, dtype=dtype).view(40, 24).copy_(weight)
        y = linear(x)
        torch.testing.assert_close(y, nn.functional.linear(x, linear.weight, linear.bias.cpu()))


def broadcast(weight):
    """Receive another's weight, as data parallel training does, from a thread of this process."""
    store, new = dist.HashStore(), weight + 1

    def take_part(rank, tensor):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=20)
        group = dist.ProcessGroupGloo(store, rank, 2, options)
        group.broadcast([tensor], dist.BroadcastOptions()).wait()

    sender = threading.Thread(target=take_part, args=(0, new))
    sender.start()
    take_part(1, weight)
    sender.join()
    assert torch.equal(weight, new)


WRITES = {
    "data": lambda weight: weight.data.mul_(2),
    "init": lambda weight: nn.init.normal_(weight.data),
    "numpy": lambda weight: weight.detach().numpy().fill(0.5),
    "broadcast": broadcast,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("route", NAMES)
def test_without_a_packed_every_write_is_seen(route, write):
    if write in ("numpy", "broadcast") and DEVICE != "cpu":
        pytest.skip(f"{write} is for a CPU's memory")
    linear, x = layer(packed=False), torch.randn(3, 24, device=DEVICE)
    with forced_route(route):
        assert_right_adapted(linear, x)
        assert_right(linear, x)
        WRITES[write](linear.weight)
        assert_right_adapted(linear, x)
        assert_right(linear, x)


@pytest.mark.parametrize("route", NAMES)
def test_with_a_packed_such_a_write_is_seen_after_clear(route):
    linear, x = layer(), torch.randn(3, 24, device=DEVICE)
    with forced_route(route):
        assert_right_adapted(linear, x)
        linear.weight.data.mul_(2)
        linear.packed.clear()
        assert_right_adapted(linear, x)


@ONEDNN
@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN is for CPUs")
def test_a_weight_is_packed_once_for_each_pass():
    linear, x = layer(), torch.randn(3, 24)
    y_and_dx(linear, x)
    first = list(linear.packed.copies(linear.weight).values())
    y_and_dx(linear, x)
    second = list(linear.packed.copies(linear.weight).values())
    assert len(first) == 2
    assert all(mine is other for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_of_the_owner_packs_for_itself(again):
    linear, x = layer(), torch.randn(3, 24, device=DEVICE)
    y = y_and_dx(linear, x)[0]
    other = again(linear)
    assert other.packed is not linear.packed
    with torch.no_grad():
        other.weight.neg_()
    assert_right(other, x)
    assert torch.equal(y_and_dx(linear, x)[0], y)


@pytest.mark.parametrize("route", NAMES)
def test_the_copies_go_with_their_owner(route):
    """The weight goes, too: a copy keeps no hold of it."""
    linear, x = layer(), torch.randn(3, 24, device=DEVICE)
    with forced_route(route):
        adapted(linear, x)
    copies = [t for form in linear.packed.copies(linear.weight).values() for t in tensors_of(form)]
    assert copies or route == "reference"
    left = [weakref.ref(t) for t in (*copies, linear.weight, linear.packed)]
    del linear, copies
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


def tensors_of(form):
    return form if isinstance(form, tuple) else (form,)


@pytest.mark.parametrize("route", NAMES)
def test_adapters_that_come_and_go_leave_a_bounded_number_of_copies(route):
    linear, x = layer(), torch.randn(3, 24, device=DEVICE)
    adapters = []  # all alive, each in memory of its own
    with forced_route(route):
        for i in range(LIMIT + 5):
            A, B = torch.full((2, 24), 0.1 * i, device=DEVICE), torch.ones(40, 2, device=DEVICE)
            adapters.append((A, B))
            y = lora_grouped(x, linear.weight, None, [Term(A, B, 1.0)], packed=linear.packed)
            expected = x @ (linear.weight + B @ A).T
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert len(linear.packed.copies(linear.weight)) <= LIMIT


@pytest.mark.parametrize("route", NAMES)
def test_training_after_scoring_under_autocast(route):
    """What scoring has packed in inference mode serves a backward pass, too."""
    linear, x = layer(), torch.randn(3, 24, device=DEVICE)
    with forced_route(route), torch.autocast(DEVICE, torch.float16):
        with torch.inference_mode():
            linear(x)
            lora_grouped(x, linear.weight, None, [Term(*factors(), 1.0)], packed=linear.packed)
        found = adapted(linear, x)
        linear.packed = None
        expected = adapted(linear, x)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_weight_made_in_inference_mode():
    """It counts no changes, so nothing of it is kept."""
    with torch.inference_mode():
        linear, x = layer(), torch.randn(3, 24, device=DEVICE)
        for _ in range(2):
            expected = nn.functional.linear(x, linear.weight, linear.bias)
            torch.testing.assert_close(linear(x), expected)
            linear.weight.neg_()


def test_several_threads_on_one_layer():
    linear, x = layer(), torch.randn(64, 24, device=DEVICE)
    expected, wrong = y_and_dx(unpacked(linear), x), []

    def work():
        with forced_route("reference"):
            for _ in range(20):
                linear.packed.clear()
                for mine, other in zip(y_and_dx(linear, x), expected, strict=True):
                    if not torch.allclose(mine, other, rtol=1e-4, atol=1e-4):
                        wrong.append(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_trainable_layers_are_pytorchs_own():
    linear, x = layer().requires_grad_(), torch.randn(3, 24, device=DEVICE)
    y = linear(x)
    assert torch.equal(y, unpacked(linear)(x))
    y.sum().backward()
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("shape", [(40, 24), (7, 5)])
def test_a_watched_one_sees_writes_that_leave_no_trace(shape, dtype):
    """Through `.data`: one element by one bit, rows that change places, another sign."""
    weight = torch.randn(shape).to(dtype)
    packed = Packed(watched=True)
    forms = packed.copies(weight)
    assert packed.copies(weight) is forms
    bits = weight.data.view(torch.int32 if dtype == torch.float32 else torch.int16)
    writes = [
        lambda: bits[3, 2].bitwise_xor_(1),
        lambda: weight.data.copy_(weight.flip(0)),
        lambda: weight.data.neg_(),
        lambda: weight.numpy().fill(0) if dtype == torch.float32 else weight.data.zero_(),
    ]
    for write in writes:
        write()
        before, forms = forms, packed.copies(weight)
        assert forms is not before
        assert packed.copies(weight) is forms
    assert copy.deepcopy(packed).watched
