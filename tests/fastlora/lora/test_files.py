"""Adapters on disk, for any module with heads: what is written, read back, and refused."""

import copy
import json
import os
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import (
    LoraConfig,
    UserError,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
)
from fastlora.lora.config import TARGETS
from fastlora.lora.files import read_config

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
START = "base_model.model."
KEY = f"{START}bert.encoder.layer.1.attention.self.query.lora_A.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(30).view(3, 10)
SETTINGS = LoraConfig(r=4, alpha=8, dropout=0.05)


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def adapt(fill):
    """A function from settings to a model with adapters and a trained head."""

    def make(settings=SETTINGS, train=("classifier",), seed=1):
        model = classifier()
        inject(model, settings, train=train)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "lora_" not in name:
                    p.normal_(generator=torch.Generator().manual_seed(seed))
        return fill(model, seed=seed)

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def everything(model):
    parameters = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    settings = {
        name: {adapter: replace(s, targets="any") for adapter, s in layer.settings.items()}
        for name, layer in lora_layers(model).items()
    }
    return parameters, settings


def same(a, b):
    (one, settings), (two, others) = a, b
    equal = (torch.equal(one[n][0], two[n][0]) and one[n][1] == two[n][1] for n in one)
    return settings == others and one.keys() == two.keys() and all(equal)


@pytest.fixture
def saved(adapt, tmp_path):
    save_adapter(adapt(), tmp_path / "adapter", metadata={"note": "ours"}, base_model="tiny")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, model, match):
    """Loading stops with one line that names the cause, and nothing has changed."""
    before = everything(model)
    with pytest.raises(UserError, match=match) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert same(everything(model), before)


def test_the_files_are_in_pefts_format(saved):
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    config = json.loads((saved / CONFIG).read_text())
    assert config.keys() <= vars(peft.LoraConfig()).keys()
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "tiny"
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        assert file.metadata()["note"] == "ours"
        assert set(file.keys()) == {
            *(f"{START}classifier.{name}" for name in ("weight", "bias")),
            *(
                f"{START}bert.encoder.layer.{i}.attention.self.{name}.lora_{matrix}.weight"
                for i in range(2)
                for name in ("query", "value")
                for matrix in "AB"
            ),
        }


PATTERNS = {"rank_pattern": {"key": 2, r"layer\.1\..*query": 5}, "alpha_pattern": {"value": 3.5}}


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        LoraConfig(r=3, alpha=7.5, dropout=0.2, rslora=True, targets=("output", "intermediate")),
        LoraConfig(r=4, targets=tuple(TARGETS), **PATTERNS),
        LoraConfig(targets="all"),
        LoraConfig(targets=r".*layer\.1\..*"),
    ],
)
def test_a_model_without_the_adapter_gets_it_and_its_heads_bit_for_bit(settings, adapt, tmp_path):
    model, again = adapt(settings), classifier()
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for name, layer in lora_layers(model).items():
        assert lora_layers(again)[name].settings["default"].same_adapter(layer.settings["default"])


@pytest.mark.parametrize("train", [("classifier",), ("pooler", "classifier"), ("LayerNorm",), ()])
def test_a_model_that_has_the_adapter_gets_its_values(train, adapt, tmp_path):
    model, again = adapt(train=train), adapt(train=train, seed=2)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert same(everything(again), everything(model))


def test_read_config_gives_settings_to_inject(adapt, tmp_path):
    for settings in (
        LoraConfig(r=3, alpha=7.5, dropout=0.2, rslora=True, targets=("key", "ffn_output")),
        LoraConfig(r=4, alpha=8, dropout=0.0, targets=tuple(TARGETS)),
    ):
        save_adapter(adapt(settings), tmp_path)
        assert read_config(tmp_path) == settings
        again = classifier()
        inject(again, read_config(tmp_path))
        load_adapter(again, tmp_path)


def test_one_of_several_adapters_is_saved_and_loaded_alone(adapt, tmp_path):
    configs = {"a": LoraConfig(r=4, targets=("query", "key")), "b": LoraConfig(r=2)}
    model, other = adapt(configs), adapt(configs, seed=2)
    before = {n: p.clone() for n, p in other.named_parameters()}
    save_adapter(model, tmp_path, "b", heads=False)
    load_adapter(other, tmp_path, "b")
    after, trained = dict(other.named_parameters()), dict(model.named_parameters())
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed and all(name.endswith("lora_B.b") for name in changed)
    assert all(torch.equal(after[name], trained[name]) for name in changed)
    load_adapter(model, tmp_path, "c")  # under another name
    with pytest.raises(UserError, match="none is chosen"):
        model(IDS)
    for name in "bc":
        set_adapter(model, name)
        assert torch.equal(logits(model), logits(model))
    with pytest.raises(UserError, match="no adapter named 'd'"):
        save_adapter(model, tmp_path, "d")


def test_any_module_will_do_in_any_type(fill, tmp_path):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        base = nn.ModuleDict({"a+b": nn.Linear(4, 4, dtype=dtype), "head": nn.Linear(4, 2)})
        model = copy.deepcopy(base)
        inject(model, LoraConfig(r=2, targets="a+b"), train="head")
        nn.init.ones_(model["head"].weight)
        save_adapter(fill(model), tmp_path)
        load_adapter(base, tmp_path)
        assert same(everything(base), everything(model))


def test_a_name_that_is_the_end_of_others_means_one_module(fill, tmp_path):
    """Of layers and of heads."""
    part = nn.ModuleDict({"layer": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    base = nn.ModuleDict({**copy.deepcopy(part), "part": part})
    model = copy.deepcopy(base)
    inject(model, LoraConfig(r=2, targets="^layer$"))
    model["head"].requires_grad_(True)
    save_adapter(fill(model), tmp_path)
    load_adapter(base, tmp_path)
    assert same(everything(base), everything(model))


def test_a_head_with_tied_weights_is_saved_and_loaded(fill, tmp_path):
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    model = copy.deepcopy(base)
    inject(model, LoraConfig(dropout=0.0), train="cls")
    nn.init.ones_(model.cls.predictions.bias)
    save_adapter(fill(model), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_a_merged_adapter_is_saved_as_itself(adapt, saved, tmp_path):
    model = adapt()
    merge(model)
    save_adapter(model, tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(saved / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_the_format_has_no_place_for_is_refused_at_saving(adapt, tmp_path):
    model = adapt(train=("classifier.bias",))
    with pytest.raises(UserError, match=r"'classifier\.bias' is trainable.*no place"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_adapter(model, tmp_path / "adapter", heads=False)


def test_a_save_that_fails_leaves_the_files_that_were_there(adapt, saved, monkeypatch):
    before = {file: (saved / file).read_bytes() for file in os.listdir(saved)}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fastlora.lora.files.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapt(seed=2), saved)
    assert {file: (saved / file).read_bytes() for file in os.listdir(saved)} == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(
            ({key: value}, key)
            for key, value in {
                "use_dora": True,
                "bias": "all",
                "lora_bias": True,
                "layers_to_transform": [0],
                "layer_replication": [[0, 1]],
                "trainable_token_indices": [1],
                "target_parameters": ["weight"],
                "init_lora_weights": "pissa",
                "fan_in_fan_out": True,
                "peft_type": "IA3",
                "some_later_option": 3,
                "modules_to_save": "classifier",
                "rank_pattern": [2],
            }.items()
        ),
        *(({"r": r}, r"\br\b") for r in ("4", True, 0)),
        *(({"lora_alpha": alpha}, "alpha") for alpha in (None, ..., 0, "8")),
        ({"rank_pattern": {"query": 0}}, r"\br\b"),
        ({"alpha_pattern": {"query": "x"}}, "alpha"),
        ({"lora_alpha": 1e308}, "alpha"),
        *(
            ({"r": r}, rf"r is {r} .expected that of the weights of '.*query'")
            for r in (10**7, 10**30)
        ),
        ({"rank_pattern": {"value": 2}}, "r is 2 .expected that of the weights of '.*value'"),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_refused_by_name(saved, changes, name):
    edit(saved, **changes)
    refused(saved, classifier(), name)


@pytest.mark.parametrize("changes", [{"r": 8}, {"alpha": 16}, {"rslora": True}])
def test_settings_other_than_the_models_are_refused(saved, adapt, changes):
    settings = LoraConfig(**{"r": 4, "alpha": 8, "dropout": 0.5, **changes})
    refused(saved, adapt(settings), "model was built with")


def test_other_layers_than_the_models_are_refused_by_name(saved, adapt):
    for targets, name in (
        ("key", r"self\.(key|query)"),
        (("query", "key", "value"), r"self\.key"),
        ("query", r"self\.value"),
    ):
        refused(saved, adapt(LoraConfig(r=4, alpha=8, targets=targets)), name)


def test_an_adapter_that_is_merged_is_refused(saved, adapt):
    model = adapt()
    merge(model)
    refused(saved, model, "merged")


def rename(tensors):
    tensors[KEY.replace("query", "pooler")] = tensors.pop(KEY)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop(KEY), f"'{KEY}' is missing"),
        (rename, "is missing|is no linear layer"),
        (lambda t: t.update({KEY.replace("query", "key"): t[KEY].clone()}), r"self\.key"),
        (lambda t: t.update({KEY[:-6] + "bias": torch.zeros(4)}), "unexpected"),
        (lambda t: t.update({"classifier.weight": torch.zeros(4)}), "'classifier.weight'"),
        (lambda t: t.update({f"{START}score.weight": torch.zeros(4)}), "score.weight' is unexp"),
        (lambda t: t.pop(f"{START}classifier.bias"), "classifier.bias' is missing"),
        (lambda t: [t.pop(f"{START}classifier.{n}") for n in ("bias", "weight")], "is missing"),
        (lambda t: t[f"{START}classifier.bias"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({f"{START}classifier.bias": torch.zeros(2)}), r"\[2\].*\[3\]"),
        (lambda t: t.update({KEY: torch.zeros(4, 31)}), rf"'{KEY}' is .*\[4, 31\].*\[4, 32\]"),
        (
            lambda t: t.update({KEY: torch.zeros(3, 32)}),
            "r is 4 .expected that of the weights of '.*query",
        ),
        (lambda t: t.update({KEY: torch.zeros(4, 32).int()}), "floating point"),
        (lambda t: t[KEY].view(-1)[5:6].fill_(float("inf")), "not finite"),
        (lambda t: t.clear(), "holds no LoRA weights"),
    ],
)
@pytest.mark.parametrize("has_it", [False, True])
def test_weights_that_do_not_fit_are_refused_by_name(saved, adapt, change, cause, has_it):
    edit_tensors(saved, change)
    refused(saved, adapt(seed=2) if has_it else classifier(), cause)


def test_pickles_are_refused(saved):
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    refused(saved, classifier(), r"adapter_model\.bin is a pickle and is not read")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_or_broken_files_are_named(saved, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:-20])
    refused(saved, classifier(), f"{name}: cannot be read")
    (saved / name).unlink()
    refused(saved, classifier(), f"{name}: cannot be read")
