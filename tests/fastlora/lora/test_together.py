"""Several layers of one input: one product while they are bare, and what others make of them."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fastlora import LoraConfig, inject, merge, pack, unmerge
from fastlora.kernels import Linear, forced_route
from fastlora.lora.together import project_together

NAMES = ("query", "key", "value")


@pytest.fixture(autouse=True)
def fused():
    """The fused form on small inputs, too, which plain PyTorch computes otherwise."""
    with forced_route("reference"):
        yield


@pytest.fixture(params=["plain", "injected", "packed"])
def attention(request):
    """Query, key and value, the first and last of them with LoRA or none of them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: Linear(16, 16) for name in NAMES}).requires_grad_(False)
    if request.param != "plain":
        for layer in inject(model, LoraConfig(targets=("query", "value"), dropout=0.0)).values():
            nn.init.normal_(layer.lora_B["default"])
    if request.param == "packed":
        pack(model)
    return model


def project(attention, x):
    return project_together([attention[name] for name in NAMES], x)


def one_by_one(attention, x):
    return torch.cat([attention[name](x) for name in NAMES], -1)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Wrapped(nn.Module):
    """As adapters of other libraries are: no weight of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input):
        return self.inner(input) + input


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def patch_forward(layer):
    layer.forward = lambda input: 3 * nn.Linear.forward(layer, input)
    return layer


def hooked(kind, hook):
    def change(layer):
        getattr(layer, f"register_{kind}_hook")(hook)
        return layer

    return change


REPLACEMENTS = {
    "subclass": lambda layer: Doubled(16, 16).requires_grad_(layer.weight.requires_grad),
    "module": Wrapped,
    "forward hook": hooked("forward", lambda layer, inputs, output: output + 1),
    "pre-hook": hooked("forward_pre", lambda layer, inputs: (inputs[0] + 1,)),
    "patched": patch_forward,
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Negated()),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "no bias": lambda layer: nn.Linear(16, 16, bias=False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_a_layer_does_besides_is_done(kind, name, attention):
    x = torch.randn(5, 16)
    before = project(attention, x)
    torch.testing.assert_close(before, one_by_one(attention, x))
    attention[name] = REPLACEMENTS[kind](attention[name])
    found = project(attention, x)
    torch.testing.assert_close(found, one_by_one(attention, x))
    unchanged = kind == "weight norm"  # it starts with the same weight
    assert torch.allclose(found, before) == unchanged


def test_bare_layers_are_not_called(attention, monkeypatch):
    monkeypatch.setattr(Linear, "__call__", lambda *_: pytest.fail("a layer was called"))
    project(attention, torch.randn(2, 5, 16))


def test_layers_without_biases_and_of_several_sizes():
    layers, x = [nn.Linear(16, n, bias=False) for n in (8, 24, 16)], torch.randn(2, 5, 16)
    expected = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(project_together(layers, x), expected)


def test_backward_hooks_and_global_hooks_are_called(attention):
    x, seen = torch.randn(5, 16, requires_grad=True), []
    attention.key.register_full_backward_hook(lambda *_: seen.append("backward"))
    project(attention, x).sum().backward()
    assert seen == ["backward"]
    handle = register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        project(attention, x)
    finally:
        handle.remove()
    assert [layer for layer in seen[1:] if isinstance(layer, Linear)] == [*attention.values()]


@pytest.mark.parametrize(
    "train", ["weight", "bias", "query.weight", "value.bias", "lora_B.default"]
)
def test_every_parameter_that_wants_a_gradient_gets_it(train, attention):
    x, everything = torch.randn(5, 16), dict(attention.named_parameters())
    wanted = {n: p.requires_grad_(n.endswith(train)) for n, p in everything.items()}
    wanted = {n: p for n, p in wanted.items() if p.requires_grad}
    weights = torch.randn(5, 48)
    if not wanted:
        pytest.skip("the layers have no adapters")
    (project(attention, x) * weights).sum().backward()
    found = {n: p.grad for n, p in everything.items() if p.grad is not None}
    assert found.keys() == wanted.keys()
    expected = torch.autograd.grad((one_by_one(attention, x) * weights).sum(), [*wanted.values()])
    for grad, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(grad, other)


CHANGES = {
    "weight": lambda layer: layer.weight.mul_(2),
    "bias": lambda layer: layer.bias.add_(1),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "bias data": lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
    "load": lambda layer: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_product_follows_every_change(name, inference, attention):
    x = torch.randn(8, 16)
    if inference:
        attention = attention.requires_grad_(False)
    with torch.inference_mode(inference), torch.no_grad():
        for change in CHANGES.values():
            before = project(attention, x)
            assert torch.equal(project(attention, x), before)
            change(attention[name])
            assert not torch.equal(project(attention, x), before)
            torch.testing.assert_close(project(attention, x), one_by_one(attention, x))


def test_the_product_follows_a_merge(attention):
    if not hasattr(attention.query, "lora_A"):
        pytest.skip("the layers have no adapters")
    x = torch.randn(8, 16)
    before = project(attention, x)
    merge(attention)
    torch.testing.assert_close(project(attention, x), before)
    unmerge(attention)
    assert torch.equal(project(attention, x), before)


def test_only_an_owner_who_packs_has_copies(attention):
    x = torch.randn(8, 16)
    first = project(attention, x)
    packed = attention.query.packed
    if packed is not None:
        parts = [getattr(attention[n], kind) for kind in ("weight", "bias") for n in NAMES]
        copies = packed.copies(*parts)
        assert copies
        assert torch.equal(project(attention, x), first)
        assert packed.copies(*parts) is copies
    # A write that leaves no trace.
    attention.value.weight.data.mul_(2)
    assert torch.equal(project(attention, x), first) == (packed is not None)
    if packed is not None:
        pack(attention)
    torch.testing.assert_close(project(attention, x), one_by_one(attention, x))


def test_a_move_that_ends_at_the_same_address_is_seen():
    """There and back changes no count of PyTorch's, and freed memory is given out again."""
    for _ in range(50):
        layers = [Linear(16, 16).requires_grad_(False) for _ in NAMES]
        pack(nn.ModuleList(layers))
        x = torch.randn(8, 16)
        before = project_together(layers, x)
        layers[1].half().float()
        assert not torch.equal(project_together(layers, x), before)


def test_threads_share_packed_layers(attention):
    inputs = torch.randn(2, 5, 16)
    expected = [project(attention, x) for x in inputs]
    pack(attention)
    start, found = threading.Barrier(2), {}

    def work(batch):
        start.wait()
        with forced_route("reference"):
            found[batch] = [project(attention, inputs[batch]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(batch,)) for batch in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, outputs in found.items():
        assert all(torch.equal(output, expected[batch]) for output in outputs)
