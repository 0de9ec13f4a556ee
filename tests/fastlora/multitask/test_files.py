"""Adapters and heads of runs on disk: they know the encoder and tokenizer they belong to."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora import LoraConfig, UserError, inject, lora_layers
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.data.tasks import BUILTIN
from fastlora.multitask.files import (
    BaseInfo,
    adapter_names,
    adapter_place,
    fingerprint,
    load_all,
    read_heads,
    save_all,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
BASE = BaseInfo("tiny", "e" * 64, "c" * 64, "t" * 64)
OTHERS = [
    (replace(BASE, encoder_sha256="f" * 64, base_model="other"), "another base model.*'tiny'.*"),
    (replace(BASE, encoder_config_sha256="f" * 64), r"another encoder configuration \(config.json"),
    (replace(BASE, tokenizer_sha256="f" * 64), "another tokenizer"),
]
TASKS = {name: BUILTIN[name] for name in ("sst", "sts")}
WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"mode": "lora", "adapters": "shared+per-task", "pairs": "joint", "model": "tiny"}


def encoder(seed=1, names=("default",)):
    """An encoder whose adapters have the values of a seed."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY))
    inject(model, {name: LoraConfig(r=4, alpha=8) for name in names})
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        for name in names:
            torch.nn.init.normal_(layer.lora_B[name])
    return model


def heads(seed):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {name: torch.nn.Linear(32, task.outputs) for name, task in TASKS.items()}
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_names_its_adapters_after_its_tasks_and_the_shared_one_default(tmp_path):
    assert adapter_names("shared", TASKS) == ["default"]
    assert adapter_names("per-task", TASKS) == ["sst", "sts"]
    assert adapter_names("shared+per-task", TASKS) == ["default", "sst", "sts"]
    assert adapter_place(tmp_path, "default") == tmp_path
    assert adapter_place(tmp_path, "sst") == tmp_path / "sst"


def save(folder, names):
    """A run's files, of an encoder with these adapters and of heads."""
    model = SimpleNamespace(
        encoder=encoder(1, names or NAMES), heads=heads(0), tasks=TASKS, settings=names
    )
    save_all(folder, model, BASE, SETTINGS)
    return folder


def test_an_adapters_file_says_what_it_belongs_to(tmp_path):
    save(tmp_path, ["default"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        facts = file.metadata()
    assert facts["encoder_sha256"] == BASE.encoder_sha256
    assert facts["tokenizer_sha256"] == BASE.tokenizer_sha256
    assert facts["fastlora_version"]


NAMES = adapter_names("shared+per-task", TASKS)


@pytest.fixture
def saved_run(tmp_path):
    return save(tmp_path, NAMES)


def test_a_run_of_several_adapters_and_heads_is_saved_and_loaded_whole(saved_run):
    again, found = encoder(2, NAMES), heads(1)
    load_all(saved_run, again, NAMES, found, BASE)
    assert same(again, encoder(1, NAMES)) and same(found, heads(0))


@pytest.mark.parametrize("file", ["heads.safetensors", WEIGHTS, f"sts/{WEIGHTS}"])
def test_a_flipped_bit_is_noticed_before_anything_is_loaded(saved_run, file):
    content = bytearray((saved_run / file).read_bytes())
    content[-4] ^= 1
    (saved_run / file).write_bytes(content)
    again, found = encoder(2, NAMES), heads(1)
    with pytest.raises(UserError, match=f"{file}: its tensors have sha256"):
        load_all(saved_run, again, NAMES, found, BASE)
    assert same(again, encoder(2, NAMES)) and same(found, heads(1))


def test_adapters_that_the_settings_leave_out_are_noticed(saved_run):
    with pytest.raises(UserError, match=f"sha256 names .*sst/{WEIGHTS}.* by its settings"):
        load_all(saved_run, encoder(2), ["default"], heads(1), BASE)


@pytest.mark.parametrize(("base", "cause"), OTHERS)
def test_a_run_on_another_base_is_refused(saved_run, base, cause):
    again, found = encoder(2, NAMES), heads(1)
    with pytest.raises(UserError, match=cause) as caught:
        load_all(saved_run, again, NAMES, found, base)
    assert "\n" not in str(caught.value) and str(saved_run) in str(caught.value)
    assert same(again, encoder(2, NAMES)) and same(found, heads(1))


def test_a_file_that_does_not_say_belongs_to_any_base(saved_run):
    """As PEFT's."""
    for file in saved_run.rglob("*.safetensors"):
        save_file(load_file(file), file)
    again = encoder(2, NAMES)
    load_all(saved_run, again, NAMES, heads(1), OTHERS[0][0])
    assert same(again, encoder(1, NAMES))


@pytest.fixture
def saved_heads(tmp_path):
    return save(tmp_path, [])


def test_heads_json_says_what_to_build(saved_heads):
    assert read_heads(saved_heads) == (TASKS, SETTINGS)
    info = json.loads((saved_heads / "heads.json").read_text())
    assert info["base_model"] == "tiny" and info["encoder_sha256"] == "e" * 64


def test_heads_of_other_tasks_are_refused(saved_heads):
    fewer = torch.nn.ModuleDict({"sst": torch.nn.Linear(32, 5)})
    with pytest.raises(UserError, match=r"'sts\.bias' is unexpected.*1 more"):
        load_all(saved_heads, encoder(), [], fewer, BASE)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["format"], 1),  # its regressions had their output in the labels' unit
        (["format"], None),
        (["tasks"], None),
        (["tasks"], {}),
        (["tasks", "sst"], 0),
        (["tasks", "sst", "kind"], ["classification"]),
        (["tasks", "sst", "labels"], 5),
        (["tasks", "sst", "label"], None),
        (["tasks", "sts", "low"], 10**400),
        (["tasks", "sts", "high"], float("nan")),
        (["tasks", "sts", "files"], {"train": "a.csv", "dev": 3}),
        (["tasks", "sts", "files"], {"train": "a.csv", "dev": "/dev/zero"}),
        (["tasks", "sts", "files"], {"train": "a.csv", "dev": "a/../../b.csv"}),
        (["settings"], []),
        (["settings", "mode"], "lorA"),
        (["settings", "adapters"], {"shared": 1}),
        (["settings", "pairs"], None),
        (["settings", "model"], 3),
        (["sha256"], "a\nb"),
        (["base_model"], None),
    ],
)
def test_a_wrong_value_in_heads_json_is_named(saved_heads, keys, value):
    info = json.loads((saved_heads / "heads.json").read_text())
    table = info
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    (saved_heads / "heads.json").write_text(json.dumps(info))
    with pytest.raises(UserError) as caught:
        read_heads(saved_heads)
    message = str(caught.value)
    assert "heads.json: " in message and keys[-1] in message and "\n" not in message


def test_fingerprint_sees_the_base_weights_only():
    model = BertModel(BertConfig(**TINY))
    before = fingerprint(model)
    inject(model, LoraConfig(r=4))
    assert fingerprint(model) == before
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1
    assert fingerprint(model) != before
