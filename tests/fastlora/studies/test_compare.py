"""`fastlora compare`: the table, the plot and the report of finished runs."""

import json
import shutil

import pytest

from fastlora.cli import main
from fastlora.files import read_json
from fastlora.runs.session import run_training
from fastlora.training.config import TrainConfig


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory):
    """The folder above three runs: a and b differ in r and in their tasks, c in its dev data."""
    above, model = tmp_path_factory.mktemp("runs"), str(tiny_model)
    common = {"data": tiny_data, "model": model, "max_steps": 1, "device": "cpu"}
    for name, own in {
        "a": {"tasks": ("sts",), "r": 2},
        "b": {"tasks": ("sst", "sts"), "r": 4},
        "c": {"tasks": ("sts",), "r": 2, "limit": 12},
    }.items():
        run_training(TrainConfig(out=above / name, **common, **own), quiet=True)
    return above


def compare(capsys, *arguments):
    """The exit code of `fastlora compare`, and what it printed."""
    with pytest.raises(SystemExit) as exit:
        main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit.value.code, captured.out + captured.err


def test_runs_stand_side_by_side(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(runs)
    code, printed = compare(capsys, "a", "b", "--out", tmp_path)
    assert code == 0 and str(tmp_path / "plots" / "compare.png") in "".join(printed.split("\n"))
    results = [read_json(runs / name / "result.json") for name in "ab"]
    rows = (tmp_path / "report.md").read_text().splitlines()
    assert "| run | settings that differ | sts | sst | trainable | seconds |" in rows
    for name, r, result in zip(("1\\. a", "2\\. b"), (2, 4), results, strict=True):
        counts = result["parameters"]
        trained = f"{counts['lora'] + counts['other trainable']:,}"
        scores = [result["scores"].get(task) for task in ("sts", "sst")]
        cells = ["" if score is None else f"{score:.4g}" for score in scores]
        assert f"| {name} | r {r} | {' | '.join(cells)} | {trained} | " in "\n".join(rows)
        assert f" {r} " in printed and trained in printed
    assert (tmp_path / "plots" / "compare.png").is_file() and "dev data" not in printed


def test_without_out_there_is_only_a_plot_and_other_dev_data_is_said(
    runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, printed = compare(capsys, runs / "a", runs / "c")
    assert code == 0 and "The dev data of sts is not the same." in printed
    assert [str(path) for path in tmp_path.rglob("*.*")] == [f"{tmp_path}/plots/compare.png"]


def test_only_the_settings_of_common_tasks_that_differ_are_named(runs, tmp_path, capsys):
    for name, own in {"p": 'metric = "accuracy"', "q": 'metric = "macro_f1"\nweight = 2'}.items():
        shutil.copytree(runs / "a", tmp_path / name)
        with (tmp_path / name / "run.toml").open("a") as file:
            file.write(f"\n[task.mine]\nkind = 'k'\n{own}\n[task.{name}]\nkind = 'k'\n")
    code, _ = compare(capsys, tmp_path / "p", tmp_path / "q", "--out", tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    settings = [row.split(" | ")[1] for row in report.splitlines() if row[:3] in ("| 1", "| 2")]
    assert settings == ["mine.metric accuracy", "mine.metric macro_f1, mine.weight 2"] and code == 0


@pytest.mark.parametrize("name", ["nowhere", "unfinished"])
def test_a_folder_without_a_finished_run_is_refused(runs, name, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    code, printed = compare(capsys, runs / "a", tmp_path / name)
    assert code == 2 and f"{tmp_path / name}: holds no finished run" in printed


@pytest.mark.parametrize("key", ["scores", "parameters", "seconds", "table"])
def test_a_damaged_result_is_one_line(runs, tmp_path, capsys, key):
    shutil.copytree(runs / "a", tmp_path / "a")
    file = tmp_path / "a" / "result.json"
    file.write_text(json.dumps(read_json(file) | {key: ["?"]}))
    code, printed = compare(capsys, tmp_path / "a", runs / "b")
    assert code == 2 and "has changed since it was saved" in " ".join(printed.split())
