"""inject and eject: what they change in a model, and what they leave as it is."""

import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from fastlora import (
    LoraConfig,
    LoRALinear,
    UserError,
    eject,
    inject,
    lora_layers,
    merge,
    pack,
    parameter_report,
    set_adapter,
)
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.kernels import Linear

FIRST = LoraConfig(r=2, dropout=0.0, targets="0")
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
IDS = torch.arange(30).view(3, 10)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def everything(model):
    """What a refused call may not change: parameters, what trains, types, attributes."""
    return (
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        {name: (id(m), type(m), sorted(vars(m))) for name, m in model.named_modules()},
        {n: (m.settings.copy(), m.active, m.merged) for n, m in lora_layers(model).items()},
    )


def test_inject_freezes_all_but_the_adapters_and_gives_their_layers():
    model = two_layers()
    before, plain = [model[0], *model.parameters()], model(X)
    layers = inject(model, FIRST)
    assert list(layers) == ["0"] and layers["0"] is model[0] is before[0]
    assert isinstance(model[0], LoRALinear) and type(model[1]) is nn.Linear
    assert trained(model) == ["0.lora_A.default", "0.lora_B.default"]
    assert all(p in set(model.parameters()) for p in before[1:])
    assert torch.equal(model(X), plain)


def test_names_in_train_stay_trainable_as_modules_parameters_and_ends():
    model = nn.ModuleDict({"a": two_layers(), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)})
    inject(model, LoraConfig(targets="a.0"), train=("head", "norm.weight", "1.bias"))
    expected = ["a.0.lora_A.default", "a.0.lora_B.default", "a.1.bias", "norm.weight"]
    assert trained(model) == [*expected, "head.weight", "head.bias"]
    report = parameter_report(model)
    assert report["other trainable"] == 4 + 4 + 10
    assert sum(report.values()) == sum(p.numel() for p in model.parameters())


def test_a_trained_bias_of_an_adapted_layer_gets_its_gradient():
    """As BitFit beside LoRA, or PEFT's bias="lora_only"."""
    model = two_layers()
    inject(model, FIRST, train=("bias", "1.weight"))
    model(X).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained(model))


REFUSED = [
    (FIRST, {"train": ("slip",)}, "train has 'slip'"),
    (LoraConfig(targets=("0", "slip")), {}, "'slip' matches no linear layer"),
    ({"a": FIRST, "b": LoraConfig(targets="slip")}, {}, "'slip' matches no linear layer"),
    (LoraConfig(targets=("0", "out_proj")), {}, "'attention.out_proj'.*MultiheadAttention"),
    *(({name: FIRST}, {}, "adapter ") for name in ("", "a.b", "keys", "training")),
    ({}, {}, "config is {}"),
]


@pytest.mark.parametrize(("config", "options", "cause"), REFUSED)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_refused_inject_changes_nothing(config, options, cause, adapted):
    model = nn.ModuleDict(
        {"0": nn.Linear(4, 4), "1": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    )
    if adapted:
        inject(model, {"old": FIRST})
    before = everything(model)
    with pytest.raises(UserError, match=cause):
        inject(model, config, **options)
    assert everything(model) == before


def test_a_model_without_sizes_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(UserError, match="without shapes"):
        inject(model, FIRST)
    assert len(trained(model)) == 4 and type(model[0]) is nn.Linear


def test_a_distributed_model_is_refused():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Wrapped(two_layers())
    with pytest.raises(UserError, match="inject first"):
        inject(model, FIRST)
    assert len(trained(model)) == 4


def test_a_second_inject_adds_adapters_and_keeps_what_trained(fill):
    model = two_layers()
    inject(model, FIRST, train=("0.bias",))
    fill(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    more = inject(model, LoraConfig(r=2, dropout=0.0, targets=("0", "1")))
    assert list(more) == ["0", "1"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    new = ["1.lora_A.default", "1.lora_B.default"]
    assert sorted(trained(model)) == sorted(
        ["0.bias", "0.lora_A.default", "0.lora_B.default", *new]
    )
    model(X)  # a sole adapter is active on old layers and new ones


class Closed(nn.Linear):
    """Takes no attributes once it is built."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        vars(self)["closed"] = True

    def __setattr__(self, name, value):
        if "closed" in vars(self):
            raise AttributeError(f"{name}: closed")
        super().__setattr__(name, value)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_inject_that_fails_halfway_changes_nothing(adapted):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Closed(4, 4))
    if adapted:
        inject(model, {"old": FIRST})
    before = everything(model)
    with pytest.raises(UserError, match=r"Sequential takes no adapters: .*closed"):
        inject(model, {"new": LoraConfig(targets=("0", "1", "2"))})
    assert everything(model) == before


def test_an_integer_parameter_does_not_train():
    model = two_layers()
    model[1].count = nn.Parameter(torch.tensor(3), requires_grad=False)
    inject(model, FIRST, train="1")
    assert trained(model) == ["0.lora_A.default", "0.lora_B.default", "1.weight", "1.bias"]


def test_a_second_inject_with_other_settings_is_refused_by_layer():
    model = two_layers()
    inject(model, FIRST)
    with pytest.raises(UserError, match=r"layer '0'.*'default' with other settings"):
        inject(model, LoraConfig(r=3, dropout=0.0, targets=("1", "0")))
    assert type(model[1]) is nn.Linear


def test_a_second_name_must_be_chosen_and_a_known_one_keeps_the_choice():
    model = two_layers()
    inject(model, {"a": FIRST})
    inject(model, {"b": FIRST})
    with pytest.raises(UserError, match="none is chosen"):
        model(X)
    set_adapter(model, "b")
    inject(model, {"a": LoraConfig(r=2, dropout=0.0, targets="1")})
    assert {layer.active for layer in lora_layers(model).values()} == {("b",)}


def test_a_known_name_on_a_layer_more_keeps_the_choice_in_any_order():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    for i, name in enumerate("abc"):
        inject(model, {name: LoraConfig(targets=str(i))})
    set_adapter(model, "b")
    inject(model, {"c": LoraConfig(targets="0")})
    assert {layer.active for layer in lora_layers(model).values()} == {("b",)}


def test_adapters_start_alike_in_whatever_order_they_come():
    def start(*names):
        model = two_layers()
        torch.manual_seed(7)
        inject(model, {name: FIRST for name in names})
        return {name: model[0].lora_A[name] for name in names}

    one, two = start("a", "b"), start("b", "a")
    assert all(torch.equal(one[name], two[name]) for name in "ab")
    assert not torch.equal(one["a"], one["b"])


def test_a_layer_in_two_places_is_adapted_once_in_both(fill):
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(4, 4)})
    assert list(inject(model, LoraConfig(dropout=0.0, targets="b.0"))) == ["a"]
    fill(model)
    assert model["a"] is model["b"][0] is layer
    assert torch.equal(model["a"](X), model["b"](X))
    assert eject(model)["b"][0] is layer and type(layer) is nn.Linear


def test_a_model_may_be_one_linear_layer():
    model = nn.Linear(4, 4)
    assert inject(model, LoraConfig(targets="all")) == {"": model}
    assert isinstance(model, LoRALinear)
    assert type(eject(model)) is nn.Linear


@pytest.mark.parametrize("above", [False, True])
def test_eject_gives_back_what_was_there_bit_for_bit(above, fill):
    """Also when it is told of a model around the one that was injected."""
    model = nn.Sequential(two_layers(), nn.Linear(4, 2))
    model[0][0].bias.requires_grad_(False)
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, everything(model)
    inject(model[0] if above else model, LoraConfig(targets=("0", "1")))
    fill(model)
    model.train()(torch.randn(2, 4)).sum().backward()
    assert eject(model) is model
    assert everything(model) == before
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_eject_lets_a_weight_train_that_is_tied_to_another_module(fill):
    model = nn.Sequential(nn.Linear(4, 4), two_layers())
    model[1][0].weight = model[0].weight
    before = everything(model)
    inject(model[1], FIRST)
    assert not model[0].weight.requires_grad
    assert everything(eject(model)) == before


def test_eject_after_merge_gives_back_what_was_there_bit_for_bit(fill):
    model = two_layers()
    before, plain = everything(model), model(X)
    inject(model, FIRST)
    merge(fill(model))
    eject(model)
    assert everything(model) == before and torch.equal(model(X), plain)


def test_injected_into_transformers_the_same_adapters_give_minberts_states(fill):
    torch.manual_seed(0)
    ours = BertModel(BertConfig(**TINY)).eval()
    theirs = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        inject(model, LoraConfig(r=4, targets=("query", "value", "ffn_output")))
    theirs.load_state_dict(fill(ours).state_dict())
    found, expected = ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_adapted_bert_compiles_in_one_graph(fill):
    torch._dynamo.reset()
    model = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    inject(model, LoraConfig(dropout=0.0))
    expected = fill(model)(IDS).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS).last_hidden_state, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "make", [two_layers, lambda: transformers.BertModel(transformers.BertConfig(**TINY))]
)
def test_nothing_outlives_a_model(make, packed):
    """The shared case fail_22, whose own code counted packed copies in a table that is gone."""
    model = make()
    inject(model, FIRST if isinstance(model, nn.Sequential) else LoraConfig())
    if packed:
        pack(model)
    y = model(X.requires_grad_()) if isinstance(model, nn.Sequential) else model(IDS)[0]
    y.sum().backward()
    kept = [weakref.ref(t) for t in (*model.parameters(), *model.modules())]
    kept += [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    del model, y
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def test_packing_again_keeps_what_captured_graphs_read():
    model = nn.Sequential(Linear(4, 4))
    pack(model)
    layer = model[0]
    first = layer.packed
    first.graph.append("what a graph reads")
    kept = first.copies(layer.weight)
    pack(model)
    assert layer.packed is first
    assert first.graph
    assert first.copies(layer.weight) is not kept
