"""A LoRALinear that is copied, loaded, written to, trained, hooked or shared by threads.

A situation is a function of a layer and an input, as in `test_like_linear.py`: what it gives is
compared with plain PyTorch's, on every route.
"""

import copy
import io
import pickle
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

UNSEEN = "without PyTorch's knowing: "


def pattern(y):
    return (torch.arange(y.numel(), device=y.device) * 37 % 17 - 8).div(8).to(y.dtype).view(y.shape)


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def through(layer, x):
    """The output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y], torch.autograd.grad(y, [x, *trained(layer)], pattern(y))


@torch.no_grad()
def spoil(layer):
    for p in layer.parameters():
        p.zero_()


def a_deep_copy(layer, x):
    through(layer, x)
    other = copy.deepcopy(layer)
    spoil(layer)
    return through(other, x)


def a_shallow_copy(layer, x):
    return through(copy.copy(layer), x)


def pickled(layer, x):
    other = pickle.loads(pickle.dumps(layer))
    spoil(layer)
    return through(other, x)


def saved_whole(layer, x):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return through(torch.load(file, weights_only=False), x)


def state_dict(assign):
    def run(layer, x):
        other = copy.deepcopy(layer)
        spoil(other)
        other(x)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        other.load_state_dict(state, strict=True, assign=assign)
        return through(other, x)

    return run


def written(write):
    """All parameters are written to after a forward pass."""

    def run(layer, x):
        first = layer(x).detach()
        for p in layer.parameters():
            write(p)
        values, gradients = through(layer, x)
        return [first, *values], gradients

    return run


def through_numpy(p):
    if p.is_cuda:
        p.data.mul_(0.5)
    else:
        np.multiply(p.detach().numpy(), 0.5, p.detach().numpy())


def replace_parameter(layer, x):
    layer(x)
    base = getattr(layer, "base_layer", layer)  # PEFT's
    base.weight = nn.Parameter(layer.weight.detach() * 0.5, requires_grad=False)
    base.bias = nn.Parameter(layer.bias.detach() * 0.5)
    return through(layer, x)


def moved(layer, x):
    """To another type and back."""
    layer(x)
    back = layer.half().to(x.dtype)
    return through(back, x)


def a_cast_under_autocast(layer, x):
    """Autocast keeps casts of what is frozen: not for longer than its context."""
    for _ in range(2):
        with torch.autocast(x.device.type, torch.float16):
            layer(x)
        with torch.no_grad():
            layer.weight.mul_(0.5)
    return through(layer, x)


def views_of_one_vector(layer, x):
    vector_to_parameters(parameters_to_vector(layer.parameters()) * 0.5, layer.parameters())
    return through(layer, x)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "AdamW of lists": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def steps(layer, x, optimizer, after=lambda: None):
    for i in range(2):
        optimizer.zero_grad()
        y = layer(x.roll(i, 0))
        (pattern(y) * y).sum().backward()
        optimizer.step()
        after()


def optimised(make):
    def run(layer, x):
        layer.bias.requires_grad_(True)
        steps(layer, x, make(trained(layer)))
        return [*through(layer, x)[0], *trained(layer)], []

    return run


def moving_averages(layer, x):
    """Are swapped in for an evaluation, and the last step's parameters back after it."""
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    steps(layer, x, torch.optim.SGD(trained(layer), 0.1), lambda: average.update_parameters(layer))

    def swap():
        for p, q in zip(layer.parameters(), average.module.parameters(), strict=True):
            p.data, q.data = q.data, p.data

    found = []
    for _ in range(3):
        swap()
        found.append(layer(x).detach())
    return found, []


def steps_in_backward(layer, x):
    for p in trained(layer):
        optimizer = torch.optim.SGD([p], 0.1)
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    y = layer(x)
    y.backward(pattern(y))
    return through(layer, x)


def hooks(layer, x):
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    layer.register_forward_hook(lambda _, __, y: y + 1)
    layer.register_full_backward_hook(lambda _, dx, __: (3 * dx[0],))
    return through(layer, x)


def scaled_gradients(layer, x):
    for p in trained(layer):
        p.register_hook(lambda grad: 3 * grad)
    return through(layer, x)


def two_threads(layer, x):
    found = {}

    def work(i):
        for _ in range(3):
            found[i] = through(layer, x.roll(i, 1))

    threads = [Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*found[0][0], *found[1][0]], [*found[0][1], *found[1][1]]


SITUATIONS = {
    "a deep copy": a_deep_copy,
    "a shallow copy": a_shallow_copy,
    "pickled": pickled,
    "saved whole": saved_whole,
    "a state dict is copied": state_dict(assign=False),
    "a state dict is assigned": state_dict(assign=True),
    "a write in place": written(lambda p: p.detach().mul_(0.5)),
    "a new `.data`": written(lambda p: setattr(p, "data", p.data * 0.5)),
    f"{UNSEEN}a write to `.data`": written(lambda p: p.data.mul_(0.5)),
    f"{UNSEEN}a write through NumPy": written(through_numpy),
    f"{UNSEEN}an initialiser": written(lambda p: nn.init.constant_(p.data, 0.25)),
    "a new parameter": replace_parameter,
    "to half and back": moved,
    "autocast in between": a_cast_under_autocast,
    "views of one vector": views_of_one_vector,
    **{name: optimised(make) for name, make in OPTIMIZERS.items()},
    "moving averages": moving_averages,
    "steps in backward": steps_in_backward,
    "hooks of the module": hooks,
    "hooks of the parameters": scaled_gradients,
    "two threads": two_threads,
}
KINDS = [
    *((kind, route) for kind in ("injected", "packed") for route in ("reference", "gemm")),
    *(("built", "reference"), ("subclass", "reference"), ("peft", "reference")),
]


@pytest.mark.parametrize(
    ("kind", "route", "name"),
    [
        (kind, route, name)
        for kind, route in KINDS
        for name in SITUATIONS
        # An owner who packs weights says when they change; kernels do not see which optimiser ran.
        if not (kind == "packed" and name.startswith(UNSEEN))
        and not (route != "reference" and name in {*OPTIMIZERS} - {"fused AdamW"})
    ],
)
def test_a_changed_layer_gives_what_plain_pytorch_gives(kind, route, name, like_plain):
    like_plain(SITUATIONS[name], kind, route)
