"""Tasks of a user's own, from their table to the files of a run."""

import csv
import json
from dataclasses import replace

from fastlora.files import read_toml
from fastlora.runs.session import run_training
from fastlora.training.config import TrainConfig

WORDS = ["good", "bad", "fine"]


def test_a_run_of_weighted_classes_and_of_several_labels(tmp_path, tiny_model, capsys):
    rows = [(f"{word} film {i}", word, f"{word}|film") for word in WORDS for i in range(10)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "one", "many"), *rows, ("dog", "good", "")])
    common = {"columns": ["text"], "files": {"train": "a.csv"}, "dev_share": 0.2}
    tables = {
        "one": {**common, "kind": "classification", "label": "one", "class_weights": "auto"},
        "many": {**common, "kind": "multilabel", "label": "many", "metric": "f1:film"},
    }
    settings = {"model": tiny_model, "device": "cpu", "out": tmp_path / "run", "epochs": 2}
    config = TrainConfig(task=tables, tasks=("one", "many"), data=tmp_path, **settings)
    result = run_training(config)
    record = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert record["metrics"]["many"]["f1:film"] == result.scores["many"]
    assert list(record["metrics"]["one"])[:3] == ["accuracy", "macro_f1", "matthews"]
    printed = capsys.readouterr().out
    assert "one: class" in printed and "many: class" in printed
    assert "one: class" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    recorded = read_toml(tmp_path / "run" / "run.toml")["task"]
    assert recorded["one"]["labels"] == sorted(WORDS)
    assert recorded["many"]["labels"] == ["bad", "film", "fine", "good"]
    # The same tables, and the recorded ones, are those of the same run.
    for known in (tables, recorded):
        again = run_training(replace(config, task=known))
        assert again.scores == result.scores
