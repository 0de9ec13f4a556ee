"""What a layer computes is found anew at each call: whatever PEFT or PyTorch changes is seen."""

import pytest
import torch
from models import assert_alike, batch
from survival import EXACT, encoder
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import fastlora
from fastlora.bert.layout import Layout
from fastlora.interop import encoders
from fastlora.kernels import forced_route

pytestmark = pytest.mark.filterwarnings("ignore:fastlora.accelerate")


class Negated(nn.Module):
    def forward(self, tensor):
        return -tensor


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("place", ["query.base_layer", "value.base_layer", "key"])
def test_parametrised_layers(pair, place, name):
    """What is computed at each call is not among a module's parameters."""
    ours, theirs = pair
    fastlora.accelerate(ours)
    for model in pair:
        layer = encoder(model).layer[0].attention.self.get_submodule(place)
        register_parametrization(layer, name, Negated())
    assert_alike(ours, theirs, batch(), **EXACT)


@pytest.mark.parametrize("route", ["", "reference"])
def test_each_call_sees_what_has_changed(pair, route):
    """Nothing of a layer's plan is kept from one call to the next, be it small or fused."""
    fastlora.accelerate(pair[0])
    layers = [encoder(model).layer[1].attention.self.value for model in pair]
    changes = [
        lambda layer: layer.scale_layer(3.0),
        lambda layer: setattr(layer.lora_B["default"], "weight", nn.Parameter(torch.ones(32, 8))),
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(32))),
        lambda layer: layer.lora_A.update({"default": nn.Linear(32, 8, bias=False)}),
        lambda layer: layer.lora_A["default"].register_forward_hook(lambda m, x, y: -y),
        lambda layer: layer.lora_dropout.update({"default": nn.Tanh()}),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_adapter([]),
        lambda layer: layer.register_forward_pre_hook(lambda m, x: (-x[0],)),
    ]
    with forced_route(route), torch.no_grad():
        last = None
        for change in changes:
            for layer in layers:
                torch.manual_seed(3)
                change(layer)
                layer.double()
            found, expected = (m(**batch(labels=False)).logits for m in pair)
            torch.testing.assert_close(found, expected, **EXACT)
            assert last is None or not torch.equal(found, last)
            last = found


def test_little_padding_keeps_the_padded_batch(pair, monkeypatch):
    """Packing takes time, too; while training it saves PyTorch's slow dropout."""
    monkeypatch.setattr(encoders, "MIN_PADDING", (3, 3))
    monkeypatch.setattr(encoders, "MIN_TOKENS", (1 << 40, 20))
    ours, theirs = pair
    fastlora.accelerate(ours)
    packed = []

    def note(module, inputs, kwargs):
        mask = inputs[1] if len(inputs) > 1 else kwargs["attention_mask"]
        packed.append(isinstance(mask, Layout))

    note.__module__ = "fastlora.lora.layer"  # a hook of this module asks for no padded batch
    encoder(ours).layer[0].attention.self.register_forward_pre_hook(note, with_kwargs=True)
    for lengths, training in [((9, 9), True), ((9, 7), True), ((9, 6), True), ((11, 9), True)]:
        assert_alike(ours, theirs, batch(lengths=lengths), **EXACT)
        ours.eval()
        ours(**batch(lengths=lengths))
        ours.train(training)
    #      training and evaluation of: no padding, 2, 3, and 2 with 20 tokens
    assert packed == [False, False, False, False, True, True, True, False]
