"""Adapters per task in use: another task beside a finished run's, rows of mixed tasks."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.errors import UserError
from fastlora.multitask.predictor import predict
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


MIXED = [
    {"task": "sts", "sentence1": "the dog runs", "sentence2": "a dog runs .", "id": "one"},
    {"task": "sst", "sentence": "a good film", "id": "two"},
    {"task": "quora", "sentence1": "the cat sings ?", "sentence2": "the cat sleeps ?", "id": "3"},
    {"task": "sst", "sentence": "a bad bad film", "id": "four"},
]


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = ["--data", tiny_data, "--model", tiny_model, "--out", folder, "--epochs", "3"]
    with pytest.raises(SystemExit) as exit:
        main(
            ["train", "--adapters", "shared+per-task", "--lr", "1e-2", "--quiet", *map(str, flags)]
        )
    assert exit.value.code == 0
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_of_mixed_tasks(finished, tmp_path, capsys, monkeypatch, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, MIXED)))
    else:
        with path.open("w", newline="") as file:
            names = ["id", "task", "sentence", "sentence1", "sentence2"]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(MIXED)
    passes = []
    from fastlora.multitask.model import MultitaskBert

    embed = MultitaskBert.embed
    monkeypatch.setattr(MultitaskBert, "embed", lambda *a: passes.append(1) or embed(*a))
    with pytest.raises(SystemExit) as exit:
        main(["predict", str(finished), str(path), "--device", "cpu"])
    assert exit.value.code == 0 and len(passes) == 1
    found = rows_of(tmp_path / f"rows.{suffix}.predictions.csv")
    assert [(row["id"], row["task"]) for row in found] == [(r["id"], r["task"]) for r in MIXED]
    for row, given in zip(found, MIXED, strict=True):
        single = tmp_path / "single.jsonl"
        single.write_text(json.dumps(given))
        with pytest.raises(SystemExit):
            main(["predict", str(finished), str(single), "--task", row["task"], "--device", "cpu"])
        (alone,) = rows_of(tmp_path / "single.jsonl.predictions.csv")
        if row["task"] == "sts":
            assert float(alone["prediction"]) == pytest.approx(float(row["prediction"]), abs=2e-4)
        else:
            assert alone["prediction"] == row["prediction"]
            assert float(alone["probability"]) == pytest.approx(float(row["probability"]), abs=2e-4)


def test_a_file_of_one_task_needs_its_columns_only(finished, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("task,sentence\nsst,a good film\n")
    with pytest.raises(SystemExit) as exit:
        main(["predict", str(finished), str(path), "--device", "cpu"])
    assert exit.value.code == 0
    assert [row["task"] for row in rows_of(tmp_path / "rows.csv.predictions.csv")] == ["sst"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"task": "stt", "sentence": "x"}],
            "column 'task' is 'stt' (expected sst or quora or sts)",
        ),
        ([{"sentence": "x"}], "column 'task' is missing"),
        ([], "no rows"),
        ([{"task": "sts", "sentence1": "x"}], "column 'sentence2' is missing"),
    ],
)
def test_mixed_rows_are_read_strictly(finished, tmp_path, capsys, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as exit:
        main(["predict", str(finished), str(path)])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_only_its_own_tasks_use_an_adapter_beside_the_shared_one(tiny_config):
    config = tiny_config(adapters="shared+per-task", lr=1e-2)
    run_training(config, quiet=True)
    trained = load(config.out, "cpu")
    from fastlora.data.token_cache import load_tasks

    dev = load_tasks(config.data, trained.tasks.values(), "dev", trained.tokenizer)
    outputs = predict(trained.model, dev)
    with torch.no_grad():
        for name, B in trained.model.named_parameters():
            if name.endswith("lora_B.sst"):
                B.zero_()
    without = predict(trained.model, dev)
    assert abs(outputs["sst"] - without["sst"]).max() > 1e-3
    assert (outputs["sts"] == without["sts"]).all()
