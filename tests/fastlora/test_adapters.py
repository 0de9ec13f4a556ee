import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.adapters import (
    BaseInfo,
    load_adapter,
    load_heads,
    read_heads,
    read_settings,
    save_adapter,
    save_heads,
)
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.bert.source import resolve
from fastlora.bert.weights import fingerprint, load_encoder
from fastlora.config import TARGETS, LoraConfig
from fastlora.errors import UserError
from fastlora.lora import DEFAULT, inject, lora_layers
from fastlora.tasks import BUILTIN

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
BASE = BaseInfo("tiny", "e" * 64, "t" * 64)
KEY = "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight"
IDS = torch.arange(30).view(3, 10)
ALL = tuple(TARGETS)


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TINY)).eval()


@pytest.fixture
def ours(theirs):
    model = BertModel(BertConfig(**TINY)).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def fill(model, seed=1):
    """Every LoRA B gets values, so that the adapters change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def adapted(model, settings=None, seed=1):
    inject(model, settings or LoraConfig(r=4, alpha=8))
    fill(model, seed)
    return model.eval()


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def states(model):
    return model(IDS).last_hidden_state


@pytest.fixture
def saved(ours, tmp_path):
    settings = LoraConfig(r=4, alpha=8, dropout=0.05)
    model = adapted(ours, settings)
    save_adapter(tmp_path / "adapter", lora_layers(model), DEFAULT, BASE)
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder, ours, match, base=BASE):
    """Loading stops with one line that names the cause, and no parameter has changed."""
    if not lora_layers(ours):
        adapted(ours)
    before = snapshot(ours)
    with pytest.raises(UserError, match=match) as caught:
        load_adapter(folder, lora_layers(ours), DEFAULT, base)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert same(snapshot(ours), before)


def test_files_are_pefts_format(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config.keys() <= vars(peft.LoraConfig()).keys()
    assert config["target_modules"] == ["query", "value"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            f"base_model.model.encoder.layer.{i}.attention.self.{name}.lora_{matrix}.weight"
            for i in range(2)
            for name in ("query", "value")
            for matrix in "AB"
        }
        facts = file.metadata()
    assert facts["encoder_sha256"] == BASE.encoder_sha256
    assert facts["tokenizer_sha256"] == BASE.tokenizer_sha256
    assert facts["fastlora_version"]


@pytest.mark.parametrize("targets", [("query", "value"), ("output", "intermediate"), ALL])
def test_round_trip_is_bit_equal(ours, theirs, tmp_path, targets):
    settings = LoraConfig(r=3, alpha=7.5, dropout=0.2, rslora=True, targets=targets)
    model = adapted(ours, settings)
    save_adapter(tmp_path, lora_layers(model), DEFAULT, BASE)
    assert read_settings(tmp_path) == settings

    again = BertModel(BertConfig(**TINY))
    again.load_state_dict(theirs.state_dict())
    adapted(again, read_settings(tmp_path), seed=9)
    load_adapter(tmp_path, lora_layers(again), DEFAULT, BASE)
    assert same(snapshot(again), snapshot(model))
    assert torch.equal(states(again), states(model))


def test_one_of_several_adapters_with_targets_of_its_own(ours, tmp_path):
    wide, narrow = LoraConfig(r=4, targets=("query", "key")), LoraConfig(r=2, targets=("value",))
    adapted(ours, {"sst": wide, "sts": narrow})
    save_adapter(tmp_path, lora_layers(ours), "sts", BASE)
    assert read_settings(tmp_path) == narrow
    before = snapshot(ours)
    fill(ours, seed=5)
    load_adapter(tmp_path, lora_layers(ours), "sts", BASE)
    after = snapshot(ours)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.endswith("lora_B.sst") for name in changed)
    with pytest.raises(UserError, match="no adapter named 'quora'"):
        load_adapter(tmp_path, lora_layers(ours), "quora", BASE)


@pytest.mark.parametrize(
    "targets",
    [("query", "value"), ("key", "output"), ("ffn_output",), ("ffn_output", "query"), ALL],
)
def test_peft_loads_ours(ours, theirs, tmp_path, targets):
    settings = LoraConfig(r=4, alpha=6, rslora=True, targets=targets)
    model = adapted(ours, settings)
    save_adapter(tmp_path, lora_layers(model), DEFAULT, BASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    found = {name.rpartition(".lora_A")[0] for name in loaded.state_dict() if ".lora_A." in name}
    assert found == {f"base_model.model.{name}" for name in lora_layers(model)}
    assert (states(loaded) - states(model)).abs().max() <= 1e-5


PEFT_TARGETS = [
    ["query", "value"],
    ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    ["query", "key", "value", "dense"],
    r".*\.attention\.self\.(query|value)",
]


@pytest.mark.parametrize("listed", PEFT_TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts(ours, theirs, tmp_path, listed, rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.1, target_modules=listed, use_rslora=rslora
    )
    loaded = peft.get_peft_model(theirs, config).eval()
    fill(loaded)
    loaded.save_pretrained(tmp_path)
    settings = read_settings(tmp_path)
    assert (settings.r, settings.alpha, settings.rslora) == (4, 10.0, rslora)
    model = adapted(ours, settings)
    load_adapter(tmp_path, lora_layers(model), DEFAULT, BASE)
    output, expected = model(IDS), loaded(IDS)
    assert (output.last_hidden_state - expected.last_hidden_state).abs().max() <= 1e-5
    assert (output.pooler_output - expected.pooler_output).abs().max() <= 1e-5


def test_settings_of_pefts_folders_use_our_names(theirs, tmp_path):
    peft.get_peft_model(theirs, peft.LoraConfig(target_modules=PEFT_TARGETS[1])).save_pretrained(
        tmp_path
    )
    assert read_settings(tmp_path) == LoraConfig(r=8, alpha=8, dropout=0, targets=ALL)


def test_minilm_with_peft(tmp_path):
    source = resolve("minilm")
    settings = LoraConfig(r=32, alpha=16)
    model = adapted(load_encoder(source)[0], settings)
    base = BaseInfo(source.name, fingerprint(model), "t" * 64)
    save_adapter(tmp_path, lora_layers(model), DEFAULT, base)
    theirs = transformers.BertModel.from_pretrained(source.folder)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert (states(model) - states(loaded)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["classifier"]},
        {"lora_bias": True},
        {"rank_pattern": {"query": 2}},
        {"alpha_pattern": {"query": 2}},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["weight"]},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"r": "4"},
        {"r": True},
        {"r": 0},
        {"r": 8},
        {"lora_alpha": None},
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"some_later_option": 3},
    ],
)
def test_configuration_is_refused_by_name(saved, ours, changes):
    edit(saved, **changes)
    (key,) = changes
    name = {"lora_alpha": "alpha", "use_rslora": "rslora"}.get(key, key)
    refused(saved, ours, rf"adapter_config\.json: .*\b{name}|alpha is None")


def test_configuration_without_a_key_is_refused(saved, ours):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    refused(saved, ours, "lora_alpha is missing")


def rename(tensors):
    tensors[KEY.replace("query", "key")] = tensors.pop(KEY)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop(KEY), f"'{KEY}' is missing"),
        (rename, r"is missing"),
        (lambda t: t.update({KEY.replace("query", "key"): t[KEY].clone()}), r"key.*unexpected"),
        (lambda t: t.update({KEY[:-6] + "bias": torch.zeros(4)}), "unexpected"),
        (lambda t: t.update({"classifier.weight": torch.zeros(4)}), "'classifier.weight'"),
        (lambda t: t.update({KEY: torch.zeros(3, 32)}), rf"'{KEY}' is .*\[3, 32\].*\[4, 32\]"),
        (lambda t: t.update({KEY: torch.zeros(4, 32).int()}), "floating point"),
        (lambda t: t[KEY].view(-1)[5:6].fill_(float("nan")), "not finite"),
        (lambda t: t[KEY].view(-1)[5:6].fill_(float("inf")), "not finite"),
        (lambda t: t.clear(), "holds no LoRA weights"),
    ],
)
def test_weights_are_refused_by_name(saved, ours, change, cause):
    edit_tensors(saved, change)
    refused(saved, ours, cause)


@pytest.mark.parametrize(
    ("base", "cause"),
    [
        (
            replace(BASE, encoder_sha256="f" * 64, base_model="other"),
            "another base model.*'tiny'.*'other'",
        ),
        (replace(BASE, tokenizer_sha256="f" * 64), "another tokenizer"),
    ],
)
def test_another_base_is_refused(saved, ours, base, cause):
    refused(saved, ours, cause, base)


def test_other_targets_are_refused(saved, theirs):
    model = BertModel(BertConfig(**TINY))
    refused(saved, adapted(model, LoraConfig(r=4, alpha=8, targets=("key",))), "key.*is missing")


def test_pickles_are_refused(saved, ours):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    refused(saved, ours, r"adapter_model\.bin is a pickle, never read")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_or_broken_files_are_named(saved, ours, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:-20])
    refused(saved, ours, f"{name}: cannot be read")
    (saved / name).unlink()
    refused(saved, ours, f"{name}: cannot be read")


TASKS = {name: BUILTIN[name] for name in ("sst", "sts")}


def heads(seed):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {name: torch.nn.Linear(32, task.outputs) for name, task in TASKS.items()}
    )


@pytest.fixture
def saved_heads(tmp_path):
    save_heads(tmp_path, heads(0), TASKS, BASE, {"pairs": "joint"})
    return tmp_path


def test_heads_round_trip_is_bit_equal(saved_heads):
    assert read_heads(saved_heads) == (TASKS, {"pairs": "joint"})
    info = json.loads((saved_heads / "heads.json").read_text())
    assert info["base_model"] == "tiny" and info["encoder_sha256"] == "e" * 64
    again = heads(1)
    load_heads(saved_heads, again, TASKS, BASE)
    assert same(again.state_dict(), heads(0).state_dict())


@pytest.mark.parametrize(
    ("tasks", "base", "cause"),
    [
        ({**TASKS, "sst": replace(TASKS["sst"], labels=tuple("43210"))}, BASE, "head of 'sst'"),
        ({**TASKS, "sts": replace(TASKS["sts"], high=1.0)}, BASE, "head of 'sts'"),
        (TASKS, replace(BASE, encoder_sha256="f" * 64), "another base model"),
        (TASKS, replace(BASE, tokenizer_sha256="f" * 64), "another tokenizer"),
    ],
)
def test_heads_of_something_else_are_refused(saved_heads, tasks, base, cause):
    again = heads(1)
    with pytest.raises(UserError, match=cause):
        load_heads(saved_heads, again, tasks, base)
    assert same(again.state_dict(), heads(1).state_dict())


def test_heads_of_other_tasks_are_refused(saved_heads):
    fewer = torch.nn.ModuleDict({"sst": torch.nn.Linear(32, 5)})
    with pytest.raises(UserError, match=r"'sts\.bias' is unexpected.*1 more"):
        load_heads(saved_heads, fewer, {"sst": TASKS["sst"]}, BASE)


def test_task_files_may_be_elsewhere(saved_heads):
    moved = replace(TASKS["sst"], files={"train": "a.csv", "dev": "b.csv"})
    load_heads(saved_heads, heads(1), {**TASKS, "sst": moved}, BASE)


def test_broken_heads_file_is_named(saved_heads):
    (saved_heads / "heads.json").write_text("{}")
    with pytest.raises(UserError, match=r"heads\.json: has no 'tasks'"):
        load_heads(saved_heads, heads(1), TASKS, BASE)
