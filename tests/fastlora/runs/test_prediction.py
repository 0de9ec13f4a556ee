"""Predictions from Python and for files: carried columns, order, formats, pipes."""

import csv
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

import fastlora
from fastlora.errors import UserError
from fastlora.runs import prediction
from fastlora.runs.prediction import predict_file
from fastlora.runs.session import run_training
from fastlora.training.config import TrainConfig

PREDICT = [sys.executable, "-m", "fastlora.cli", "predict"]


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {"model": str(tiny_model), "data": tiny_data, "device": "cpu", "lr": 2e-2}
    run_training(TrainConfig(**settings, tokens_per_batch=256, max_steps=9, out=out), quiet=True)
    return out


@pytest.fixture(scope="module")
def trained(run):
    return fastlora.load(str(run), "cpu")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_wrong_route_is_one_line(run, monkeypatch):
    monkeypatch.setenv("FASTLORA_ROUTE", "bogus")
    with pytest.raises(UserError, match="FASTLORA_ROUTE is 'bogus'"):
        fastlora.load(run)


def test_strings_get_labels_with_probabilities(trained):
    assert set(trained.tasks) == {"sst", "quora", "sts"}
    good, empty = trained.predict(["the good film", ""], "sst")
    assert isinstance(good, fastlora.Prediction)
    assert list(good.probabilities) != ["0", "1", "2", "3", "4"] or good.label == "0"
    assert sum(good.probabilities.values()) == pytest.approx(1)
    assert good.label == next(iter(good.probabilities))
    assert good.score == good.probabilities[good.label] == max(good.probabilities.values())
    assert empty.label in trained.tasks["sst"].labels
    (pair,) = trained.predict([("a film", "a dog")], "quora")
    assert set(pair.probabilities) == {"0", "1"}
    (value,) = trained.predict([["a film", "a dog"]], "sts")
    assert value.label is None and 0 <= value.score <= 5 and value.probabilities == {}
    assert trained.predict([], "sst") == []


@pytest.mark.parametrize(
    ("texts", "task", "message"),
    [
        (["a"], None, "no task is given .expected one of sst, quora, sts"),
        (["a"], "stt", "task is 'stt'"),
        ("a film", "sst", "texts is .a film. .expected a list of texts"),
        (["a", 3], "sst", "element 1 of texts is 3"),
        ([("a", "b")], "sst", "element 0 of texts"),
        (["a"], "quora", "a list of pairs of strings"),
        ("ab", "quora", "expected a list of texts"),
        ([("a", None)], "quora", "element 0"),
    ],
)
def test_other_things_than_texts_are_refused(trained, texts, task, message):
    with pytest.raises(UserError, match=message):
        trained.predict(texts, task)


def test_a_files_columns_are_carried_over_in_order(trained, tmp_path, monkeypatch):
    texts = ["a good film " * (i % 7) for i in range(25)]
    file = tmp_path / "new.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["key", "sentence", "key", "n\u00f6te"])
        writer.writerows([i, text, -i, f'"{i}",\n'] for i, text in enumerate(texts))
    monkeypatch.setattr(prediction, "BLOCK", 4)
    out, count, truncated = predict_file(trained, file, None, "sst", top=5)
    rows = rows_of(out)
    assert (count, truncated, out.name) == (25, 0, "new.csv.predictions.csv")
    assert [row["key"] for row in rows] == [str(i) for i in range(25)]
    assert [row["key.2"] for row in rows] == [str(-i) for i in range(25)]
    assert [row["n\u00f6te"] for row in rows] == [f'"{i}",\n' for i in range(25)]
    for row, expected in zip(rows, trained.predict(texts, "sst"), strict=True):
        assert row["prediction"] == expected.label
        assert float(row["probability"]) == pytest.approx(expected.score, abs=1e-4)
        labels = [row[f"prediction{rank}"] for rank in ("", "_2", "_3", "_4", "_5")]
        assert labels == list(expected.probabilities)


def test_a_column_names_the_task_of_each_row(trained, tmp_path):
    rows = [
        {
            "task": "sts",
            "sentence1": "a cat",
            "sentence2": "a cat",
            "n": 1.50,
            "list": [1, "\u00e9"],
        },
        {"task": "sst", "sentence": "a good film", "n": None},
    ]
    file = tmp_path / "new.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    out, *_ = predict_file(trained, file, None, None)
    first, second = rows_of(out)
    assert first["probability"] == "" and 0 <= float(first["prediction"]) <= 5
    assert (first["n"], first["list"], second["n"]) == ("1.5", '["1", "\u00e9"]', "null")
    assert second["prediction"] == trained.predict(["a good film"], "sst")[0].label


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "sentence\n", {}, "no rows"),
        ("a.csv", "text\nx\n", {}, "0 columns named 'sentence'"),
        ("a.csv", "sentence,x\na,b\na\n", {}, "a.csv:3: 1 fields"),
        ("a.csv", "sentence,prediction\na,b\n", {}, "a column 'prediction' already"),
        ("a.csv", "sentence\na\n", {"top": 6}, "--top is 6 .expected 1 to 5"),
        ("a.csv", "sentence\na\n", {"task": None}, "0 columns named 'task'"),
        (
            "a.csv",
            "task,sentence\nsts,a\n",
            {"task": None},
            "a.csv:2: column 'sentence1'",
        ),
        ("a.csv", "task,sentence\nx,a\n", {"task": None}, "a.csv:2: column 'task' is 'x'"),
        ("a.csv", "sentence\na\n", {"task": None, "course": True}, "cs224n has sst, quora, sts"),
        ("a.csv", "sentence\n\xff\n", {}, "a.csv:2: not UTF-8"),
        (
            "a.jsonl",
            '{"sentence": "a"}\n{"sentence": "b", "x": "c"}\n',
            {},
            "first 1 rows has a column 'x'",
        ),
        ("a.jsonl", '{"sentence": "a"}\n{"sentence": [1]}\n', {}, "a.jsonl:2: column 'sentence'"),
    ],
)
def test_wrong_files_are_named_and_nothing_is_written(
    trained, tmp_path, name, text, options, message, monkeypatch
):
    monkeypatch.setattr(prediction, "BLOCK", 1)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        predict_file(trained, tmp_path / name, **{"task": "sst", **options})
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("task", "name", "column"),
    [
        ("sst", "sst-dev-output.csv", "Predicted_Sentiment"),
        ("quora", "para-dev-output.csv", "Predicted_Is_Paraphrase"),
        ("sts", "sts-dev-output.csv", "Predicted_Similiary"),
    ],
)
def test_the_courses_submission_files(trained, tiny_data, tmp_path, task, name, column):
    file = tmp_path / trained.tasks[task].files["dev"]
    file.write_bytes((tiny_data / file.name).read_bytes())
    out, *_ = predict_file(trained, file, None, task, course=True)
    header, *lines = out.read_text().splitlines()
    assert out == tmp_path / name and header == f"id \t {column} "
    with file.open() as opened:
        ids = [row["id"] for row in csv.DictReader(opened, delimiter="\t")]
    assert [line.split(" , ")[0] for line in lines] == ids
    values = [float(line.split(" , ")[1]) for line in lines]
    assert all(line.endswith(" ") for line in lines) and 0 <= min(values) <= max(values) <= 5


def test_standard_input_and_output(trained, monkeypatch, capfdbinary):
    for text, task, expected in (
        (b"a good film\r\n\nnot good", "sst", ["a good film", "", "not good"]),
        (b"a cat\ta dog\n\t\n", "sts", ["a cat", ""]),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        predict_file(trained, prediction.STANDARD, None, task)
        rows = list(csv.reader(capfdbinary.readouterr().out.decode().splitlines()))
        assert [row[0] for row in rows[1:]] == expected
        assert rows[0][-1] == ("probability" if task == "sst" else "prediction")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one text\n")))
    with pytest.raises(UserError, match=r"-:1: one text \(expected two"):
        predict_file(trained, prediction.STANDARD, None, "sts")
    with pytest.raises(UserError, match="no task is given"):
        predict_file(trained, prediction.STANDARD, None, None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the memory from /proc")
def test_an_endless_input_is_predicted_until_the_reader_has_enough(run):
    """Memory does not grow, and the end of the pipe is no error message."""
    read, write = os.pipe()
    writer = subprocess.Popen(["yes", "a good film"], stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    command = [*PREDICT, str(run), "-", "--task", "sst"]
    process = subprocess.Popen(command, stdin=read, stdout=-1, stderr=-1, text=True)
    os.close(read)
    try:
        lines, pages = [], []
        for _ in range(2):
            lines += islice(process.stdout, 50_000)
            pages.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
    finally:
        writer.kill()
        process.kill()
        writer.wait()
    assert len(set(lines[1:])) == 1 and pages[1] - pages[0] < 2000
