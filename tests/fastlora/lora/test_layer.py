"""One LoRALinear: its arguments, parameters, types, masks and copies."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import same_mask
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import LoraConfig, LoRALinear, UserError, inject, parameter_report, use_adapter
from fastlora.kernels import forced_route
from fastlora.kernels.dropout import keep_scale


def factors(layer, name="default"):
    return layer.lora_A[name], layer.lora_B[name]


def test_it_computes_the_papers_formula(fill):
    layer = fill(LoRALinear(8, 6, r=3, alpha=12, dropout=0.0))
    x, (A, B) = torch.randn(2, 5, 8), factors(layer)
    expected = F.linear(x, layer.weight, layer.bias) + 4 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), expected)


def test_it_starts_as_the_linear_layer_that_it_was():
    layer, x = LoRALinear(8, 6, r=3), torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    A, B = factors(layer)
    assert A.shape == (3, 8) and B.shape == (6, 3) and not B.any()
    assert 0 < A.abs().max() <= 1 / math.sqrt(8)  # Kaiming-uniform with a = sqrt(5)
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A.default", "lora_B.default"]


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((16, 8), {}),
        ((16, 8, False), {}),
        ((16, 8, True, "cpu", torch.bfloat16), {}),
        ((16, 8), {"bias": False, "device": "cpu"}),
        ((16, 8), {"dtype": torch.float16, "device": torch.device("meta")}),
    ],
)
def test_it_takes_the_arguments_of_nn_linear(arguments, keywords):
    theirs, ours = nn.Linear(*arguments, **keywords), LoRALinear(*arguments, **keywords, r=2)
    assert isinstance(ours, nn.Linear)
    assert (ours.in_features, ours.out_features) == (16, 8)
    for name in ("weight", "bias"):
        a, b = getattr(theirs, name), getattr(ours, name)
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_repr_and_report_tell_the_adapters_from_the_rest():
    layer = LoRALinear(16, 8, r=2, alpha=3.5)
    for part in ("in_features=16", "out_features=8", "r=2", "alpha=3.5", "dropout=0.1"):
        assert part in repr(layer)
    assert parameter_report(layer) == {"lora": 48, "other trainable": 0, "frozen": 136}
    layer.bias.requires_grad_(True)
    assert parameter_report(layer) == {"lora": 48, "other trainable": 8, "frozen": 128}


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoraConfig(r=16, alpha=8).scale == 0.5
    assert LoraConfig(r=16, alpha=8, rslora=True).scale == 2.0


@pytest.mark.parametrize(
    "bad",
    [
        *({"r": 0}, {"r": 2.0}, {"r": True}, {"alpha": -1}, {"alpha": math.inf}, {"alpha": "8"}),
        *({"dropout": 1.0}, {"dropout": -0.1}, {"dropout": None}),
        *({"rank_pattern": {"0": 0}}, {"alpha_pattern": {"0": 0}}, {"rslora": 1}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(UserError, match=rf"^{name.removesuffix('_pattern').replace('rank', 'r')}"):
        LoraConfig(**bad)


@pytest.mark.parametrize("pattern", ["(", "(?i)key", 2])
def test_a_pattern_that_cannot_be_used_is_refused(pattern):
    with pytest.raises(UserError, match=r"^rank_pattern is"):
        LoraConfig(rank_pattern={pattern: 4})


def test_pefts_spellings_are_accepted():
    ours = LoraConfig(r=4, alpha=6, dropout=0.2, rslora=True, targets=("query", "key"))
    theirs = {"lora_alpha": 6, "lora_dropout": 0.2, "use_rslora": True}
    assert LoraConfig(r=4, target_modules=["query", "key"], **theirs) == ours
    assert LoraConfig(target_modules="all-linear").targets == ("all-linear",)
    for others in ({"task_type": "SEQ_CLS"}, {"bias": "none"}, {"lora_alhpa": 6}):
        with pytest.raises(UserError, match=r"an argument is .*, lora_alpha, .*train=\('cla"):
            LoraConfig(r=4, **others)


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_are_fp32_whatever_the_default_type_is_and_fp64_on_fp64(base, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        layers = [
            LoRALinear(4, 4, dtype=base),
            inject(nn.Sequential(nn.Linear(4, 4, dtype=base)), LoraConfig(targets="0"))["0"],
        ]
    finally:
        torch.set_default_dtype(before)
    expected = torch.float64 if base == torch.float64 else torch.float32
    for layer in layers:
        assert {f.dtype for f in factors(layer)} == {expected}
        assert layer(torch.ones(2, 4, dtype=base)).dtype == base


def test_it_can_be_built_on_the_meta_device_and_drawn_later():
    with torch.device("meta"):
        layer = LoRALinear(6, 5)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 6, device="meta")).shape == (2, 5)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()  # as FSDP calls it
    bound = 1 / math.sqrt(6)
    for p in (layer.weight, layer.bias, layer.lora_A["default"]):
        assert 0 < p.abs().max() <= bound
    assert not layer.lora_B["default"].any()


def test_a_default_device_does_not_matter_to_inject():
    torch.set_default_device("meta")
    try:
        model = nn.Sequential(nn.Linear(4, 4, device="cpu"))
        layer = inject(model, LoraConfig(targets="0"))["0"]
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}


def test_a_subclass_draws_its_own_parameters_anew():
    class Ones(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.weight)

    layer = inject(nn.Sequential(Ones(4, 4, bias=False)), LoraConfig(targets="0"))["0"]
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(4, 4))


@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_dropout_is_that_of_the_mask_of_seed_and_stream(route, fill):
    layer, x = fill(LoRALinear(8, 6, r=3, dropout=0.4)), torch.randn(5, 8)
    seed = torch.tensor(1234567)

    def plain(x):
        A, B = factors(layer)
        keep = same_mask(route)(seed, layer.streams["default"], 5, 8, 0.4)
        scale = layer.settings["default"].scale * keep_scale(0.4)
        return F.linear(x, layer.weight, layer.bias) + scale * (keep * x) @ A.T @ B.T

    def results(forward):
        leaves = [x.clone().requires_grad_(), *factors(layer)]
        y = forward(leaves[0])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    with forced_route(route), use_adapter(layer, "default", seed=seed):
        found = results(layer)
    for a, b in zip(found, results(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_pytorchs_generator_governs_the_masks(route, fill):
    layer, x = fill(LoRALinear(8, 6, r=3, dropout=0.5)), torch.randn(40, 8)

    def draw(seed):
        torch.manual_seed(seed)
        return layer(x), layer(x)

    with forced_route(route):
        one, same, other = draw(1), draw(1), draw(2)
        assert all(map(torch.equal, one, same))
        assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_layers_and_adapters_draw_masks_of_their_own():
    configs = {name: LoraConfig(targets=("0", "1"), dropout=0.5) for name in "ab"}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    streams = [layer.streams[name] for layer in inject(model, configs).values() for name in "ab"]
    assert len(set(streams)) == 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ["reference", "gemm"])
def test_a_checkpoint_recomputes_the_same_masks(route, reentrant, fill):
    layer = fill(LoRALinear(8, 6, r=3, dropout=0.5))
    x = torch.randn(5, 8, requires_grad=True)

    def gradients(forward):
        torch.manual_seed(3)
        layer.zero_grad()
        forward(x).square().sum().backward()
        return [f.grad.clone() for f in factors(layer)]

    with forced_route(route):
        expected = gradients(layer)
        found = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, found, expected))


def test_compiled_training_drops_as_often_as_it_should():
    torch._dynamo.reset()
    layer = LoRALinear(400, 1, r=1, alpha=1, dropout=0.25, bias=False)
    with torch.no_grad():
        layer.weight.zero_(), layer.lora_A["default"].fill_(1), layer.lora_B["default"].fill_(1)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(200, 400))
    assert y.std() > 0
    assert abs(y.mean() / 400 - 1) < 0.01
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(2, 400)), torch.full((2, 1), 400.0))


def test_a_compiled_layer_with_a_given_seed_draws_the_eager_masks(fill):
    torch._dynamo.reset()
    layer, x = fill(LoRALinear(8, 6, r=3, dropout=0.5)), torch.randn(5, 8)
    compiled = torch.compile(layer, backend="aot_eager")
    for number in (5, 6):
        with use_adapter(layer, "default", seed=torch.tensor(number)):
            torch.testing.assert_close(compiled(x), layer(x))


class Scaled(nn.Linear):
    """A layer with a forward of its own, as a fake-quantised or gated one."""

    def forward(self, input, factor=2.0):
        return factor * super().forward(input)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("base", [nn.Linear, Scaled])
def test_a_copy_of_an_adapted_layer_is_one(base, copied, fill):
    model = nn.Sequential(base(4, 4))
    inject(model, LoraConfig(targets="0", dropout=0.0))
    other = copied(fill(model)[0])
    x = torch.randn(2, 4)
    assert type(other) is type(model[0]) and isinstance(other, (LoRALinear, base))
    assert torch.equal(other(x), model(x))


def test_a_subclass_keeps_its_forward_and_its_arguments(fill):
    model, x = nn.Sequential(Scaled(4, 4)), torch.randn(2, 4)
    plain = model(x)
    inject(model, LoraConfig(targets="0", dropout=0.0))
    assert torch.equal(model(x), plain)
    layer = fill(model)[0]
    low = layer.settings["default"].scale * F.linear(
        F.linear(x, factors(layer)[0]), factors(layer)[1]
    )
    torch.testing.assert_close(model(x), plain + low)
    torch.testing.assert_close(layer(x, factor=3.0), 1.5 * plain + low)
