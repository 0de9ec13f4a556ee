"""From one file to a model: what is found in the file, what is recorded, and mistakes."""

import json

import pytest

from fastlora.cli import main
from fastlora.data import infer
from fastlora.data.infer import FileTask, task_of_file
from fastlora.data.reading import read_rows
from fastlora.errors import UserError
from fastlora.files import read_toml
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs


def call(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def write(folder, labels, name="tickets.csv", separator=","):
    header = ["id", "the text", "queue"]
    rows = [header, *([str(i), f"good film {i}", str(x)] for i, x in enumerate(labels))]
    text = "".join(separator.join(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def find(file, **how):
    return task_of_file(
        file, FileTask(**{"text": "the text", "label": "queue", **how}), "minimal", "error"
    )


@pytest.mark.parametrize("separator", ",;\t")
def test_a_file_becomes_a_run_that_its_settings_repeat(tmp_path, tiny_model, capsys, separator):
    file = write(tmp_path, ["a bill", "bug"] * 20, separator=separator)
    flags = ["--model", tiny_model, "--device", "cpu", "--out", tmp_path / "run"]
    own = ["--text", "the text", "--label", "queue", "--class-weights", "auto"]
    dry = ["--dry-run"] if separator != ";" else []
    code, out, _ = call(["train", file, *own, *flags, *dry], capsys)
    assert code == 0
    words = {",": "commas", ";": "semicolons", "\t": "tabs"}[separator]
    assert f"{tmp_path} (the folder of tickets.csv, separated by {words})" in out
    assert "tickets: classification, queue (a bill or bug) from the text; metric accuracy; " in out
    assert "dev split: 10% of tickets.csv, stratified" in out
    assert "tickets 36 train, 4 dev" in out
    if not dry:
        settings = read_toml(tmp_path / "run" / "run.toml")
        assert settings["task"]["tickets"]["labels"] == ["a bill", "bug"]
        again = ["--config", tmp_path / "run" / "run.toml", "--out", tmp_path / "run"]
        code, out, _ = call(["train", *again], capsys)
        assert code == 0 and "this run is finished" in out
        # The run's own folder of data is that of eval.
        code, out, _ = call(["eval", tmp_path / "run"], capsys)
        assert code == 0 and f"on {tmp_path}" in out and "matthews" in out


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["1.0", "0"] * 3, "classification"),
        (["1.5", "0"] * 3, "regression"),
        (range(30), "regression"),
        (["1", "0", "x"] * 3, "classification"),
        (["1", "0", "nan"] * 3, "classification"),
        (["1.5", "0", "NaN", "inf"] * 3, "regression"),
    ],
)
def test_the_kind_is_found_in_the_labels(tmp_path, labels, kind):
    _, task, _ = find(write(tmp_path, labels))
    assert task.kind == kind and task.is_complete
    if "nan" in labels:
        with pytest.raises(UserError, match=r"csv:4: column 'queue' is 'nan' \(expected 0 or 1\)"):
            read_rows(tmp_path / "tickets.csv", task)


@pytest.mark.parametrize("text", ['[{"a": "x"},\n{"a": "y"}]', '[{"a": "x", "b": 1}]'])
def test_an_array_is_no_jsonl_file(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x.jsonl:1: .* \(expected one object on each line\)"):
        find(tmp_path / "x.jsonl")


def test_a_file_is_read_once_to_find_its_task(tmp_path, monkeypatch):
    count, read = [], infer.read_rows
    monkeypatch.setattr(infer, "read_rows", lambda *x, **y: count.append(x) or read(*x, **y))
    find(write(tmp_path, "abab"))
    assert len(count) == 1


def test_lists_are_several_labels(tmp_path):
    records = [{"the text": "good", "queue": x} for x in (["a", "b"], [], ["b"])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    _, task, separated = find(tmp_path / "x.jsonl", metric="micro_f1")
    assert (task.kind, task.labels, task.metric) == ("multilabel", ("a", "b"), "micro_f1")
    assert separated == "JSON lines"


def test_two_columns_are_a_pair_and_a_dev_file_may_lie_elsewhere(tmp_path):
    (tmp_path / "dev").mkdir()
    dev = write(tmp_path / "dev", "ab")
    file = write(tmp_path, "abab")
    folder, task, _ = find(file, text="the text,id", dev=dev)
    assert folder == tmp_path and task.is_pair and task.dev_share is None
    assert task.files == {"train": "tickets.csv", "dev": "dev/tickets.csv"}


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("My Tickets-train", "my_tickets"),
        ("train", "queue"),
        ("sst", "queue"),
        ("2024 type", "queue"),
    ],
)
def test_a_tasks_name_is_legal(tmp_path, stem, name):
    assert find(write(tmp_path, "abab", f"{stem}.csv"))[1].name == name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"text": None}, "has the columns id, the text, queue; name those of the texts"),
        ({"label": None}, "tickets.csv --text 'the text' --label queue"),
        (
            {"text": "the txt"},
            "no column 'the txt', but id, the text, queue; did you mean 'the text'",
        ),
        ({"label": "the text"}, "label is 'the text' (expected another column's name)"),
        ({"dev": "nowhere.csv"}, "nowhere.csv: no such file (expected that of the dev split)"),
        ({"kind": "regression", "class_weights": "auto"}, "key 'class_weights' of a regression"),
        ({"label": "id", "kind": "classification"}, "40 different labels in 40 rows"),
        ({"metric": "f1"}, "metric is 'f1' (expected accuracy, macro_f1"),
        ({"metric": "f1:c"}, "'c' is no class (expected a or b)"),
        ({"class_weights": "many"}, "class_weights is 'many' (expected \"auto\""),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, how, message):
    with pytest.raises(UserError) as error:
        find(write(tmp_path, "ab" * 20), **how)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file"),
        (["tickets.csv", "other.csv"], "other.csv: a second FILE, of which one is expected"),
        (["--tasks", "sst", "quora", "sts"], "a list has commas, as in --tasks sst,quora,sts"),
        (["."], ".: is a folder, which is given as --data"),
        (["--text", "a"], "--text needs a file: fastlora-train FILE.csv"),
        (["tickets.csv", "--tasks", "sst"], "leave out --tasks and --data"),
        (["tickets.csv", "--resume", "run"], "leave out FILE, --config and --out"),
    ],
)
def test_wrong_use_of_a_file_exits_2(tmp_path, capsys, monkeypatch, arguments, message):
    write(tmp_path, "abab")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(["train", *arguments], capsys)
    assert (code, out) == (2, "") and message in err
    code, _, err = call(["search", "--tasks", "sst", "quora"], capsys)
    assert code == 2 and "a list has commas, as in --tasks sst,quora,sts" in err


def test_files_may_lie_beside_the_settings(tmp_path, tiny_model):
    write(tmp_path, "abab")
    table = {"kind": "classification", "columns": ["the text"], "label": "queue"}
    table |= {"files": {"train": "tickets.csv"}, "dev_share": 0.5}
    config = TrainConfig(task={"tickets": table}, model=tiny_model, tasks=("tickets",))
    found = find_inputs(config, beside=tmp_path / "my.toml")
    assert found.folder == tmp_path and found.why_data == "my.toml lies beside the task files"


def test_several_labels_in_a_cell_need_a_kind(tmp_path):
    file = write(tmp_path, ["bill", "bug|bill", "bug", ""] * 10)
    message = r"the label 'bug.bill'; pass --kind multilabel if .*, --kind classification if one"
    with pytest.raises(UserError, match=message):
        find(file)
    assert find(file, kind="multilabel")[1].labels == ("bill", "bug")
    file = write(tmp_path, ["bill", "bug|bill"] * 20)
    assert find(file, kind="classification")[1].labels == ("bill", "bug|bill")
