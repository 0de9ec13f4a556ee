"""Query, key and value: one product while they are plain, and what others put in their place."""

import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel, Parts, SelfAttention

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
NAMES = ("query", "key", "value")


def self_attention(trainable=False, **parts):
    torch.manual_seed(0)
    return SelfAttention(CONFIG, Parts(**parts)).requires_grad_(trainable)


def one_by_one(attention, x):
    return torch.cat([getattr(attention, name)(x) for name in NAMES], 1)


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
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_replaces_a_layer_is_called(kind, trainable, name):
    attention, x = self_attention(trainable), torch.randn(5, 16)
    before = attention.projection(attention, x)
    torch.testing.assert_close(before, one_by_one(attention, x))
    setattr(attention, name, REPLACEMENTS[kind](getattr(attention, name)))
    found = attention.projection(attention, x)
    torch.testing.assert_close(found, one_by_one(attention, x))
    unchanged = kind == "weight norm"  # it starts with the same weight
    assert torch.allclose(found, before) == unchanged
    for other in NAMES:
        assert attention.is_plain(getattr(attention, other)) == (other != name)


def test_layers_without_biases():
    attention, x = self_attention(), torch.randn(5, 16)
    for name in NAMES:
        setattr(attention, name, nn.Linear(16, 16, bias=False))
    torch.testing.assert_close(attention.projection(attention, x), one_by_one(attention, x))


def test_backward_hooks_and_global_hooks_are_called():
    attention, x, seen = self_attention(), torch.randn(5, 16, requires_grad=True), []
    attention.key.register_full_backward_hook(lambda *_: seen.append("backward"))
    attention.projection(attention, x).sum().backward()
    assert seen == ["backward"]
    attention = self_attention()
    handle = register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        attention.projection(attention, x)
    finally:
        handle.remove()
    assert seen[1:] == [attention.query, attention.key, attention.value]


def test_the_linear_layers_that_an_encoder_is_built_of_are_plain():
    class Counted(nn.Linear):
        calls = 0

        def forward(self, input):
            Counted.calls += 1
            return super().forward(input)

    attention, x = self_attention(linear=Counted), torch.randn(5, 16)
    assert all(attention.is_plain(getattr(attention, name)) for name in NAMES)
    found = attention.projection(attention, x)
    assert Counted.calls == 0
    torch.testing.assert_close(found, one_by_one(attention, x))
    # Anybody else's encoder does not know what it computes.
    assert not self_attention().is_plain(Counted(16, 16))
    assert attention.is_plain(nn.Linear(16, 16))


@pytest.mark.parametrize("train", ["weight", "bias", "query.weight", "value.bias"])
def test_every_parameter_that_wants_a_gradient_gets_it(train):
    attention, x = self_attention(), torch.randn(5, 16)
    wanted = {n: p for n, p in attention.named_parameters() if n.endswith(train)}
    for parameter in wanted.values():
        parameter.requires_grad_()
    weights = torch.randn(5, 48)
    (attention.projection(attention, x) * weights).sum().backward()
    found = {n: p.grad for n, p in attention.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    expected = torch.autograd.grad((one_by_one(attention, x) * weights).sum(), [*wanted.values()])
    for grad, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_packing_leaves_the_versions_of_parameters_alone():
    attention = self_attention()
    attention.packed()
    before = attention.query.weight._version
    with torch.no_grad():
        attention.key.weight.add_(1)
    weight, _ = attention.packed()
    assert torch.equal(weight[16:32], attention.key.weight)
    assert attention.query.weight._version == before


def test_threads_share_a_model(monkeypatch):
    torch.manual_seed(0)
    model, moves, cat = BertModel(CONFIG).requires_grad_(False).eval(), [], torch.cat
    ids = torch.randint(30, (2, 4, 9))
    masks = torch.arange(9) < torch.tensor([[9, 3, 1, 5], [2, 7, 4, 4]])[:, :, None]
    start, found = threading.Barrier(2), {}

    def slow_cat(*args):
        moves.append(args)
        time.sleep(0.02)
        return cat(*args)

    @torch.no_grad()
    def work(batch):
        start.wait()
        found[batch] = [model(ids[batch], masks[batch]).last_hidden_state for _ in range(5)]

    monkeypatch.setattr(torch, "cat", slow_cat)
    threads = [threading.Thread(target=work, args=(batch,)) for batch in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moves) == 2 * CONFIG.num_hidden_layers  # the weights and the biases, once
    for batch, states in found.items():
        for state in states:
            torch.testing.assert_close(state, model(ids[batch], masks[batch]).last_hidden_state)
