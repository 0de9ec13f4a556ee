"""Settings: nothing that was given is changed silently, in any of the ways to give it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastlora.errors import UserError
from fastlora.lora.config import LoraConfig
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.types import types_of

SETTINGS = (TaskLoraConfig, TrainConfig, SearchConfig)


def of_type(kind):
    """Each setting of a type, or of that type or None."""
    for settings in SETTINGS:
        for name, its in types_of(settings).items():
            if its in (kind, kind | None):
                yield settings, name


@pytest.mark.parametrize("value", [1.5, 2.0, True, "1", float("nan"), np.float64(1.5), [1]])
@pytest.mark.parametrize(("settings", "name"), list(of_type(int)))
def test_a_whole_number_is_not_rounded(settings, name, value):
    with pytest.raises(UserError, match=f"{name} is .* .expected a whole number"):
        settings(**{name: value})


@pytest.mark.parametrize("value", ["0.1", True, float("nan"), float("inf")])
@pytest.mark.parametrize(("settings", "name"), list(of_type(float)))
def test_a_number_is_finite_and_no_text(settings, name, value):
    with pytest.raises(UserError, match=f"{name} is .* .expected a number"):
        settings(**{name: value})


@pytest.mark.parametrize("value", [1, 0, "false"])
@pytest.mark.parametrize(("settings", "name"), list(of_type(bool)))
def test_true_or_false_is_no_number(settings, name, value):
    with pytest.raises(UserError, match=f"{name} is .* .expected true or false"):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "sst"}, "tasks is 'sst' .expected a list of names"),
        ({"tasks": ("sst", 1)}, "tasks is .* .expected a list of names"),
        ({"mode": "qlora"}, "mode is 'qlora' .expected one of lora, frozen, full"),
        ({"data": 3}, "data is 3 .expected a path"),
        ({"targets": ()}, "targets is .* .expected one name or more"),
        ({"alpha": 0}, "alpha is 0.0 .expected a positive number"),
        ({"sst": 8}, "sst is 8 .expected a TaskLoraConfig"),
        ({"device": 0}, "device is 0 .expected text"),
    ],
)
def test_other_types_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


def test_paths_may_be_text_and_tuples_lists():
    config = TrainConfig(data="data", out="run", tasks=["sst"], targets=["key"])
    assert (config.data, config.out) == (Path("data"), Path("run"))
    assert (config.tasks, config.targets) == (("sst",), ("key",))
    assert TrainConfig(seed=np.int64(3)).to_table()["seed"] == 3
    assert type(TrainConfig(seed=np.int64(3)).seed) is int


def test_a_table_describes_its_configuration():
    table = {"kind": "classification", "lora": {"r": 3}}
    config = TrainConfig(
        r=2,
        targets=("key",),
        adapters="per-task",
        sst=TaskLoraConfig(lr=0.1, targets=("value",)),
        task={"mine": table},
        data="data",
    )
    assert TrainConfig.from_table(config.to_table()) == config
    assert TrainConfig.from_table({}) == TrainConfig()
    assert config.task_settings("mine") == TaskLoraConfig(r=3)
    for task in ("sst", "mine"):
        changed = config.with_task_settings(task, TaskLoraConfig(warmup=0.5))
        assert changed.task_settings(task) == TaskLoraConfig(warmup=0.5)
        assert TrainConfig.from_table(changed.to_table()) == changed
    assert config.lora == LoraConfig(r=2, targets=("key",))
    assert TaskLoraConfig.of(config.lora).over(LoraConfig(r=5)) == config.lora
    with pytest.raises(UserError, match="expected no patterns"):
        TaskLoraConfig.of(LoraConfig(rank_pattern={"query": 2}))
    assert replace(config, out="x").to_table() == config.to_table()
