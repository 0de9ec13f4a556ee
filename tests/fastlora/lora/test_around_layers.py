"""What hangs on a layer or lies around it stays: hooks, forwards, computed weights, fast paths."""

import copy

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastlora import LoraConfig, UserError, eject, inject, merge

FIRST = LoraConfig(r=2, dropout=0.0, targets="0")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def low(layer, x, name="default"):
    A, B = layer.lora_A[name], layer.lora_B[name]
    return layer.settings[name].scale * F.linear(F.linear(x, A), B)


class Odd(nn.Linear):
    """As fake-quantised, gated or noisy layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_hooks_stay_through_inject_and_eject(fill):
    model, calls = two_layers(), []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    for change in (lambda: inject(model, FIRST), lambda: fill(model), lambda: eject(model)):
        change()
        calls.clear()
        model(X.clone().requires_grad_()).sum().backward()
        assert calls == ["before", "after", "backward"]


@pytest.mark.parametrize("base", [Odd, type("Noisy", (Odd,), {})])
def test_a_subclass_keeps_its_own_forward(base, fill):
    model = nn.Sequential(base(4, 4))
    plain = model(X)
    inject(model, FIRST)
    assert isinstance(model[0], base)
    assert torch.equal(model(X), plain)
    torch.testing.assert_close(fill(model)(X), plain + low(model[0], X))
    assert type(eject(model)[0]) is base and torch.equal(model(X), plain)


def test_a_forward_on_the_instance_is_kept(fill):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: 3 * x
    inject(model, FIRST)
    assert torch.equal(model(X), 3 * X)
    torch.testing.assert_close(fill(model)(X), 3 * X + low(model[0], X))
    assert torch.equal(eject(model)(X), 3 * X)


def parametrised(layer):
    return parametrizations.weight_norm(layer)


def orthogonal(layer):
    return parametrizations.orthogonal(layer)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


WRAPPED = [parametrised, orthogonal, old_weight_norm, nn.utils.spectral_norm, pruned]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_weight_that_is_computed_stays_so(wrap, fill):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 4))).eval()
    plain, kind = model(X), type(model[0])
    inject(model, FIRST)
    assert trained(model) == ["0.lora_A.default", "0.lora_B.default"]
    torch.testing.assert_close(model(X), plain)
    torch.testing.assert_close(fill(model)(X), plain + low(model[0], X))
    model(X).sum().backward()
    with pytest.raises(UserError, match="'0' cannot be merged"):
        merge(model)
    assert type(eject(model)[0]) is kind
    torch.testing.assert_close(model(X), plain)
    assert set(trained(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("wrap", [parametrised, pruned])
def test_a_weight_that_is_computed_from_now_on_is_used(wrap, fill):
    model = two_layers()
    inject(model, FIRST)
    wrap(fill(model)[0])
    x = model[1](F.linear(X, model[0].weight, model[0].bias) + low(model[0], X))
    torch.testing.assert_close(model(X), x)


def test_eject_takes_a_parametrisation_of_another_layer_as_it_is():
    model = two_layers()
    inject(model, FIRST)
    parametrised(model[1])
    assert type(eject(model)[0]) is nn.Linear
    assert set(trained(model)) >= {"0.weight", "0.bias", "1.bias"}


def offloaded():
    model = two_layers()
    plain = model(X)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model, plain


def test_an_offloaded_model_is_adapted_trained_and_given_back(fill):
    model, plain = offloaded()
    layer = inject(model, FIRST)["0"]
    assert torch.equal(model(X), plain)
    fill(model)(X).sum().backward()
    assert layer.lora_A["default"].grad.any() and layer.lora_B["default"].grad.any()
    assert not torch.equal(model(X), plain)
    with pytest.raises(UserError, match="'0' cannot be merged"):
        merge(model)
    assert {p.device.type for p in (layer.weight, layer.bias)} == {"meta"}
    assert torch.equal(eject(model)(X), plain)


def test_accelerates_hooks_may_go_while_adapters_are_there(fill):
    model, plain = offloaded()
    inject(model, FIRST)
    adapted = fill(model)(X)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X), adapted)
    accelerate.cpu_offload(model[1], execution_device=torch.device("cpu"))
    assert torch.equal(model(X), adapted)
    assert torch.equal(eject(model)(X), plain)


def test_offloading_adapters_raises_instead_of_computing_with_nothing(fill):
    model = two_layers()
    plain = model(X)
    inject(model, FIRST)
    fill(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"lies on meta.*call inject after"):
        model(X)
    assert torch.equal(eject(model)(X), plain)


def attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True)


def test_attention_that_reads_its_weight_is_refused_and_all_leaves_it_out():
    model = nn.ModuleDict({"attention": attention(), "0": nn.Linear(8, 8)})
    with pytest.raises(UserError, match=r"'attention\.out_proj'.*never calls it"):
        inject(model, LoraConfig(targets="out_proj"))
    with pytest.raises(UserError, match="'out_proj'"):
        inject(model["attention"], LoraConfig(targets="out_proj"))
    assert len(trained(model)) == 6
    assert list(inject(model, LoraConfig(targets="all"))) == ["0"]


SENTENCES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder(layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers else layer


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoders_evaluate_with_what_was_trained(layers, copied, grad, fill):
    """Their fast paths, and nested tensors for padding, read weights and never call a layer."""
    model = encoder(layers).train()
    inject(model, LoraConfig(dropout=0.0, targets=("linear1", "linear2")))
    fill(model)
    model = copy.deepcopy(model) if copied else model
    wanted = model(SENTENCES, src_key_padding_mask=PADDING)[~PADDING]
    with torch.set_grad_enabled(grad):
        found = model.eval()(SENTENCES, src_key_padding_mask=PADDING)[~PADDING]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_eject_gives_transformer_encoders_their_fast_paths_back(fill):
    model = encoder().eval()
    with torch.no_grad():
        plain = model(SENTENCES, src_key_padding_mask=PADDING)
    before = [vars(module).keys() for module in model.modules()]
    fast = model.use_nested_tensor, model.layers[0].activation_relu_or_gelu
    inject(model, LoraConfig(targets="all"))
    eject(fill(model))
    assert fast == (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu)
    assert [vars(module).keys() for module in model.modules()] == before
    with torch.no_grad():
        assert torch.equal(model(SENTENCES, src_key_padding_mask=PADDING), plain)
