"""The search: ranks by truncation, stages, continuing, helping, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastlora.cli import main
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.files import read_json, read_toml
from fastlora.runs.folder import locked
from fastlora.runs.session import run_training
from fastlora.studies import stages
from fastlora.studies.search import run_search
from fastlora.studies.stages import train_share
from fastlora.studies.truncation import low_rank, smallest_within_error, sweep
from fastlora.training.config import SearchConfig, TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import prepare
from fastlora.training.stopping import Stop

HOW = SearchConfig(trials=3)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Fewer runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SHAPES", ("value", "query,value"))
        patch.setattr(stages, "DROPOUTS", (0.0, 0.1))
        patch.setattr(stages, "SEEDS", 2)
        patch.setattr(os, "fsync", lambda file: None)  # an entry of the journal is one
        yield


def search(config, **options):
    run_search(config, find_inputs(config), HOW, quiet=True, **options)


def written(config, part="jointly"):
    return read_json(config.out / "search.json")[part]


@pytest.fixture(scope="module")
def searched(small, tiny_model, tiny_data, tmp_path_factory):
    """The configuration of a finished search, which tests leave as it is."""
    config = TrainConfig(
        r=4,
        tasks=("sts",),
        data=tiny_data,
        model=str(tiny_model),
        tokens_per_batch=256,
        device="cpu",
        out=tmp_path_factory.mktemp("search") / "run",
    )
    search(config)
    return config


def test_low_rank_is_the_best_approximation():
    torch.manual_seed(0)
    A, B = torch.randn(6, 20).double(), torch.randn(9, 6).double()
    for rank in (1, 3, 6, 8):
        low_A, low_B = low_rank(A, B, rank)
        assert low_A.shape == (min(rank, 6), 20) and low_B.shape == (9, min(rank, 6))
        U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
        expected = U[:, :rank] * S[:rank] @ V[:rank]
        torch.testing.assert_close(low_B @ low_A, expected)


def test_smallest_rank_within_its_error():
    assert smallest_within_error({8: (0.90, 0.0), 4: (0.895, 0.02), 2: (0.88, 0.01)}) == 4
    assert smallest_within_error({8: (0.9, 0.0), 1: (0.9, 0.0)}) == 1


def test_sweep_at_the_trained_rank_is_the_trained_model(tiny_config):
    setup = prepare(config := tiny_config(r=32, epochs=6, lr=1e-2), find_inputs(config))
    trainer = train_share(setup, 1.0)
    trained = np.mean(list(trainer.progress.scores[-1]["scores"].values()))
    scores = sweep(trainer.model, setup.dev)
    assert sorted(scores) == [1, 2, 4, 8, 16, 32]
    assert scores[32][0] == pytest.approx(trained, abs=1e-4)
    assert len({score for score, _ in scores.values()}) > 1
    best = max(scores, key=lambda rank: scores[rank][0])
    for rank, (value, error) in scores.items():
        # Paired, so it is far below a score's own error.
        assert error < 0.2 and (error > 0) == (rank != best), (rank, value, error)
    A = trainer.model.encoder.encoder.layer[0].attention.self.query.lora_A["default"]
    assert torch.linalg.matrix_rank(A) == 1


def test_a_search_leaves_what_it_found(searched):
    facts, folder = written(searched), searched.out
    seen = [trial["stage"] for trial in facts["trials"]]
    assert seen[0] == "defaults" and facts["trials"][0]["lr"] == 2e-3
    assert (seen.count("rates"), seen.count("shapes")) == (3, 4) and seen.count("ranks") in (1, 2)
    assert [rank for rank, _ in facts["ranks"]] == [32, 16, 8, 4, 2, 1]
    assert {trial["state"] for trial in facts["trials"]} == {"complete", "pruned"}
    assert facts["seconds"] == pytest.approx(sum(trial["seconds"] for trial in facts["trials"]))
    best = read_toml(folder / "best.toml")
    assert best["r"] == facts["best"]["r"] and best["tasks"] == ["sts"]
    text = (folder / "report.md").read_text()
    assert "Ranks, by truncation" in text and "(plots/jointly.png)" in text
    assert (folder / "report.html").is_file() and (folder / "plots" / "jointly.png").is_file()


def test_the_comparison_is_of_runs_on_dev_examples_that_chose_nothing(searched):
    scores = written(searched)["scores"]
    assert len(scores["defaults"]) == len(scores["best"]) == 2
    for row, values in scores.items():
        places = [searched.out / "runs" / row / f"seed{seed}" for seed in range(2)]
        results = [read_json(place / "result.json")["scores"]["sts"] for place in places]
        assert results == values
    dev = (searched.data / "sts-dev.csv").read_text().splitlines()[1:]
    ids = (places[0] / "predictions" / "sts-dev.csv").read_text().splitlines()[1:]
    assert len(ids) == len(dev) // 2


def test_a_finished_search_trains_nothing_again(searched, monkeypatch):
    before = (searched.out / "search.json").read_text()
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    search(searched)
    assert (searched.out / "search.json").read_text() == before


def test_best_toml_trains(searched, tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", f"{searched.out}/best.toml", "--out", str(tmp_path / "run")])
    assert exit.value.code == 0


def test_other_settings_need_another_folder(searched):
    with pytest.raises(UserError, match="the setting r "):
        search(replace(searched, r=2))


def test_one_process_leads_a_search(searched):
    with (
        locked(searched.out),
        pytest.raises(UserError, match=r"process \d+ on .* is running in it"),
    ):
        search(searched)


def test_a_signal_while_scoring_stops_the_search(tiny_config, monkeypatch):
    config = tiny_config(tasks=("sts",))
    evaluate = Trainer.evaluate

    def signalled(self):
        signal.raise_signal(signal.SIGINT)
        evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", signalled)
    with pytest.raises(Interrupted):
        search(config, stop=Stop(signal.SIGINT))


def test_out_of_memory_says_what_to_lower(tiny_config, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "run", full)
    with pytest.raises(RunError, match="lower --tokens-per-batch"):
        search(tiny_config(tasks=("sts",)))


def test_a_search_and_a_run_do_not_share_a_folder(searched, tiny_config):
    with pytest.raises(UserError, match=r"other things \(no run.toml\)"):
        run_training(searched, quiet=True)
    config = tiny_config(tasks=("sts",), max_steps=1)
    run_training(config, quiet=True)
    with pytest.raises(UserError, match=r"other things \(no search.toml\)"):
        search(config)


# `fastlora`, with fewer runs. A helper is ready when the leader's journal is there: nothing needs
# to last until it has imported PyTorch.
ONE_OF_TWO = """
import sys, time
from pathlib import Path
from fastlora.studies import search
from fastlora.runs import session
from fastlora.studies import stages
from fastlora.cli import main
stages.SHAPES, stages.DROPOUTS = ("value", "query,value"), (0.0, 0.1)
journal = Path(sys.argv[sys.argv.index("--out") + 1], "journal.log")
deadline = time.monotonic() + 60
while "--join" in sys.argv and not journal.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
main()
"""


@pytest.mark.slow
def test_two_processes_share_a_search(tiny_config):
    config = tiny_config(tasks=("sts",))
    command = [sys.executable, "-c", ONE_OF_TWO, "--", "search", "--quiet"]
    flags = {"tasks": "sts", "epochs": "3", "r": "4", "tokens-per-batch": "256", "device": "cpu"}
    flags |= {"data": str(config.data), "model": config.model, "out": str(config.out)}
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    leader, helper = (subprocess.Popen([*command, *more]) for more in ((), ("--join",)))
    assert (leader.wait(300), helper.wait(300)) == (0, 0)
    worked = [json.loads(line) for line in (config.out / "journal.log").read_text().splitlines()]
    assert len({line["worker_id"] for line in worked if "intermediate_value" in line}) == 2
    facts = json.loads((config.out / "search.json").read_text())["jointly"]
    assert {trial["state"] for trial in facts["trials"]} == {"complete", "pruned"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "soon"], 'unable to convert "soon" into timedelta'),
        (["--budget", "0s"], "budget is '0:00:00' (expected more than no time)"),
        (["--trials", "0"], "trials is 0"),
        (["--mode", "full"], "search finds LoRA settings"),
        (["--join"], "holds no search to help with"),
        (["--adapters", "per-task", "--add-to", "runs/old"], "adapters of a new run"),
    ],
)
def test_misuse(tiny_data, tiny_model, tmp_path, capsys, flags, message):
    where = ["--data", str(tiny_data), "--model", str(tiny_model), "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit) as exit:
        main(["search", *where, *flags])
    assert exit.value.code == 2 and message in capsys.readouterr().err
