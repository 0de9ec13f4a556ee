"""Which folder, tasks and model a configuration means."""

from pathlib import Path

import pytest

from fastlora.data import DEMO
from fastlora.errors import UserError
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs

TICKETS = {
    "kind": "classification",
    "columns": ["text"],
    "label": "queue",
    "labels": ["billing", "bug"],
    "files": {"train": "tickets-train.csv", "dev": "tickets-dev.csv"},
}
SST = ("ids-sst-train.csv", "ids-sst-dev.csv")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("rank", "world"), [("1", None), ("0", "x"), ("-1", "2"), ("0", "")])
def test_a_wrong_environment_is_answered_at_once(rank, world, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"RANK is '{rank}' and WORLD_SIZE .* start with torchrun"):
        find_inputs(TrainConfig())


def test_paths_that_are_not_utf8_are_answered_at_once(here, minilm):
    files(here / "d\udce9", *SST)
    for settings in ({"data": here / "d\udce9"}, {"data": DEMO, "out": here / "\udcc3\udca9"}):
        assert "is not UTF-8" in refusal(minilm, **settings)


def files(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def find(minilm, **settings):
    return find_inputs(TrainConfig(model=str(minilm), **settings))


def refusal(minilm, **settings):
    with pytest.raises(UserError) as error:
        find(minilm, **settings)
    return str(error.value)


@pytest.mark.parametrize("missing", ["train", "dev"])
def test_a_declared_task_without_a_file_is_an_error(here, minilm, missing):
    files(here / "data", *SST, *(set(TICKETS["files"].values()) - {f"tickets-{missing}.csv"}))
    for data in (None, here / "data"):
        assert refusal(minilm, task={"tickets": TICKETS}, data=data) == (
            f"{here / 'data' / f'tickets-{missing}.csv'}: no such file (task 'tickets' needs it)"
        )
    # Built-in tasks are those that are there, and what --tasks names is all that is needed.
    assert list(find(minilm).tasks) == ["sst"]
    assert list(find(minilm, task={"tickets": TICKETS}, tasks=("sst",)).tasks) == ["sst"]
    files(here / "data", f"tickets-{missing}.csv")
    assert list(find(minilm, task={"tickets": TICKETS}).tasks) == ["sst", "tickets"]


def test_a_declared_test_file_is_there_too(here, minilm):
    """Else a misspelt name would be met after training."""
    files(here / "data", *SST, *TICKETS["files"].values())
    table = {**TICKETS, "files": {**TICKETS["files"], "test": "tickets-tset.csv"}}
    assert "tickets-tset.csv: no such file" in refusal(minilm, task={"tickets": table})
    files(here / "data", "tickets-tset.csv")
    assert "tickets" in find(minilm, task={"tickets": table}).tasks
    assert list(find(minilm, tasks=("sst",)).tasks) == ["sst"]  # the course's may be missing


def test_a_declared_task_is_never_looked_for_in_the_demo_corpus(here, minilm):
    path = here / "data" / "tickets-train.csv"
    assert refusal(minilm, task={"tickets": TICKETS}).startswith(f"{path}: no such file")
    assert find(minilm).folder == DEMO


def test_without_task_files_the_error_names_those_expected(here, minilm):
    files(here / "data", "ids-cfimdb-train.csv")
    assert find(minilm).folder == DEMO
    files(here / "data", "ids-cfimdb-dev.csv")
    message = refusal(minilm)
    assert message.startswith(f"{here / 'data'}: holds no task's files (expected some of ids-sst-")
    assert "quora-dev.csv" in message
    assert list(find(minilm, tasks=("cfimdb",)).tasks) == ["cfimdb"]
    assert "quora-train.csv: no such file (task 'quora'" in refusal(minilm, tasks=("quora",))


def test_paths_may_be_strings(here, minilm):
    files(here / "own", *SST)
    config = TrainConfig(data="own/", out="run", model=str(minilm))
    assert config == TrainConfig(data=Path("own"), out=Path("run"), model=str(minilm))
    assert find_inputs(config).folder == here / "own"
    assert TrainConfig(model=minilm) == TrainConfig(model=str(minilm))
    added = TrainConfig(add_to="old", adapters="per-task")
    assert added.add_to == Path("old")
    assert "no such folder" in refusal(minilm, data="nowhere")
