"""The search: ranks by truncation, stages, resuming, helping, and what it leaves."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from fastlora.cli import main
from fastlora.console import Log
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.files import read_toml
from fastlora.runs.session import run_training
from fastlora.studies import stages
from fastlora.studies.search import run_search
from fastlora.studies.stages import Search
from fastlora.studies.truncation import low_rank, smallest_within_error, sweep
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import prepare
from fastlora.training.side_by_side import side_by_side
from fastlora.training.stopping import Stop

HOW = SearchConfig(trials=3, together=2)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Fewer runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "SHAPES", ("value", "query,value"))
        patch.setattr(stages, "DROPOUTS", (0.0, 0.1))
        yield


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
    trainer = side_by_side(setup, [setup.config], Log(quiet=True))
    trained = np.mean(list(trainer.run().scores.values()))
    found = sweep(trainer, 0)
    assert sorted(found) == [1, 2, 4, 8, 16, 32]
    assert found[32][0] == pytest.approx(trained, abs=1e-4)
    assert len({score for score, _ in found.values()}) > 1
    best = max(found, key=lambda rank: found[rank][0])
    for rank, (value, error) in found.items():
        # Paired, so it is far below a score's own error.
        assert error < 0.2 and (error > 0) == (rank != best), (rank, value, error)
    A = trainer.model.encoder.encoder.layer[0].attention.self.query.lora_A["default@0"]
    assert torch.linalg.matrix_rank(A) == 1


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
    run_search(config, find_inputs(config), HOW, quiet=True)
    return config


def test_search_leaves_its_findings(searched):
    folder = searched.out
    facts = json.loads((folder / "search.json").read_text())["jointly"]
    stages_seen = [trial["stage"] for trial in facts["trials"]]
    assert stages_seen[:2] == ["defaults", "rates"] and "shapes" in stages_seen
    by_stage = {name: stages_seen.count(name) for name in stages_seen}
    assert (by_stage["defaults"], by_stage["rates"], by_stage["shapes"]) == (1, 3, 4)
    assert by_stage["ranks"] in (1, 2) and [rank for rank, _ in facts["ranks"]] == [
        32,
        16,
        8,
        4,
        2,
        1,
    ]
    assert {trial["state"] for trial in facts["trials"]} == {"complete", "pruned"}
    ours, theirs = facts["scores"]["best"], facts["scores"]["defaults"]
    assert len(ours) == len(theirs) and len(ours) in (1, 3)
    cost, trials = facts["cost"], facts["trials"]
    other_seeds = [t["seconds"] for t in trials if t["stage"] in ("final-1", "final-2")]
    assert len(other_seeds) == 2 * (len(ours) - 1)
    assert cost["compared"] == pytest.approx(sum(other_seeds))
    assert cost["all"] == pytest.approx(cost["count"] * cost["full"] + sum(other_seeds))
    assert cost["share"] == pytest.approx(sum(t["seconds"] for t in trials) / cost["all"])
    best = read_toml(folder / "best.toml")
    assert best["r"] == facts["best"]["r"] and best["tasks"] == ["sts"]
    text = (folder / "report.md").read_text()
    assert "Ranks, from one run" in text and "(plots/jointly.png)" in text
    assert (folder / "report.html").is_file() and list((folder / "plots").glob("*.png"))


def test_a_finished_search_trains_nothing_again(searched, monkeypatch):
    before = (searched.out / "search.json").read_text()
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    run_search(searched, find_inputs(searched), HOW, quiet=True)
    assert (searched.out / "search.json").read_text() == before


def test_best_toml_trains(searched, tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", f"{searched.out}/best.toml", "--out", str(tmp_path / "run")])
    assert exit.value.code == 0


def test_other_settings_need_another_folder(searched):
    other = replace(searched, r=2)
    with pytest.raises(UserError, match="other settings"):
        run_search(other, find_inputs(other), HOW, quiet=True)


def test_an_interrupted_search_goes_on(tiny_config, monkeypatch):
    config = tiny_config(tasks=("sts",))
    calls, run = [], Trainer.run

    def stop_second(self):
        calls.append(self)
        if len(calls) == 2:
            raise Interrupted
        return run(self)

    monkeypatch.setattr(Trainer, "run", stop_second)
    with pytest.raises(Interrupted):
        run_search(config, find_inputs(config), HOW, quiet=True)
    assert not (config.out / "search.json").exists()
    run_search(config, find_inputs(config), HOW, quiet=True)
    facts = json.loads((config.out / "search.json").read_text())["jointly"]
    states = [trial["state"] for trial in facts["trials"] if trial["stage"] == "rates"]
    assert len(states) == 3 and "fail" not in states
    journal = JournalStorage(JournalFileBackend(str(config.out / "journal.log")))
    trials = optuna.load_study(study_name="rates", storage=journal).trials
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 2  # queued again


def test_a_search_interrupted_while_it_cuts_ranks_goes_on(tiny_config, monkeypatch):
    config = tiny_config(tasks=("sts",))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "sweep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_search(config, find_inputs(config), HOW, quiet=True)
    run_search(config, find_inputs(config), HOW, quiet=True)
    assert "Ranks, from one run" in (config.out / "report.md").read_text()


def test_a_signal_while_scoring_stops_the_search(tiny_config, monkeypatch):
    config = tiny_config(tasks=("sts",))
    evaluate = Trainer.evaluate

    def signalled(self):
        signal.raise_signal(signal.SIGINT)
        evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", signalled)
        with pytest.raises(Interrupted):
            run_search(config, find_inputs(config), HOW, quiet=True, stop=Stop(signal.SIGINT))


def test_out_of_memory_says_what_to_lower(tiny_config, monkeypatch):
    config = tiny_config(tasks=("sts",))

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "run", full)
    with pytest.raises(RunError, match="lower --tokens-per-batch"):
        run_search(config, find_inputs(config), HOW, quiet=True)


def test_a_trial_that_another_process_gave_up_is_left_to_whoever_took_it(tiny_config, tmp_path):
    """A leader that is started again cannot know that a helper is still at a trial."""
    setup = prepare(config := tiny_config(tasks=("sts",)), find_inputs(config))
    helper = Search(setup, tmp_path, HOW, Log(quiet=True))
    study = helper.study("defaults")
    train = helper.train

    def given_up(study, group):
        if not study.get_trials(states=(TrialState.FAIL,)):
            Search(setup, tmp_path, HOW, Log(quiet=True))
        train(study, group)

    helper.train = given_up
    params = {"lr": 1e-3, "warmup": 0.1, "r": 2, "dropout": 0.0, "targets": "value", "seed": 0}
    helper.stage("defaults", [params])
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]


def test_equal_scores_are_no_significant_difference(tiny_config, tmp_path, monkeypatch):
    setup = prepare(config := tiny_config(tasks=("sts",)), find_inputs(config))
    search = Search(setup, tmp_path, HOW, Log(quiet=True))
    monkeypatch.setattr(Search, "stage", lambda self, name, *_: self.study(name))
    monkeypatch.setattr(stages, "value_of", lambda *_: 0.5)
    defaults = {"lr": 1e-3, "warmup": 0.1, "r": 2, "dropout": 0.0, "targets": "value", "seed": 0}
    found = search.compare(defaults, {**defaults, "r": 4})
    assert found.p_value == 1.0 and found.params == defaults


def test_another_number_of_trials_needs_another_folder(searched):
    with pytest.raises(UserError, match="holds a search of --trials 3"):
        run_search(searched, find_inputs(searched), replace(HOW, trials=5), quiet=True)


def test_a_search_and_a_run_do_not_share_a_folder(searched, tiny_config):
    with pytest.raises(UserError, match=r"other things \(no run.toml\)"):
        run_training(searched, quiet=True)
    config = tiny_config(tasks=("sts",), max_steps=1)
    run_training(config, quiet=True)
    with pytest.raises(UserError, match=r"other things \(no search.toml\)"):
        run_search(config, find_inputs(config), HOW, quiet=True)


def test_each_tasks_adapter(tiny_config):
    config = tiny_config(tasks=("sst", "sts"), adapters="per-task", sts=TaskLoraConfig(r=2))
    run_search(config, find_inputs(config), HOW, quiet=True)
    best = read_toml(config.out / "best.toml")
    facts = json.loads((config.out / "search.json").read_text())
    assert best["adapters"] == "per-task"
    for task in ("sst", "sts"):
        found = facts[task]["best"]
        assert best[task]["r"] == found["r"] and best[task]["lr"] == found["lr"]
    assert facts["sts"]["trials"][0]["r"] == 2


def test_a_budget_too_small_says_what_is_needed(tiny_config):
    config = tiny_config(tasks=("sts",))
    how = replace(HOW, budget=timedelta(seconds=0.01))
    with pytest.raises(RunError, match=r"--budget is 0 s.* s are needed"):
        run_search(config, find_inputs(config), how, quiet=True)


def test_short_runs_get_what_the_budget_leaves(tiny_config, tmp_path):
    config = tiny_config(tasks=("sts",))
    setup = prepare(config, find_inputs(config))
    search = Search(setup, tmp_path, SearchConfig(budget=timedelta(seconds=81)), Log(quiet=True))
    second = 10 / (96 + stages.SCORING * 24)
    scoring = second * stages.SCORING * 24 * 30 * (1 + 1 / 3)
    training = second * stages.WIDER * 96 * 30 * (0.125 + 0.25 / 3)
    assert search.rungs(full=10.0, short=30, later=2) == pytest.approx(
        [rung * (81 - 20 - scoring) / training for rung in (0.125, 0.25)]
    )
    search.how = SearchConfig(budget=timedelta(days=9))
    assert search.rungs(10.0, 30, 2) == [0.0625, 0.125]  # at most half of all examples


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
    command = [sys.executable, "-c", ONE_OF_TWO, "--", "search", "--quiet", "--together", "1"]
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
