"""The paper's tables: what is in them, and a small study run, continued, reported and failing."""

import csv
import json
import shutil
import signal
import sys
from statistics import mean, stdev

import pytest
import torch
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.errors import RunError
from fastlora.files import read_toml
from fastlora.runs import session
from fastlora.runs.pages import NO_PLOTS
from fastlora.studies.paper_tables import COURSE, TABLES, Row, Table
from fastlora.training import setup
from fastlora.training.config import TrainConfig
from fastlora.training.loop import Trainer

SMALL = Table(
    "a small table",
    ("sst", "sts"),
    [
        Row("frozen", "frozen", "heads", {"mode": "frozen"}, {"sst": 0.001, "sts": 0.999}),
        Row("lora", "LoRA", "shared", {}, {"sst": 0.999}),
        Row("slow", "LoRA", COURSE, {"lr": 1e-5, "head_lr": 1e-5}),
    ],
)


def call(arguments, capsys):
    """Run `fastlora reproduce table2 ...`: exit code, output, errors."""
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "table2", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(TABLES, "table2", SMALL)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def flags(tiny_model, tiny_data):
    return ["--data", tiny_data, "--model", tiny_model, "--tokens-per-batch", 256, "--seeds", 2]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The folder of a small study of two seeds, and how often its encoder was loaded."""
    out, loads = tmp_path_factory.mktemp("studies"), []
    load = setup.load_encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "table2", SMALL)
        patch.setattr(setup, "load_encoder", lambda *given: loads.append(given) or load(*given))
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", "table2", *map(str, flags), "--out", str(out), "--quiet"])
    assert stop.value.code == 0
    return out, len(loads)


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(session, "_train", fail)


def results(out, row):
    files = sorted((out / "table2" / "rows" / row).glob("*/result.json"))
    return [json.loads(file.read_text()) for file in files]


def records(out):
    with (out / "table2" / "table2.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_are_the_papers():
    assert {name: len(table.rows) for name, table in TABLES.items()} == {
        "table1": 4,
        "table2": 13,
        "table3": 49,
        "table4": 49,
        "table5": 49,
    }
    for table in TABLES.values():
        assert len({row.name for row in table.rows}) == len(table.rows)
        *rows, last = table.rows
        for row in table.rows:
            TrainConfig(**row.changes)
            assert set(row.paper) <= set(table.tasks)
        assert last.variant == COURSE and last.changes["lr"] == last.changes["head_lr"] == 1e-5
        assert not last.paper
        for row in rows:  # not this library's defaults, which may change
            lora = row.changes.get("mode", "lora") == "lora"
            assert row.changes.get("lr") == (2e-3 if lora else None)
            assert ("targets" in row.changes) == lora
    given = {row.name: row.paper["sts"] for row in TABLES["table2"].rows if row.paper}
    assert given == {
        "r2-alpha16": 0.278,
        "r4-alpha16": 0.281,
        "r8-alpha16": 0.276,
        "r16-alpha16": 0.309,
        "r32-alpha16": 0.287,
        "r64-alpha32": 0.272,
    }
    best = [row for row in TABLES["table4"].rows if row.paper]
    assert {row.variant for row in best} == {"query and value, dropout 0.2"} and len(best) == 6


def test_a_study_is_run_folders_and_its_table(finished):
    out, loads = finished
    assert loads == 1
    folder = out / "table2"
    for row in ("frozen", "lora", "slow"):
        for seed in (0, 1):
            place = folder / "rows" / row / f"seed{seed}"
            assert read_toml(place / "run.toml")["seed"] == seed
            assert (place / "adapter" / "heads.json").is_file()
            assert not (place / "checkpoints").exists()
    frozen, lora, slow = records(out)
    scores = [result["scores"]["sst"] for result in results(out, "lora")]
    assert float(lora["sst"]) == mean(scores) and float(lora["sst std"]) == stdev(scores)
    assert (lora["sst paper"], lora["sts paper"], slow["sst paper"]) == ("0.999", "", "")
    heads = 5 * 33 + 2 * 32 + 2
    assert int(frozen["trainable"]) == heads
    assert int(lora["trainable"]) == heads + 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))
    text = (folder / "report.md").read_text()
    assert f"| {mean(scores):.4g} | {stdev(scores):.4g} | 0.999 |" in text
    assert (folder / "report.html").is_file() and (folder / "plots" / "table2.png").is_file()


def test_a_row_is_the_run_of_its_run_toml(finished, tmp_path):
    place = finished[0] / "table2" / "rows" / "lora" / "seed1"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(place / "run.toml"), "--out", str(tmp_path), "--quiet"])
    assert stop.value.code == 0
    for file in ("adapter_model.safetensors", "heads.safetensors"):
        ours, again = (load_file(run / "adapter" / file) for run in (place, tmp_path))
        assert all(torch.equal(ours[name], again[name]) for name in ours | again)


@pytest.mark.usefixtures("small", "no_training")
def test_a_second_call_reports_without_training(finished, flags, capsys):
    before = records(finished[0])
    code, printed, _ = call([*flags, "--out", finished[0]], capsys)
    assert code == 0 and records(finished[0]) == before
    assert "report in" in printed and "stopped" not in printed


@pytest.mark.usefixtures("small", "no_training")
def test_other_settings_are_refused(finished, flags, capsys):
    code, _, errors = call([*flags, "--out", finished[0], "--limit", 10], capsys)
    assert code == 2 and "setting limit (default -> 10)" in errors


@pytest.mark.usefixtures("small")
def test_an_interrupted_study_goes_on(finished, flags, tmp_path, capsys, monkeypatch):
    step = Trainer.step

    def interrupt(self, plan):
        if self.config.mode != "frozen" and self.progress.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        code, printed, _ = call([*flags[:-1], 1, "--out", tmp_path], capsys)
    assert code == 130 and "LoRA shared  seed 0  stopped, saved; the same command" in printed
    assert call([*flags[:-1], 1, "--out", tmp_path], capsys)[0] == 0
    log = (tmp_path / "table2" / "rows" / "lora" / "seed0" / "train.log").read_text()
    assert "continuing after step 4" in log
    for row in ("frozen", "lora", "slow"):
        assert results(tmp_path, row)[0]["scores"] == results(finished[0], row)[0]["scores"]


@pytest.mark.usefixtures("small")
def test_a_signal_while_scoring_starts_no_other_row(flags, tmp_path, capsys, monkeypatch):
    evaluate = Trainer.evaluate

    def interrupt(self):
        signal.raise_signal(signal.SIGINT)
        evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", interrupt)
    assert call([*flags, "--out", tmp_path], capsys)[0] == 130
    assert len(results(tmp_path, "frozen")) == 1
    assert len(list(tmp_path.glob("table2/rows/*/*/run.toml"))) == 1


@pytest.mark.usefixtures("small")
def test_a_failed_row_stops_no_other(finished, flags, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "table2" / "rows" / "lora" / f"seed{seed}")

    def fail(*_args, **_options):
        raise RunError("the loss diverged")

    monkeypatch.setattr(session, "_train", fail)
    code, printed, errors = call([*flags, "--out", tmp_path], capsys)
    assert code == 1 and "1 of the rows failed" in errors
    assert "LoRA shared  seed 1 failed: the loss diverged" in printed
    text = (tmp_path / "table2" / "report.md").read_text()
    assert "seed 1 failed: the loss diverged" in text
    assert [record["sst"] == "" for record in records(tmp_path)] == [False, True, False]


@pytest.mark.usefixtures("small", "no_training")
def test_without_matplotlib_the_report_says_so(finished, flags, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call([*flags, "--out", finished[0]], capsys)[0] == 0
    text = (finished[0] / "table2" / "report.md").read_text()
    assert NO_PLOTS in text and "plots/" not in text


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["tabel2"], 'Did you mean "table2"?'),
        (["--seed", "2"], "Did you mean --seeds?"),
        (["--seeds", "0"], "seeds is 0 (expected 1 or more)"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_exit_2_and_write_nothing(mistake, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = call(mistake, capsys)
    assert code == 2 and message in " ".join(errors.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = call([], capsys)
    assert code == 2 and "without torchrun" in errors
