"""Tasks: labels, the built-in definitions, and a user's own table."""

import re
from dataclasses import replace

import pytest
import tomlkit

from fastlora.data.tasks import BUILTIN, task_from_table
from fastlora.errors import UserError

TABLE = {
    "kind": "classification",
    "columns": ["question"],
    "label": "type",
    "labels": ["who", "where", "7"],
    "files": {"train": "train.tsv", "dev": "dev.tsv"},
}


@pytest.mark.parametrize(
    ("task", "text", "value"),
    [
        ("sst", "3", 3.0),
        ("quora", "1.0", 1.0),
        ("quora", "0.0", 0.0),
        ("sts", "3.7999999999999998", 3.8),
        ("sts", "5", 5.0),
        ("sts", "0.0", 0.0),
    ],
)
def test_labels_as_the_files_write_them(task, text, value):
    assert BUILTIN[task].parse_label(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "text", ["", "2", "-1", "0.5", "nan", "inf", "yes", "1_0", "\uff11", "0x1"]
)
def test_bad_class_says_what_was_expected(text):
    with pytest.raises(ValueError) as error:
        BUILTIN["quora"].parse_label(text)
    assert str(error.value) == f"column 'is_duplicate' is {text!r} (expected 0 or 1)"


@pytest.mark.parametrize("text", ["", "5.1", "-0.1", "nan", "inf", "three", "2,5"])
def test_bad_value_says_the_range(text):
    with pytest.raises(ValueError, match="expected a number from 0 to 5"):
        BUILTIN["sts"].parse_label(text)


def test_a_range_is_shown_with_all_its_digits():
    task = replace(BUILTIN["sts"], low=1e6, high=1e6 + 1)
    assert task.expected == "a number from 1000000 to 1000001"


def test_builtin_properties():
    assert {name: task.outputs for name, task in BUILTIN.items()} == {
        "sst": 5,
        "cfimdb": 2,
        "quora": 2,
        "sts": 1,
    }
    assert [name for name, task in BUILTIN.items() if task.is_pair] == ["quora", "sts"]
    assert BUILTIN["sts"].metric == "pearson"
    assert BUILTIN["sst"].metric == "accuracy"
    assert BUILTIN["sst"].expected == "0, 1, 2, 3 or 4"
    assert BUILTIN["cfimdb"].files["test"] == "ids-cfimdb-test.csv"


def test_builtin_tasks_are_ordinary_tasks():
    for name, task in BUILTIN.items():
        assert task_from_table(name, task.to_table()) == task


def test_named_and_numeric_classes():
    task = task_from_table("trec", TABLE)
    assert [task.parse_label(text) for text in ("who", "where", "7", "7.0")] == [0, 1, 2, 2]


def test_table_survives_toml():
    task = task_from_table("trec", TABLE)
    document = tomlkit.parse(tomlkit.dumps({"tasks": {"trec": task.to_table()}}))
    assert task_from_table("trec", document["tasks"]["trec"]) == task
    assert hash(task) == hash(task_from_table("trec", TABLE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"colums": ["a"]},
            "'colums' of a classification (expected kind, columns, label, files, labels,",
        ),
        (
            {"kind": "ranking"},
            "kind is 'ranking' (expected classification, multilabel or regression)",
        ),
        ({"kind": ["regression"]}, "kind is ['regression']"),
        ({"columns": "question"}, "columns is 'question' (expected one or two text columns)"),
        ({"columns": ["a", "b", "c"]}, "one or two text columns"),
        ({"columns": ["a", "a"]}, "one or two text columns"),
        ({"columns": ["type"]}, "label is 'type' (expected another column's name)"),
        ({"label": 3}, "label is 3"),
        ({"labels": "who"}, "labels is 'who' (expected two or more different classes)"),
        ({"labels": ["yes"]}, "two or more different classes"),
        ({"labels": ["1", "1.0"]}, "two or more different classes"),
        ({"high": 5}, "unknown key 'high'"),
        (
            {"kind": "regression"},
            "'labels' of a regression (expected kind, columns, label, files, low",
        ),
        ({"files": None}, "files is None"),
        ({"files": {"train": "a.csv"}}, "files for train, dev, maybe test"),
        ({"files": {"train": "a", "dev": "b", "tset": "c"}}, "'tset': 'c'"),
        ({"dev_share": 0.1}, "none for dev where there is a dev_share"),
        ({"dev_share": 1}, "dev_share is 1 (expected a share between 0 and 1)"),
        ({"metric": "f1"}, "metric is 'f1' (expected accuracy, macro_f1, matthews, f1:CLASS)"),
        ({"metric": "pearson"}, "metric is 'pearson'"),
        ({"metric": "f1:why"}, "'why' is no class (expected who, where or 7)"),
        ({"class_weights": {"why": 2}}, "'why' is no class"),
        ({"class_weights": {"who": 0}}, "class_weights is {'who': 0} (expected \"auto\""),
        ({"class_weights": 3}, "class_weights is 3"),
        ({"weight": 0}, "weight is 0 (expected a positive number)"),
        ({"kind": "multilabel", "class_weights": "auto"}, "unknown key 'class_weights'"),
        ({"kind": "multilabel", "labels": ["a|b", "c"]}, "names without |"),
    ],
)
def test_wrong_tables_are_refused_by_name(change, message):
    with pytest.raises(UserError) as error:
        task_from_table("trec", {**TABLE, **change})
    assert str(error.value).startswith("task 'trec': ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (None, 1, "low is None (expected a number)"),
        (float("-inf"), 1, "low is -inf"),
        (1, 1, "high is 1 (expected more than low, by 1e-300 or more)"),
        (0, 1e-310, "high is 1e-310 (expected more than low, by 1e-300 or more)"),
        (1, "2", "high is '2'"),
        (1, float("nan"), "high is nan"),
    ],
)
def test_wrong_ranges_are_refused(low, high, message):
    table = {key: TABLE[key] for key in TABLE if key != "labels"}
    with pytest.raises(UserError, match=re.escape(message)):
        task_from_table("own", {**table, "kind": "regression", "low": low, "high": high})


@pytest.mark.parametrize("name", ["My-Task", "default", "a" * 101])
def test_bad_name(name):
    with pytest.raises(UserError, match=r"task '\w[\w-]+'?: expected another name of at most 100"):
        task_from_table(name, TABLE)
