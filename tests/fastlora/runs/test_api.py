"""`fastlora.train` and `fastlora.Dataset`: a run from Python in a few lines."""

import json

import numpy as np
import pytest

import fastlora
from fastlora import Dataset, UserError
from fastlora.files import read_toml

TEXTS = [f"{word} film {i}" for i in range(10) for word in ("good", "bad")]
MOOD = Dataset(TEXTS, ["good", "bad"] * 10)


@pytest.fixture
def settings(tiny_model, tmp_path):
    return {"model": str(tiny_model), "device": "cpu", "out": str(tmp_path / "run"), "quiet": True}


def test_examples_in_memory_become_a_run_that_can_be_repeated(settings, tmp_path, capsys):
    pairs = [("good film", text) for text in TEXTS]
    same = Dataset(pairs, np.linspace(0, 1, 20), pairs[:4], [0.5, 1, 0, 0.2], metric="spearman")
    many = Dataset(TEXTS, [["film", "good"], []] * 10)
    data = {"mood": MOOD, "same": same, "many": many}
    run = fastlora.train(data, **settings, epochs=2)
    assert run.folder == tmp_path / "run" and list(run.scores) == list(data)
    assert run.metrics["many"]["macro_f1"] == run.scores["many"]
    (found,) = run.predictor.predict(["good film"], task="mood")
    assert found.probabilities.keys() == {"good", "bad"} and capsys.readouterr().out == ""
    table = read_toml(run.folder / "run.toml")
    assert table["data"] == str(run.folder / "data")
    kinds = [table["task"][name]["kind"] for name in data]
    assert kinds == ["classification", "regression", "multilabel"]
    assert "dev_share" in table["task"]["mood"] and "dev" in table["task"]["same"]["files"]
    # The same call is the same run; with other examples it is refused, and nothing changes.
    written = {file: file.read_bytes() for file in (run.folder / "data").iterdir()}
    assert fastlora.train(data, **settings, epochs=2).scores == run.scores
    with pytest.raises(UserError, match="holds the data of another run; use a new out"):
        fastlora.train({"mood": Dataset(TEXTS, ["bad", "good"] * 10)}, **settings)
    assert {file: file.read_bytes() for file in (run.folder / "data").iterdir()} == written


def test_a_file_and_a_folder_are_data_too(settings, tmp_path, tiny_data):
    rows = [json.dumps({"a": text, "b": text[0]}) for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("\n".join(rows), encoding="utf-8")
    how = {"text": "a", "label": "b", "class_weights": {"b": 2}, "metric": "f1:g"}
    run = fastlora.train(str(tmp_path / "x.jsonl"), **how, **settings)
    assert list(run.scores) == ["x"] and run.metrics["x"]["f1:g"] == run.scores["x"]
    settings["out"] += "2"
    run = fastlora.train(tiny_data, tasks="sst,sts", max_steps=1, **settings)
    assert list(run.scores) == ["sst", "sts"]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("abc", ["a", "b", "c"], "texts and labels are lists"),
        (["a"], ["x", "y"], "there are 1 texts and 2 labels (expected equally many"),
        ([], [], "there are 0 texts and 0 labels"),
        (["a", 3], ["x", "y"], "texts[1] is 3 (expected a string, or a pair of strings)"),
        ([("a", "b", "c")], ["x"], "texts[0] is ('a', 'b', 'c')"),
        (["a", ("a", "b")], ["x", "y"], "some texts are strings and others pairs"),
        (["a", "b"], ["x", None], "labels[1] is None (expected text, a number, a boolean"),
        (["a"], [float("nan")], "pandas' dropna() does"),
        (["a", float("nan")], ["x", "y"], "pandas' dropna() does"),
        (["a"], [["x", 3]], "labels[0] is ['x', 3]"),
    ],
)
def test_what_are_no_texts_and_labels_is_refused(texts, labels, message):
    with pytest.raises(UserError) as error:
        Dataset(texts, labels)
    assert message in str(error.value)
    with pytest.raises(UserError, match="dev_"):
        Dataset(["a"], ["x"], dev_texts=["a"])


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"mood": MOOD}, {"epoch": 3}, "did you mean 'epochs'?"),
        ({"mood": MOOD}, {"tasks": "mood"}, "and then no tasks beside them"),
        ({"Mood": MOOD}, {}, "task 'Mood': expected another name"),
        ({"sst": MOOD}, {}, "task 'sst' is built in; choose another name"),
        ({"mood": "a.csv"}, {}, "is 'a.csv' (expected a Dataset; a file is data by itself: train("),
        ({"mood": Dataset(TEXTS, TEXTS, TEXTS, TEXTS)}, {}, "the same as the training file; name"),
        (MOOD, {}, "data is a Dataset (expected a folder, a file, or datasets by task"),
        ({"mood": Dataset(TEXTS, ["x"] * 20)}, {}, "has the label 'x' alone"),
        ({"mood": MOOD}, {"text": "a"}, "text is given (expected a file as data)"),
        ("nowhere.csv", {"text": "a", "label": "b"}, "nowhere.csv: cannot be read"),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(settings, tmp_path, data, changes, message):
    with pytest.raises(UserError) as error:
        fastlora.train(data, **{**settings, **changes})
    assert message in str(error.value)
    assert not list(tmp_path.glob("run/*"))
