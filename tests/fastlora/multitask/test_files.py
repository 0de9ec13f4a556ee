"""Adapters and heads of runs on disk: they know the encoder and tokenizer they belong to."""

import json
from dataclasses import replace

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
    load_adapter,
    load_all,
    load_heads,
    read_heads,
    save_adapter,
    save_heads,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
BASE = BaseInfo("tiny", "e" * 64, "t" * 64)
OTHERS = [
    (replace(BASE, encoder_sha256="f" * 64, base_model="other"), "another base model.*'tiny'.*"),
    (replace(BASE, tokenizer_sha256="f" * 64), "another tokenizer"),
]
TASKS = {name: BUILTIN[name] for name in ("sst", "sts")}
WEIGHTS = "adapter_model.safetensors"


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
    assert adapter_names("both", TASKS) == ["default", "sst", "sts"]
    assert adapter_place(tmp_path, "default") == tmp_path
    assert adapter_place(tmp_path, "sst") == tmp_path / "sst"


def test_an_adapters_file_says_what_it_belongs_to(tmp_path):
    save_adapter(tmp_path, encoder(), "default", BASE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        facts = file.metadata()
    assert facts["encoder_sha256"] == BASE.encoder_sha256
    assert facts["tokenizer_sha256"] == BASE.tokenizer_sha256
    assert facts["fastlora_version"]


def test_a_run_of_several_adapters_and_heads_is_saved_and_loaded_whole(tmp_path):
    names = adapter_names("both", TASKS)
    trained, again = encoder(1, names), encoder(2, names)
    for name in names:
        save_adapter(adapter_place(tmp_path, name), trained, name, BASE)
    save_heads(tmp_path, heads(0), TASKS, BASE, {"pairs": "joint"})
    found = heads(1)
    load_all(tmp_path, again, names, found, TASKS, BASE)
    assert same(again, trained) and same(found, heads(0))


@pytest.mark.parametrize(("base", "cause"), OTHERS)
def test_an_adapter_of_another_base_is_refused(tmp_path, base, cause):
    save_adapter(tmp_path, encoder(1), "default", BASE)
    model = encoder(2)
    with pytest.raises(UserError, match=cause) as caught:
        load_adapter(tmp_path, model, "default", base)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert same(model, encoder(2))


def test_a_file_that_does_not_say_belongs_to_any_base(tmp_path):
    """As PEFT's."""
    save_adapter(tmp_path, encoder(1), "default", BASE)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    model = encoder(2)
    load_adapter(tmp_path, model, "default", OTHERS[0][0])
    assert same(model, encoder(1))


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
    assert same(again, heads(0))


@pytest.mark.parametrize(
    ("tasks", "base", "cause"),
    [
        ({**TASKS, "sst": replace(TASKS["sst"], labels=tuple("43210"))}, BASE, "head of 'sst'"),
        ({**TASKS, "sts": replace(TASKS["sts"], high=1.0)}, BASE, "head of 'sts'"),
        *((TASKS, base, cause) for base, cause in OTHERS),
    ],
)
def test_heads_of_something_else_are_refused(saved_heads, tasks, base, cause):
    again = heads(1)
    with pytest.raises(UserError, match=cause):
        load_heads(saved_heads, again, tasks, base)
    assert same(again, heads(1))


def test_heads_of_other_tasks_are_refused(saved_heads):
    fewer = torch.nn.ModuleDict({"sst": torch.nn.Linear(32, 5)})
    with pytest.raises(UserError, match=r"'sts\.bias' is unexpected.*1 more"):
        load_heads(saved_heads, fewer, {"sst": TASKS["sst"]}, BASE)


def test_task_files_may_be_elsewhere(saved_heads):
    moved = replace(TASKS["sst"], files={"train": "a.csv", "dev": "b.csv"})
    load_heads(saved_heads, heads(1), {**TASKS, "sst": moved}, BASE)


def test_a_broken_file_about_heads_is_named(saved_heads):
    (saved_heads / "heads.json").write_text("{}")
    with pytest.raises(UserError, match=r"heads\.json: has no 'tasks'"):
        load_heads(saved_heads, heads(1), TASKS, BASE)


def test_fingerprint_sees_the_base_weights_only():
    model = BertModel(BertConfig(**TINY))
    before = fingerprint(model)
    inject(model, LoraConfig(r=4))
    assert fingerprint(model) == before
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1
    assert fingerprint(model) != before
