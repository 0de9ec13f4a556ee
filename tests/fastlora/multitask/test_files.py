"""Adapters and heads of runs on disk: they know the encoder and tokenizer they belong to."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora import LoraConfig, UserError, inject, lora_layers
from fastlora.bert.config import BertConfig
from fastlora.bert.model import BertModel
from fastlora.data.tasks import BUILTIN
from fastlora.files import write_sealed
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


def a_model(seed, names, tasks=TASKS):
    """An encoder with these adapters, and heads, with the values of a seed."""
    return SimpleNamespace(
        encoder=encoder(seed, names or NAMES), heads=heads(seed), tasks=tasks, settings=names
    )


def save(folder, names):
    save_all(folder, a_model(1, names), BASE, SETTINGS)
    return folder


def test_an_adapters_file_names_its_base_model(tmp_path):
    save(tmp_path, ["default"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


NAMES = adapter_names("shared+per-task", TASKS)


@pytest.fixture
def saved_run(tmp_path):
    return save(tmp_path, NAMES)


def same_model(a, b):
    return same(a.encoder, b.encoder) and same(a.heads, b.heads)


def test_a_run_of_several_adapters_and_heads_is_saved_and_loaded_whole(saved_run):
    again = a_model(2, NAMES)
    load_all(saved_run, again, TASKS, BASE)
    assert same_model(again, a_model(1, NAMES))


@pytest.mark.parametrize("file", ["heads.safetensors", WEIGHTS, f"sts/{WEIGHTS}"])
def test_a_flipped_bit_is_noticed(saved_run, file):
    content = bytearray((saved_run / file).read_bytes())
    content[-4] ^= 1
    (saved_run / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: has changed since it was saved"):
        read_heads(saved_run)


def test_files_that_say_the_same_are_not_changed(saved_run):
    for file in saved_run.rglob("*.safetensors"):
        save_file(load_file(file), file)
    for file in saved_run.rglob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text())))
    assert read_heads(saved_run) == (TASKS, SETTINGS)


@pytest.mark.parametrize(("base", "cause"), OTHERS)
def test_a_run_on_another_base_is_refused(saved_run, base, cause):
    again = a_model(2, NAMES)
    with pytest.raises(UserError, match=cause) as caught:
        load_all(saved_run, again, TASKS, base)
    assert "\n" not in str(caught.value) and str(saved_run) in str(caught.value)
    assert same_model(again, a_model(2, NAMES))


@pytest.fixture
def saved_heads(tmp_path):
    return save(tmp_path, [])


def test_heads_json_says_what_to_build(saved_run):
    assert read_heads(saved_run) == (TASKS, SETTINGS)
    info = json.loads((saved_run / "heads.json").read_text())
    assert info["base_model"] == "tiny" and info["encoder_sha256"] == "e" * 64


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("heads.json", '"similarity"', '"dissimilarity"'),
        ("heads.json", '"low": 0.0', '"low": 1.0'),
        ("heads.json", '"own_sha256": "', '"own_sha256": "0'),
        ("heads.json", '"mode": "lora"', '"mode": "lorA"'),
        ("heads.json", '"sha256": {', '"tables": {'),
        ("adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 80'),
        ("sts/adapter_config.json", '"use_rslora": false', '"use_rslora": true'),
    ],
)
def test_a_changed_setting_is_noticed(saved_run, file, old, new):
    text = (saved_run / file).read_text()
    assert text.count(old) == 1
    (saved_run / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"{file}: has changed since it was saved"):
        read_heads(saved_run)


@pytest.mark.parametrize(
    "key", ["sha256", "tasks", "settings", "mode", "adapters", "pairs", "model"]
)
def test_a_sealed_file_may_lack_something(saved_run, key):
    info = json.loads((saved_run / "heads.json").read_text())
    del info["own_sha256"], (info if key in info else info["settings"])[key]
    write_sealed(saved_run / "heads.json", info)
    with pytest.raises(UserError, match=f"heads.json: cannot be used: .*{key}"):
        read_heads(saved_run)


def test_equal_tensors_give_equal_files(tmp_path):
    first, *others = (save(tmp_path / str(i), NAMES) / WEIGHTS for i in range(4))
    assert {file.read_bytes() for file in others} == {first.read_bytes()}


def test_heads_of_other_tasks_are_refused(saved_heads):
    with pytest.raises(UserError, match=r"'sts\.bias' is unexpected.*1 more"):
        load_all(saved_heads, a_model(2, []), ["sst"], BASE)


@pytest.mark.parametrize("version", [2, None])
def test_heads_json_of_another_version_is_named(saved_run, version):
    """The heads of version 2 normalised states otherwise."""
    info = json.loads((saved_run / "heads.json").read_text())
    (saved_run / "heads.json").write_text(json.dumps(info | {"format": version}))
    with pytest.raises(UserError, match=r"heads.json: format is .* \(expected 3"):
        read_heads(saved_run)


def test_fingerprint_sees_the_base_weights_only():
    model = BertModel(BertConfig(**TINY))
    before = fingerprint(model)
    inject(model, LoraConfig(r=4))
    assert fingerprint(model) == before
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1
    assert fingerprint(model) != before
