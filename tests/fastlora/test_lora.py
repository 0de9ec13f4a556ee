"""LoRALinear, injection, routing, merging."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora import LoraConfig
from fastlora.errors import UserError
from fastlora.kernels import draw_seed
from fastlora.lora import (
    DEFAULT,
    LoRALinear,
    Routing,
    Segment,
    inject,
    lora_layers,
    merge,
    parameter_report,
    unmerge,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
IDS = torch.arange(30).view(3, 10)


def _filled(model: nn.Module) -> nn.Module:
    """B is zero at first: give it values, so that adapters do something."""
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.2)
    return model


def _bert(settings=None) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).eval()
    if settings is not None:
        inject(model, settings)
    return _filled(model)


def test_drop_in_for_linear():
    torch.manual_seed(0)
    layer = LoRALinear(8, 6, r=3, alpha=12, dropout=0.0)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.lora_A[DEFAULT].shape == (3, 8) and layer.lora_B[DEFAULT].shape == (6, 3)
    assert layer.lora_A[DEFAULT].abs().max() <= 1 / math.sqrt(8)
    _filled(nn.Sequential(layer))
    A, B = layer.lora_A[DEFAULT], layer.lora_B[DEFAULT]
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 4 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), expected)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default",
        "lora_B.default",
    ]


def test_rslora_scale():
    assert LoraConfig(r=16, alpha=8).scale == 0.5
    assert LoraConfig(r=16, alpha=8, rslora=True).scale == 2.0


def test_no_bias_and_no_dropout_in_eval():
    layer = LoRALinear(8, 6, r=3, dropout=0.5, bias=False)
    _filled(nn.Sequential(layer))
    x = torch.randn(40, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer.bias is None


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(8, 6)
    layer = LoRALinear.from_linear(linear, {DEFAULT: LoraConfig(r=2)})
    assert layer.weight is linear.weight and not layer.weight.requires_grad


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": -1}, {"dropout": 1.0}, {"targets": ()}])
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        LoraConfig(**bad)


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [
        (("query", "value"), 2),
        (("output",), 1),
        (("ffn_output",), 1),
        (("query", "key", "value", "output", "intermediate", "ffn_output"), 6),
    ],
)
def test_inject_hits_the_named_matrices(targets, per_layer):
    model = _bert()
    layers = inject(model, LoraConfig(targets=targets))
    assert len(layers) == 2 * per_layer
    if targets == ("ffn_output",):
        assert set(layers) == {f"encoder.layer.{i}.output.dense" for i in range(2)}


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="'nothing' matches no linear layer"):
        inject(_bert(), LoraConfig(targets=("nothing",)))


def test_same_model_under_hugging_face():
    """Injected into transformers' BERT, the same adapters give the same states as in minBERT."""
    ours = _bert()
    theirs = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    theirs.load_state_dict(ours.state_dict())
    settings = LoraConfig(r=4, targets=("query", "value", "ffn_output"))
    for model in (ours, theirs):
        inject(model, settings)
    theirs.load_state_dict(_filled(ours).state_dict())
    found, expected = ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_packed_qkv_survives_moving_and_copying():
    model = _bert(LoraConfig(r=2))
    expected = model(IDS).last_hidden_state
    attention = model.encoder.layer[0].attention.self
    weight, _ = attention.packed()
    assert attention.query.weight.data_ptr() == weight.data_ptr()
    assert attention.value.weight.untyped_storage().data_ptr() == weight.data_ptr()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(IDS).last_hidden_state, expected)
    with torch.no_grad():
        clone.encoder.layer[0].attention.self.key.weight.add_(1.0)
    assert not torch.equal(clone(IDS).last_hidden_state, expected)
    assert torch.equal(model(IDS).last_hidden_state, expected)
    back = model.double().float()
    torch.testing.assert_close(back(IDS).last_hidden_state, expected)


def test_merge_is_exact_and_undone_bit_for_bit():
    model = _bert(LoraConfig(r=4, targets=("query", "value", "output", "ffn_output")))
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = model(IDS).last_hidden_state
    merge(model)
    merged = model.train().eval()(IDS).last_hidden_state  # train()/eval() must not unmerge
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert not torch.equal(
        model.encoder.layer[0].output.dense.weight, before["encoder.layer.0.output.dense.weight"]
    )
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(IDS).last_hidden_state, expected)


def test_merge_is_of_all_layers_or_none():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    inject(
        model, {"one": LoraConfig(r=2, targets=("b",)), "two": LoraConfig(r=2, targets=("a", "b"))}
    )
    merge(model, "one")
    with pytest.raises(RuntimeError, match="adapter one is merged already"):
        merge(model, "two")
    assert model["a"].merged == ()


def test_segments_route_rows_to_adapters():
    settings = {"a": LoraConfig(r=2), "b": LoraConfig(r=5, alpha=40)}
    layer = LoRALinear.from_linear(nn.Linear(8, 6), settings).eval()
    _filled(nn.Sequential(layer))
    x = torch.randn(7, 3, 8)
    layer.routing.segments = (Segment("a", 0, 2), Segment("b", 4, 7))
    y = layer(x)
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y[2:4], frozen[2:4])
    for name, rows in (("a", slice(0, 2)), ("b", slice(4, 7))):
        delta = x[rows] @ layer.lora_A[name].T @ layer.lora_B[name].T
        expected = frozen[rows] + settings[name].scale * delta
        torch.testing.assert_close(y[rows], expected)


def test_an_adapter_trains_alike_alone_and_in_company():
    settings = {"a": LoraConfig(r=2, dropout=0.4), "b": LoraConfig(r=3, dropout=0.4)}
    layer = LoRALinear.from_linear(nn.Linear(8, 6), settings).train()
    _filled(nn.Sequential(layer))
    x = torch.randn(9, 8)

    def gradient(rows, segments):
        torch.manual_seed(3)
        layer.routing = Routing(segments, draw_seed(x.device))
        out = layer(rows)
        return torch.autograd.grad(out[-4:].square().sum(), layer.lora_A["b"])[0]

    company = gradient(x, [Segment("a", 0, 5), Segment("b", 5, 9)])
    alone = gradient(x[5:], [Segment("b", 0, 4)])
    torch.testing.assert_close(company, alone)
    assert company.abs().sum() > 0


def test_parameter_report():
    model = nn.ModuleDict({"encoder": _bert(LoraConfig(r=2)), "heads": nn.Linear(32, 5)})
    report = parameter_report(model)
    assert report["lora"] == 2 * 2 * (2 * 32 + 32 * 2)
    assert report["other trainable"] == 5 * 33
    assert sum(report.values()) == sum(p.numel() for p in model.parameters())
