"""Adapters per task in use: another task beside those of a finished run."""

import pytest
import torch
from safetensors.torch import load_file

from fastlora.errors import UserError
from fastlora.runs.session import run_training
from fastlora.runs.trained import load
from fastlora.training.config import TaskLoraConfig


@pytest.fixture(scope="module")
def weights():
    """The adapters and heads of a run by file and name."""

    def read(folder):
        files = sorted((folder / "adapter").rglob("*.safetensors"))
        return {
            f"{file.parent.name}/{name}": tensor
            for file in files
            for name, tensor in load_file(file).items()
        }

    return read


def test_a_task_is_added_to_a_finished_run(tiny_config, tmp_path, weights):
    own = {"sst": TaskLoraConfig(r=3, targets=("value",))}
    first = tiny_config(adapters="per-task", tasks=("sst", "quora"), lr=1e-2, **own)
    run_training(first, quiet=True)
    second = tiny_config(
        adapters="per-task", tasks=("sts",), add_to=first.out, out=tmp_path / "more", lr=1e-2
    )
    result = run_training(second, quiet=True)
    assert list(result.scores) == ["sts"] and result.examples == 96
    before, after = weights(first.out), weights(second.out)
    assert before.keys() < after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    alone = tiny_config(adapters="per-task", tasks=("sts",), out=tmp_path / "alone", lr=1e-2)
    run_training(alone, quiet=True)
    for name, tensor in weights(alone.out).items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)
    old, both = load(first.out, "cpu"), load(second.out, "cpu")
    assert set(both.tasks) == {"sst", "quora", "sts"}
    assert both.model.settings["sst"].r == 3 and "sts" in both.model.settings
    assert set(old.tasks) == {"sst", "quora"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"adapters": "per-task"}, {"tasks": ("sst",)}, "has task 'sst'"),
        ({"adapters": "shared"}, {"tasks": ("sts",)}, "adapters 'shared', not 'per-task'"),
        ({"adapters": "per-task"}, {"tasks": ("sts",), "pairs": "joint"}, "pairs 'separate'"),
    ],
)
def test_what_cannot_be_added_to(tiny_config, tmp_path, first, second, message):
    config = tiny_config(tasks=("sst",), max_steps=1, **first)
    run_training(config, quiet=True)
    settings = {"adapters": "per-task", "add_to": config.out, "out": tmp_path / "more"}
    with pytest.raises(UserError, match=message):
        run_training(tiny_config(**settings, **second), quiet=True)
    assert not (tmp_path / "more").exists()


def test_add_to_needs_adapters_per_task(tiny_config, tmp_path):
    with pytest.raises(UserError, match="add_to is given, which needs --adapters per-task"):
        tiny_config(add_to=tmp_path)
