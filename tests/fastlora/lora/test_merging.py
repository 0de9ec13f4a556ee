"""merge, unmerge, merge_and_unload, and transformers' save_pretrained of adapted models."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from fastlora import (
    LoraConfig,
    UserError,
    eject,
    inject,
    lora_layers,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
    use_adapter,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IDS = torch.arange(8)[None]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
BOTH = LoraConfig(r=2, dropout=0.0, targets=("0", "1"))
transformers.utils.logging.disable_progress_bar()


def layers_of(dtype=torch.float32, tied=False, names=("default",), bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias, dtype=dtype), nn.Linear(8, 8, bias, dtype=dtype))
    if tied:
        model[1].weight = model[0].weight
    inject(model, {name: BOTH for name in names})
    return model.eval()


def bert(kind="ForSequenceClassification", **settings):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **settings)
    return getattr(transformers, f"Bert{kind}")(config).eval()


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, digits=1e-5):
    torch.testing.assert_close(a, b, rtol=digits, atol=digits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_gives_the_same_and_unmerge_is_bit_for_bit(tied, fill):
    model = fill(layers_of(tied=tied))
    before, plain, W0 = bits(model), model(X), model[0].weight
    merge(model)
    assert not torch.equal(model[0].weight, W0)
    close(model.train().eval()(X), plain)  # which must not unmerge
    unmerge(model)
    assert equal(bits(model), before) and model[0].weight is W0
    assert (model[1].weight is W0) == tied
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert torch.equal(model(X), plain)


def test_merging_a_tied_decoder_leaves_the_embeddings_alone(fill):
    model = bert("ForMaskedLM")
    inject(model, LoraConfig(dropout=0.0, targets="decoder"))
    words, plain = model.get_input_embeddings().weight, fill(model)(IDS).logits
    before = words.clone()
    merge(model)
    close(model(IDS).logits, plain)
    assert torch.equal(words, before)
    unmerge(model)
    assert model.get_output_embeddings().weight is words and torch.equal(words, before)


def test_a_sum_in_fp64_keeps_fp64s_digits(fill):
    model, x = fill(layers_of(torch.float64)), X.double()
    plain = model(x)
    merge(model)
    close(model(x), plain, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [lambda m, dtype: m.to(dtype), lambda m, dtype: m])
def test_a_half_sum_is_taken_in_fp32_and_rounded_once(dtype, how, fill):
    """Both where the factors are fp32 and where the whole model became half."""
    model = how(fill(layers_of(dtype)), dtype)
    layer = model[0]
    A, B = layer.lora_A["default"].float(), layer.lora_B["default"].float()
    expected = (layer.weight.float() + layer.settings["default"].scale * B @ A).to(dtype)
    merge(model)
    assert torch.equal(layer.weight, expected)


def test_several_adapters_are_merged_together_and_by_name(fill):
    model = fill(layers_of(names=("a", "b")))
    for names in (("a",), ("b",), ("a", "b")):
        set_adapter(model, *names)
        plain = model(X)
        merge(model, *names)
        close(model(X), plain)
        unmerge(model)
    with use_adapter(model, "b"):
        plain = model(X)
        merge(model)  # what acts here
        assert model[0].merged == ("b",)
        close(model(X), plain)


def test_layers_that_use_different_adapters_are_merged_as_they_are_used(fill):
    model = fill(layers_of(names=("a", "b")))
    for layer, name in zip(model, "ab", strict=True):
        set_adapter(layer, name)
    plain = model(X)
    merge(model)
    assert [layer.merged for layer in model] == [("a",), ("b",)]
    close(model(X), plain)


def no_adapter(model):
    set_adapter(model)


def too_large(model):
    with torch.no_grad():
        model[1].weight.fill_(6e4), model[1].lora_B["a"].fill_(1e4)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (no_adapter, "no active adapter"),
        (lambda model: set_adapter(model, "a") or merge(model), "a is merged already"),
        (too_large, "'1'.*not finite in torch.float16"),
    ],
)
def test_a_merge_that_cannot_be_changes_nothing(spoil, cause, fill):
    model = fill(layers_of(torch.float16, names=("a", "b")))
    set_adapter(model, "a")
    spoil(model)
    before, merged = bits(model), [layer.merged for layer in model]
    with pytest.raises(UserError, match=cause):
        merge(model)
    assert equal(bits(model), before) and [layer.merged for layer in model] == merged


def test_a_merge_is_of_all_layers_or_none(fill):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    configs = {"one": LoraConfig(targets="b"), "two": LoraConfig(targets=("a", "b"))}
    inject(model, configs)
    merge(fill(model), "one")
    with pytest.raises(UserError, match="adapter one is merged already"):
        merge(model, "two")
    assert model["a"].merged == ()


def test_a_layer_with_a_forward_of_its_own_is_not_merged(fill):
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Odd(8, 8))
    inject(model, BOTH)
    before = bits(fill(model))
    with pytest.raises(UserError, match="layer '1' cannot be merged: Odd"):
        merge(model)
    assert equal(bits(model), before) and model[0].merged == ()


def test_what_is_merged_must_be_what_is_asked_for(fill):
    model = fill(layers_of(names=("a", "b")))
    set_adapter(model, "a")
    plain = model(X)
    merge(model)
    close(model(X), plain)
    for choice in ({"rows": ["a"] * 4 + [None]}, {"rows": ["b"] * 5}):
        with use_adapter(model, **choice), pytest.raises(UserError, match="a is merged: unmerge"):
            model(X)
    for names in (("b",), (), ("a", "b")):
        with use_adapter(model, *names), pytest.raises(UserError, match="a is merged: unmerge"):
            model(X)
    with pytest.raises(UserError, match="unmerge"):
        inject(model, {"c": BOTH})


def test_a_merged_model_moves_and_copies(fill):
    model = fill(layers_of())
    plain = model(X)
    merge(model)
    other = copy.deepcopy(model)
    unmerge(other)
    close(other(X), plain)
    close(model(X), plain)
    merge(other.double())
    unmerge(other)
    close(other.float()(X), plain)
    unmerge(model.double())
    close(model.float()(X), plain)


def test_a_merged_state_loads_into_an_unmerged_model(fill):
    model = layers_of()
    other = copy.deepcopy(model)
    plain = fill(model)(X)
    unmerged = model.state_dict()
    merge(model)
    state = model.state_dict()
    assert torch.equal(state["0.base_weight"], unmerged["0.weight"])
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(X), plain)
    for source in (state, unmerged):
        with pytest.raises(RuntimeError, match="unmerge before loading"):
            model.load_state_dict(source)


def test_merged_adapters_do_not_train(fill):
    model = fill(layers_of())
    model(X).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    merge(model)
    before = bits(model)
    optimizer.step()
    assert equal(bits(model), before)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.any()


def test_merge_and_unload_leaves_a_plain_model(fill, tmp_path):
    model = bert()
    inject(model, LoraConfig(dropout=0.0), train=("classifier",))
    plain = fill(model)(IDS).logits
    assert merge_and_unload(model) is model
    assert not lora_layers(model) and type(model.bert.pooler.dense) is nn.Linear
    assert not any("lora" in name or "base" in name for name in model.state_dict())
    close(model(IDS).logits, plain)
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    close(found(IDS).logits, plain)


def test_merge_and_unload_takes_what_is_merged_or_named(fill):
    for prepare, names in ((lambda m: merge(m, "b"), ()), (lambda m: None, ("b",))):
        model = fill(layers_of(names=("a", "b")))
        with use_adapter(model, "b"):
            plain = model(X)
        prepare(model)
        close(merge_and_unload(model, *names)(X), plain)


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("state", ["active", "merged", "copied"])
def test_a_saved_model_is_the_trained_one_for_any_reader(kind, state, fill, tmp_path):
    model = bert(kind)
    inject(model, LoraConfig(dropout=0.0))
    plain = fill(model)(IDS)[0]
    if state == "merged":
        merge(model)
    model = copy.deepcopy(model) if state == "copied" else model
    before, merged = bits(model), [m.merged for m in lora_layers(model).values()]
    model.save_pretrained(tmp_path)
    assert equal(bits(model), before)
    assert [m.merged for m in lora_layers(model).values()] == merged
    close(type(model).from_pretrained(tmp_path)(IDS)[0], plain)
    close(getattr(transformers, f"Bert{kind}").from_pretrained(tmp_path)(IDS)[0], plain)


def test_transformers_trainer_saves_the_trained_model(fill, tmp_path):
    model = bert()
    inject(model, LoraConfig(dropout=0.0))
    plain = fill(model)(IDS).logits
    arguments = transformers.TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(tmp_path / "saved")
    close(type(model).from_pretrained(tmp_path / "saved")(IDS).logits, plain)
    close(model(IDS).logits, plain)


def test_a_model_with_adapters_gets_them_and_w0_back_from_a_saved_folder(fill, tmp_path):
    """As transformers' Trainer does when it resumes, or loads the best model at its end."""
    model = bert()
    inject(model, LoraConfig(dropout=0.0))
    other = copy.deepcopy(model)
    plain = fill(model)(IDS).logits
    model.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(IDS).logits, plain)
    assert equal(bits(other), bits(model))


def test_a_tied_weight_that_would_be_lost_is_refused(fill, tmp_path):
    model = bert("ForMaskedLM")
    inject(model, LoraConfig(dropout=0.0, targets="decoder"))
    before = bits(fill(model))
    for use in (lambda: model.save_pretrained(tmp_path), lambda: merge_and_unload(model)):
        with pytest.raises(UserError, match=r"'cls\.predictions\.decoder' is tied"):
            use()
    assert equal(bits(model), before) and not list(tmp_path.iterdir())


def test_an_ejected_model_saves_as_the_base_that_it_is(fill, tmp_path):
    model = bert()
    plain = model(IDS).logits
    inject(model, LoraConfig())
    eject(fill(model))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    close(type(model).from_pretrained(tmp_path)(IDS).logits, plain)
