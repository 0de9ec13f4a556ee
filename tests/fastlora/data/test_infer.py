"""What a task's table leaves out is found in its files; a part of the training file is dev."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastlora.data.infer import FileTask, complete, task_of_file
from fastlora.data.reading import read_rows
from fastlora.data.tasks import task_from_table
from fastlora.errors import UserError

TABLE = {
    "kind": "classification",
    "columns": ["text"],
    "label": "queue",
    "files": {"train": "a.csv"},
    "dev_share": 0.1,
}


def task(**changes):
    return task_from_table("own", {**TABLE, **changes})


def csv(folder, labels, name="a.csv", separator=","):
    rows = [f"text {i}{separator}{label}\n" for i, label in enumerate(labels)]
    (folder / name).write_text(f"text{separator}queue\n" + "".join(rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["bug", " a bill", "bug"], ("a bill", "bug")),
        (["10", "9", "9.0", "x"], ("9", "10", "x")),
        (["True", "False", "true"], ("False", "True")),
        (["b", "", "a"], ("a", "b")),  # an empty label is a bad row, and no class
        ([f"{2**53 + i}" for i in (1, 0, 1)], (f"{2**53}", f"{2**53 + 1}")),  # equal as floats
        (["1", "01", "001", "1.0", "1.10", "1.1"], ("001", "01", "1", "1.1", "1.10")),
        (["2", "NaN", "1", "-inf", "n/a"], ("1", "2")),  # bad rows
        (["2", "NaN", "x"], ("2", "NaN", "x")),
    ],
)
@pytest.mark.parametrize("separator", ",;\t")
def test_classes_are_read_sorted_and_recorded(tmp_path, found, labels, separator):
    csv(tmp_path, found, separator=separator)
    known = complete(task(), tmp_path, "minimal", "error")
    assert known.labels == labels
    assert task_from_table("own", known.to_table()) == known


def test_a_link_is_read_as_its_name_says(tmp_path):
    lines = [json.dumps({"text": "x", "queue": queue}) for queue in "abab"]
    (tmp_path / "blob").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "own.jsonl").symlink_to("blob")  # as the hub's cache has them
    how = FileTask("text", "queue")
    folder, known, _ = task_of_file(tmp_path / "own.jsonl", how, "minimal", "error")
    assert (folder, known.files, known.labels) == (tmp_path, {"train": "own.jsonl"}, ("a", "b"))


def test_several_labels_are_read_from_both_kinds_of_files(tmp_path):
    csv(tmp_path, ["b|a", "", " a ", "true"])
    lists = [["b", "a"], [], ["a"], [True]]
    records = [json.dumps({"text": "x", "queue": labels}) for labels in lists]
    (tmp_path / "a.jsonl").write_text("\n".join(records), encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        many = task(kind="multilabel", files={"train": name})
        many = complete(many, tmp_path, "minimal", "error")
        assert many.labels == ("a", "b", "true")
        expected = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
        assert read_rows(tmp_path / name, many).labels.tolist() == expected
    (tmp_path / "a.jsonl").write_text('{"text": "x", "queue": ["a|b"]}', encoding="utf-8")
    with pytest.raises(UserError, match="column 'queue' is "):
        read_rows(tmp_path / "a.jsonl", many)


def test_a_range_is_that_of_the_training_and_the_dev_file(tmp_path):
    csv(tmp_path, [2, "3.5", -1])
    csv(tmp_path, [7, 2], "b.csv")
    files = {"train": "a.csv", "dev": "b.csv"}
    known = task(kind="regression", files=files, dev_share=None)
    known = complete(known, tmp_path, "minimal", "error")
    assert (known.low, known.high) == (-1, 7)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classification", ["a", "a"], "column 'queue' has the label 'a' alone"),
        ("classification", range(100), "100 different labels in 100 rows"),
        ("regression", ["3", "3"], "has 3.0 in every row"),
        ("regression", ["a", "b"], "has no number, but 'a'"),
    ],
)
def test_labels_that_say_nothing_are_refused(tmp_path, kind, labels, message):
    csv(tmp_path, labels)
    with pytest.raises(UserError, match=message):
        complete(task(kind=kind), tmp_path, "minimal", "error")


def test_the_dev_part_has_its_share_of_each_class(tmp_path):
    csv(tmp_path, np.repeat(["a", "b", "c", "d"], [800, 180, 19, 1]))
    own = task(labels=["a", "b", "c", "d"])
    parts = {split: read_rows(tmp_path / "a.csv", own, split=split) for split in ("train", "dev")}
    assert np.bincount(parts["dev"].labels.astype(int)).tolist() == [80, 18, 2]
    assert np.bincount(parts["train"].labels.astype(int)).tolist() == [720, 162, 17, 1]
    texts = [set(rows.texts[0]) for rows in parts.values()]
    assert len(texts[0] | texts[1]) == 1000
    assert len(read_rows(tmp_path / "a.csv", own, split="dev", limit=7).ids) == 7
    half = replace(own, kind="multilabel", dev_share=0.5)
    assert len(read_rows(tmp_path / "a.csv", half, split="dev").ids) == 400 + 90 + 10


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_rows_with_equal_texts_are_in_one_part(tmp_path, kind):
    """Of 200 rows, half have one of ten texts, and one text has both labels."""
    texts = [f"text {i}" if i % 2 else f"again {i % 20 % 18}" for i in range(200)]
    labels = ["ab"[i > 100] if kind != "regression" else i for i in range(200)]
    rows = "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "a.csv").write_text(f"text,queue\n{rows}", encoding="utf-8")
    own = complete(task(kind=kind), tmp_path, "minimal", "error")
    train, dev = (read_rows(tmp_path / "a.csv", own, split=split) for split in ("train", "dev"))
    assert not set(train.texts[0]) & set(dev.texts[0])
    assert len(train.ids) + len(dev.ids) == 200 and 15 <= len(dev.ids) <= 20
    if kind == "classification":
        assert set(dev.labels) == {0, 1}


def test_a_class_of_two_texts_is_in_both_parts_and_one_text_is_in_none(tmp_path):
    (tmp_path / "a.csv").write_text("text,queue\n" + "x,a\ny,a\nz,b\n" * 10, encoding="utf-8")
    own = task(labels=["a", "b"])
    train, dev = (read_rows(tmp_path / "a.csv", own, split=split) for split in ("train", "dev"))
    assert (len(train.ids), len(dev.ids)) == (20, 10) and set(dev.labels) == {0}
    (tmp_path / "a.csv").write_text("text,queue\n" + "x,a\nz,b\n" * 10, encoding="utf-8")
    with pytest.raises(UserError, match="too few different texts for a dev split; name a dev"):
        read_rows(tmp_path / "a.csv", own, split="dev")


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_a_dev_file_that_is_the_training_file_is_refused(tmp_path, labels):
    csv(tmp_path, "abab")
    csv(tmp_path, "abab", "copy.csv")
    for dev in ("a.csv", "copy.csv"):
        own = task(files={"train": "a.csv", "dev": dev}, dev_share=None, labels=labels)
        with pytest.raises(UserError, match=f"{dev}: the dev file holds the same as the training"):
            complete(own, tmp_path, "minimal", "error")


def test_texts_that_are_all_empty_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,queue\n,a\n,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="every text in text is empty"):
        read_rows(tmp_path / "a.csv", task(labels=["a", "b"]))
