"""torch.compile gives what the model gives without it: outputs and gradients."""

import copy
import shutil

import pytest
import torch
from torch import nn

from fastlora.bert.config import BertConfig
from fastlora.bert.layout import Layout
from fastlora.bert.model import BertModel

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
INDUCTOR = pytest.param(
    "inductor",
    True,
    False,
    4,
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
    ],
)


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield BertModel(CONFIG)
    torch.compiler.reset()


def results(model, ids, mask, grad):
    """Every output and gradient."""
    model.zero_grad()
    with torch.set_grad_enabled(grad):
        output = model(ids, mask)
    if grad:
        states = output.last_hidden_state
        weights = torch.arange(states.numel()).cos().view_as(states)
        ((states * weights).mean() + output.pooler_output.mean()).backward()
    return [output.pooler_output, *output.hidden_states, *(p.grad for p in model.parameters())]


def compare(model, compiled, **inputs):
    for found, expected in zip(results(compiled, **inputs), results(model, **inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def batches(count=4):
    """Ids and masks, of lengths on either side of `LONG`, and then of other sizes and unpadded."""
    kinds = (2, 5, True), (2, 120, True), (3, 6, True), (2, 7, False)
    for size, length, padded in kinds[:count]:
        lengths = torch.arange(size) * 2 + 1
        mask = torch.arange(length) < lengths[:, None]
        yield torch.randint(30, (size, length)), mask if padded else None


@pytest.mark.parametrize(
    ("backend", "training", "whole", "count"),
    [
        # Without training it is a part of what aot_eager does.
        pytest.param("eager", True, False, 4, marks=pytest.mark.slow),
        ("eager", True, True, 2),
        pytest.param("eager", True, True, 4, marks=pytest.mark.slow),
        pytest.param("aot_eager", False, False, 4, marks=pytest.mark.slow),
        pytest.param("aot_eager", False, True, 4, marks=pytest.mark.slow),
        INDUCTOR,
    ],
)
def test_outputs_and_gradients(model, backend, training, whole, count):
    model.train(training).embeddings.requires_grad_(False)
    compiled = copy.deepcopy(model)
    # Layout.of counts the real tokens, which no graph can hold.
    part = compiled if whole else compiled.encoder
    part.compile(dynamic=True, backend=backend, fullgraph=not whole)
    for ids, mask in batches(count):
        for grad in (True, False):
            compare(model, compiled, ids=ids, mask=mask, grad=grad)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["", "bias", "LayerNorm.weight"])
def test_frozen_weights(model, train):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(train) if train else name.startswith("pooler"))
    compiled = copy.deepcopy(model)
    compiled.encoder.compile(dynamic=True, backend="eager", fullgraph=True)
    for ids, mask in batches(2):
        compare(model, compiled, ids=ids, mask=mask, grad=True)


@pytest.mark.slow
def test_recomputed_layers(model):
    model.encoder.recompute = True
    compiled = copy.deepcopy(model)
    compiled.encoder.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    for ids, mask in batches():
        compare(model, compiled, ids=ids, mask=mask, grad=True)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.slow
def test_a_replaced_layer(model):
    attention = model.encoder.layer[0].attention["self"]
    attention.key = Doubled(16, 16)
    compiled = copy.deepcopy(model)
    compiled.encoder.compile(dynamic=True, backend="eager", fullgraph=True)
    for ids, mask in batches(2):
        compare(model, compiled, ids=ids, mask=mask, grad=True)


@pytest.mark.slow
def test_changed_weights_show(model):
    """The packed weights are no constants of the graph."""
    model.requires_grad_(False).eval()
    x, layout = torch.randn(6, 16), Layout(2, 3)
    compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
    before = compiled(x, layout)[-1]
    model.encoder.layer[0].attention["self"].key.weight.mul_(2)
    model.encoder.layer[0].attention["self"].value.bias.add_(1)
    after = compiled(x, layout)[-1]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.encoder(x, layout)[-1])
