"""The search: what it trains and leaves, what goes on and is pruned, continuing, ranks."""

import os
import signal
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.trial import Trial

from fastlora.cli import main
from fastlora.console import Log
from fastlora.errors import Diverged, Interrupted, RunError, UserError
from fastlora.files import read_json, read_toml
from fastlora.runs.folder import locked
from fastlora.runs.session import run_training
from fastlora.studies import search as module
from fastlora.studies.search import Search, open_journal, run_search, train_share
from fastlora.studies.truncation import low_rank, scores_by_rank, smallest_within_error
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import prepare
from fastlora.training.stopping import Stop

HOW = SearchConfig(trials=3)
GIVEN = {"lr": 2e-3, "targets": ("query", "value")}  # where searches start


@pytest.fixture(autouse=True, scope="module")
def small():
    """Fewer runs, and a journal that does not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHAPES", ("value", "query,value"))
        patch.setattr(module, "DROPOUTS", (0.0, 0.1))
        patch.setattr(module, "SEEDS", 2)
        patch.setattr(os, "fsync", lambda file: None)
        yield


def search(config, stop=None):
    run_search(config, find_inputs(config), HOW, True, stop or Stop())


@pytest.fixture(scope="module")
def searched(small, tiny_model, tiny_data, tmp_path_factory):
    """The configuration of a finished search, which tests leave as it is."""
    config = TrainConfig(
        **GIVEN,
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
    scores = scores_by_rank(trainer.model, setup.dev)
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
    facts, folder = read_json(searched.out / "search.json")["jointly"], searched.out
    seen = [trial["stage"] for trial in facts["trials"]]
    assert facts["trials"][0]["lr"] == 2e-3 and facts["trials"][0]["trial"] == 0
    assert (seen.count("rates"), seen.count("shapes")) == (3, 4) and seen.count("ranks") in (1, 2)
    assert [rank for rank, _ in facts["ranks"]] == [32, 16, 8, 4, 2, 1]
    best = read_toml(folder / "best.toml")
    assert best["r"] == facts["best"]["r"] and best["tasks"] == ["sts"]
    text = (folder / "report.md").read_text()
    assert "| rates | 0 | 0.002 |" in text and "(plots/jointly.png)" in text
    assert (folder / "report.html").is_file() and (folder / "plots" / "jointly.png").is_file()


def test_the_comparison_is_of_runs_on_dev_examples_that_chose_nothing(searched):
    given, found = read_json(searched.out / "search.json")["jointly"]["full_runs"]
    for row in (given, found):
        places = [searched.out / "runs" / row["setting"] / f"seed{seed}" for seed in range(2)]
        results = [read_json(place / "result.json")["scores"]["sts"] for place in places]
        assert row["sts"] == pytest.approx(np.mean(results)) and row["failed"] is None
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


def test_one_process_owns_a_search(searched):
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
        search(config, Stop(signal.SIGINT))


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "soon"], "'soon' is no time, such as 90s, 30m or 2h"),
        (["--budget", "0s"], "budget is '0:00:00' (expected more than 0 s)"),
        (["--trials", "0"], "trials is 0 (expected 1 to 18)"),
        (["--trials", "19"], "trials is 19 (expected 1 to 18)"),
        (["--mode", "full"], "search needs --mode lora"),
        (["--join"], "--join"),
        (["--adapters", "per-task", "--add-to", "runs/old"], "and no --add-to"),
    ],
)
def test_misuse(tiny_data, tiny_model, tmp_path, capsys, flags, message):
    where = ["--data", str(tiny_data), "--model", str(tiny_model), "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit) as exit:
        main(["search", *where, *flags])
    assert exit.value.code == 2 and message in capsys.readouterr().err


class Pretended:
    """Searches whose training takes no time: a score is a function of the settings."""

    def __init__(self, setup, folder, monkeypatch):
        self.setup, self.folder = setup, folder
        self.trained = []  # the configuration and the share of each short or longer run
        monkeypatch.setattr(module, "train_share", self.train_share)
        monkeypatch.setattr(module, "scores_by_rank", lambda *_: {8: (0.5, 0.0), 2: (0.5, 0.0)})
        monkeypatch.setattr(module, "run_row", self.run_row)

    def score(self, config):
        score = 0.5 + 0.1 * (config.targets == ("value",)) - 0.01 * config.dropout
        return score - abs(np.log(config.lr / 4e-3)) / 100

    def train_share(self, setup, share):
        scores = dict.fromkeys(setup.train, self.score(setup.config))
        self.trained.append((setup.config, share))
        return SimpleNamespace(model=None, progress=SimpleNamespace(scores=[{"scores": scores}]))

    def run_row(self, row, setup, *_):
        scores = dict.fromkeys(setup.train, self.score(setup.config))
        return {"setting": row.setting, **scores, "seconds": 1.0, "failed": None}

    def search(self, **how):
        return Search(self.setup, None, self.folder, replace(HOW, **how), Log(quiet=True))


@pytest.fixture
def pretended(tiny_config, tmp_path, monkeypatch):
    setup = prepare(config := tiny_config(tasks=("sts",), **GIVEN), find_inputs(config))
    return Pretended(setup, tmp_path, monkeypatch)


def settings(found):
    """The stages, settings and scores of all trials, in the order in which they were trained."""
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in found["trials"]]


def test_the_best_of_each_stage_is_found(pretended):
    found = pretended.search().run()
    assert found["best"] == {
        **{"lr": 4e-3, "warmup": 0.06, "r": 2, "dropout": 0.0, "targets": "value"},
    }
    assert [run["setting"] for run in found["full_runs"]] == ["given", "found"]
    ranks = [config for config, share in pretended.trained if share == 0.5]
    assert [(config.r, config.lr) for config in ranks] == [(32, 4e-3), (32, 2e-3)]


def test_halves_of_the_dev_examples_share_none(pretended):
    search = pretended.search()
    choosing, comparing = (set(search.dev(i)["sts"].ids) for i in (0, 1))
    assert not choosing & comparing
    assert choosing | comparing == set(search.setup.dev["sts"].ids)
    few = search.dev(0, 5)["sts"].ids
    assert set(few) < choosing and 4 <= len(few) <= 5


@pytest.mark.parametrize("nth", [2, 7])
def test_a_search_stopped_while_a_trial_gets_its_settings_has_the_same_end(
    pretended, tmp_path, monkeypatch, nth
):
    """Optuna records settings one by one, so that a trial may have only some of them."""
    expected = pretended.search().run()
    (tmp_path / "journal.log").unlink()
    suggest, calls = Trial._suggest, []

    def stop(self, *given):
        calls.append(given)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return suggest(self, *given)

    monkeypatch.setattr(Trial, "_suggest", stop)
    with pytest.raises(KeyboardInterrupt):
        pretended.search().run()
    again = pretended.search().run()
    assert again["best"] == expected["best"] and settings(again) == settings(expected)


def test_a_search_killed_as_it_gives_a_trial_up_has_the_same_end(pretended, tmp_path, monkeypatch):
    expected = pretended.search().run()
    (tmp_path / "journal.log").unlink()

    class Killed(module.optuna.TrialPruned):
        def __init__(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.optuna, "TrialPruned", Killed)
        pretended.search().run()
    assert settings(pretended.search().run()) == settings(expected)


@pytest.mark.parametrize("nth", [2, 9])
def test_a_search_interrupted_in_a_trial_has_the_same_end(pretended, tmp_path, monkeypatch, nth):
    expected = pretended.search().run()
    (tmp_path / "journal.log").unlink()
    pretended.trained.clear()

    def stop(*given):
        if len(pretended.trained) == nth:
            raise Interrupted
        return pretended.train_share(*given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "train_share", stop)
        pretended.search().run()
    again = pretended.search().run()
    assert again["best"] == expected["best"] and settings(again) == settings(expected)


def test_a_journal_that_ends_in_half_a_line_is_continued(pretended, tmp_path):
    best = pretended.search().run()["best"]
    file = tmp_path / "journal.log"
    content = file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 7):
        file.write_bytes(content[:size])
        assert pretended.search().run()["best"] == best


def test_a_journal_whose_writer_was_killed_is_opened_at_once(tmp_path):
    file = tmp_path / "journal.log"
    open_journal(file)._backend._lock.acquire()
    open_journal(file).create_new_study([1])


@pytest.mark.parametrize("line", [b"{", b"[]", b"4", b'{"lr": 4}', b"\xff"])
@pytest.mark.parametrize("number", [1, 3, 0])
def test_a_damaged_journal_is_refused_by_its_line(tmp_path, line, number):
    file = tmp_path / "journal.log"
    study = module.optuna.create_study(storage=open_journal(file))
    for i in range(4):
        study.set_user_attr("i", i)
    lines = file.read_bytes().splitlines()
    lines[number - 1] = line
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=rf"journal.log:{number or len(lines)}: .*new --out"):
        open_journal(file)


@pytest.mark.parametrize(("old", "new"), [(b'"study_name"', b'"name"'), (b":0,", b":99,")])
def test_an_entry_that_optuna_cannot_read_is_one_line(tmp_path, old, new):
    file = tmp_path / "journal.log"
    module.optuna.create_study(storage=open_journal(file))
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match=r"journal\.log: is damaged; use a new --out: "):
        open_journal(file)


def test_one_trial_in_three_goes_on(pretended, monkeypatch):
    # As they come: the first goes on, then whoever is the best so far, or in the best third.
    monkeypatch.setattr(module, "WARMUPS", ())
    scores = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    monkeypatch.setattr(pretended, "score", lambda config: scores.index(config.lr))
    found = pretended.search(trials=5).run()
    rates = [(trial["lr"], trial["share"]) for trial in found["trials"][:5]]
    both, first = 1 / 8, 1 / 16
    assert rates == [(2e-3, both), (4e-3, both), (1e-3, first), (8e-3, both), (5e-4, first)]


def test_a_budget_ends_the_short_runs(pretended, monkeypatch):
    clock = iter(range(0, 1000, 4))  # a short run takes four seconds or eight
    monkeypatch.setattr(module, "synchronized_time", lambda device: next(clock))  # of finished work
    for _ in range(2):  # a search that has ended needs no more
        found = pretended.search(budget=timedelta(seconds=36), trials=12).run()
        stages = [trial["stage"] for trial in found["trials"]]
        assert 1 < stages.count("rates") < 8 and 1 <= stages.count("shapes") < 4
        assert len(found["full_runs"]) == 2


def test_a_budget_too_small_says_what_is_needed(pretended):
    with pytest.raises(RunError, match=r"is 1 s, but 8 s are needed, as a full run takes 1;"):
        pretended.search(budget=timedelta(seconds=1)).run()


def test_a_run_that_diverges_is_the_worst(pretended, monkeypatch):
    def wild(config):
        if config.lr > 2e-3:
            raise Diverged
        return 0.5

    monkeypatch.setattr(pretended, "score", wild)
    found = pretended.search().run()
    assert found["best"]["lr"] == 2e-3
    assert min(trial["score"] for trial in found["trials"]) == module.DIVERGED


def test_a_stage_whose_trials_all_diverge_is_an_error(pretended, monkeypatch):
    def wild(*_):
        raise Diverged

    monkeypatch.setattr(module, "train_share", wild)
    with pytest.raises(RunError, match="all runs of the stage 'rates' diverged"):
        pretended.search().run()


def test_a_first_run_that_fails_is_an_error(pretended, monkeypatch):
    monkeypatch.setattr(module, "run_row", lambda *_: {"failed": "seed 0 failed: a full disk"})
    with pytest.raises(RunError, match="with the settings given, seed 0 failed: a full disk"):
        pretended.search().run()


def test_equal_scores_keep_the_settings_given(pretended, monkeypatch):
    monkeypatch.setattr(pretended, "score", lambda config: None)  # undefined, which counts as 0
    search = pretended.search()
    found = search.run()
    assert found["best"] == search.given and len(found["full_runs"]) == 2


def test_each_tasks_adapter(tiny_config, pretended):
    tasks, own = ("sst", "sts"), TaskLoraConfig(r=3)
    config = tiny_config(tasks=tasks, adapters="per-task", sts=own, **GIVEN)
    search(config)
    best, found = read_toml(config.out / "best.toml"), read_json(config.out / "search.json")
    assert best["adapters"] == "per-task" and best["r"] == 4
    for task in ("sst", "sts"):
        assert best[task] == {**found[task]["best"], "targets": best[task]["targets"]}
        alone = [config for config, _ in pretended.trained if config.tasks == (task,)]
        assert {own.task_settings(task).lr for own in alone} >= {2e-3, 4e-3}
    assert found["sts"]["trials"][0]["r"] == 3 and found["sst"]["trials"][0]["r"] == 4
