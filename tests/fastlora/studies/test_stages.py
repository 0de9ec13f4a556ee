"""The stages of a search whose trials take no time: what is queued, stopped, continued, shared."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import Trial, TrialState

from fastlora.console import Log
from fastlora.errors import Diverged, Interrupted, RunError, UserError
from fastlora.files import read_json, read_toml
from fastlora.studies import search as search_module
from fastlora.studies import stages
from fastlora.studies.journal import open_journal
from fastlora.studies.search import findings_of, importance, run_search
from fastlora.studies.stages import Search
from fastlora.training.config import SearchConfig, TaskLoraConfig
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import prepare

HOW = SearchConfig(trials=3)
RANKED = [(8, (0.5, 0.0)), (2, (0.5, 0.0))]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer runs, and a journal that does not wait for the disk."""
    monkeypatch.setattr(stages, "SHAPES", ("value", "query,value"))
    monkeypatch.setattr(stages, "DROPOUTS", (0.0, 0.1))
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Pretended(Search):
    """A search whose scores are functions of the settings."""

    def outcome(self, stage, params, share):
        score = 0.5 + 0.1 * (params["targets"] == "value") - 0.01 * params["dropout"]
        score += abs(np.log(params["lr"] / 4e-3)) / -100 + params["seed"] / 1000
        scores = dict.fromkeys(self.setup.train, score)
        return {"scores": scores, "parameters": 8, "ranks": RANKED}


@pytest.fixture
def pretended(tiny_config, tmp_path):
    """A function that opens the search of this test's folder."""
    setup = prepare(config := tiny_config(tasks=("sts",)), find_inputs(config))
    log = Log(quiet=True)
    return lambda kind=Pretended, **how: kind(setup, tmp_path, replace(HOW, **how), log)


def plans(search):
    """The settings of all trials that did not fail, and their stages."""
    return sorted(f"{trial.user_attrs['stage']} {trial.params}" for trial in search.trials())


def test_halves_of_the_dev_examples_share_none(pretended):
    search = pretended()
    choosing, comparing = (set(search.dev(i)["sts"].ids) for i in (0, 1))
    assert not choosing & comparing
    assert choosing | comparing == set(search.setup.dev["sts"].ids)
    few = search.dev(0, 5)["sts"].ids
    assert set(few) < choosing and 4 <= len(few) <= 5


@pytest.mark.parametrize("nth", [2, 50])
def test_a_search_stopped_while_a_trial_gets_its_settings_has_the_same_end(
    pretended, tmp_path, monkeypatch, nth
):
    """Optuna records settings one by one, so that a trial may have only some of them."""
    best, expected = (whole := pretended()).lead(), plans(whole)
    (tmp_path / "journal.log").unlink()
    suggest, calls = Trial._suggest, []

    def stop(self, *given):
        calls.append(given)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return suggest(self, *given)

    monkeypatch.setattr(Trial, "_suggest", stop)
    with pytest.raises(KeyboardInterrupt):
        pretended().lead()
    assert (again := pretended()).lead() == best
    assert plans(again) == expected


@pytest.mark.parametrize("stage", ["shapes"])
def test_a_search_interrupted_in_a_trial_has_the_same_end(pretended, tmp_path, stage):
    class Stopped(Pretended):
        def outcome(self, where, *given):
            if where == stage:
                raise Interrupted
            return super().outcome(where, *given)

    best, expected = (whole := pretended()).lead(), plans(whole)
    (tmp_path / "journal.log").unlink()
    with pytest.raises(Interrupted):
        pretended(Stopped).lead()
    assert (again := pretended()).lead() == best
    assert plans(again) == expected


def test_a_trial_that_was_queued_again_is_left_to_whoever_took_it(pretended):
    """A leader that is started again cannot know that a helper is still at a trial."""

    class Slow(Pretended):
        def outcome(self, *given):
            pretended().lead()
            return super().outcome(*given)

    helper = pretended(Slow, join=True)
    helper.queue("defaults", [helper.defaults])
    assert helper.work()
    states = [trial.state for trial in helper.study.trials]
    assert states[:2] == [TrialState.FAIL, TrialState.COMPLETE]
    helper.help()  # returns at once: the search has ended


def test_a_helper_whose_trial_was_taken_trains_nothing(pretended, monkeypatch):
    helper, other = pretended(join=True), pretended(join=True)
    helper.queue("defaults", [helper.defaults])
    trials = helper.trials

    def taken_at_once(*given):
        waiting = trials(*given)
        other.study.ask(other.space)
        return waiting

    monkeypatch.setattr(helper, "trials", taken_at_once)
    assert not helper.work()
    assert [trial.state for trial in helper.study.trials] == [TrialState.RUNNING, TrialState.FAIL]


def test_a_journal_that_ends_in_half_a_line_is_continued(pretended, tmp_path):
    best = pretended().lead()
    file = tmp_path / "journal.log"
    content = file.read_bytes()
    for size in (len(content) - 1, len(content) * 2 // 3, len(content) // 3, 7):
        file.write_bytes(content[:size])
        assert pretended().lead() == best


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"op_code": 4}', b"\xff"])
@pytest.mark.parametrize("number", [1, 5, 0])
def test_a_damaged_journal_is_refused_by_its_line(tmp_path, line, number):
    file = tmp_path / "journal.log"
    study = stages.optuna.create_study(storage=open_journal(file))
    study.enqueue_trial({"lr": 1.0})
    study.ask({"lr": stages.FloatDistribution(1.0, 2.0)})
    for _ in range(3):
        study.set_user_attr("ended", True)
    lines = file.read_bytes().splitlines()
    assert len(lines) > 5
    lines[number - 1] = line
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=rf"journal.log:{number or len(lines)}: .*another --out"):
        open_journal(file)


def test_the_journals_lock_shows_its_age_where_out_is_relative(tmp_path, monkeypatch):
    """Optuna takes over a lock by its age, which a broken link does not have."""
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    storage = open_journal(Path("s/journal.log"))
    storage._backend._lock.acquire()
    assert Path("s/journal.log.lock").stat()


def test_one_trial_in_three_goes_on(pretended):
    class Numbered(Pretended):
        def outcome(self, stage, params, share):
            lr = params["lr"]
            return {**super().outcome(stage, params, share), "scores": {"sts": scores.index(lr)}}

    # As they come: the first goes on, then whoever is the best so far, or in the best third.
    scores = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    search = pretended(Numbered, trials=5)
    search.lead()
    rungs = [len(trial.intermediate_values) for trial in search.trials(stage="rates")]
    assert search.values["lr"] == [2e-3, 4e-3, 1e-3, 8e-3, 5e-4]
    assert rungs == [2, 2, 1, 2, 1]


def test_a_budget_ends_the_short_runs(pretended):
    class Timed(Pretended):
        def outcome(self, stage, params, share):
            return {**super().outcome(stage, params, share), "seconds": 8 * share}

    search = pretended(Timed, budget=timedelta(seconds=71), trials=12)
    search.lead()
    trained = [t.user_attrs["stage"] for t in search.trials() if t.intermediate_values]
    assert 1 <= trained.count("rates") < 8 and 1 <= trained.count("shapes") < 4
    assert trained.count("best") == 3
    search.lead()  # a search that has ended needs no more


def test_a_budget_too_small_says_what_is_needed(pretended):
    with pytest.raises(RunError, match=r"--budget is 1 s, but a full run takes .* are needed"):
        pretended(budget=timedelta(seconds=1)).set_limits(60.0)


def test_more_trials_than_planned_are_drawn(pretended):
    search = pretended(trials=17)
    search.lead()
    rates = [trial.params for trial in search.trials(stage="rates")]
    assert len(rates) == 17 and len({(trial["lr"], trial["warmup"]) for trial in rates}) == 17
    assert {trial["r"] for trial in rates} == {4}
    assert all(5e-4 <= trial["lr"] <= 8e-3 for trial in rates)


def test_a_run_that_diverges_is_the_worst(pretended):
    class Wild(Pretended):
        def outcome(self, stage, params, share):
            if params["lr"] > 2e-3:
                raise Diverged
            return super().outcome(stage, params, share)

    search = pretended(Wild)
    assert search.lead()["lr"] == 2e-3
    assert min(trial.value for trial in search.trials(stage="rates")) == stages.NO_SCORE


def test_a_stage_without_a_score_is_an_error(pretended):
    class Constant(Pretended):
        def outcome(self, *given):
            return {**super().outcome(*given), "scores": {"sts": None}}

    with pytest.raises(RunError, match="no run of the stage 'defaults' has a score"):
        pretended(Constant).lead()


def test_equal_scores_are_no_difference_and_keep_the_settings_given(pretended):
    class Even(Pretended):
        def outcome(self, stage, *given):
            scores = {} if stage in stages.RUNGS else {"scores": {"sts": 0.5}}
            return {**super().outcome(stage, *given), **scores}

    search = pretended(Even)
    found = findings_of(search, search.lead())
    assert found["p_value"] == 1.0 and found["best"] == search.defaults
    assert found["scores"] == {"best": [0.5] * 3, "defaults": [0.5] * 3}


def test_importance_is_that_of_the_setting_that_decides():
    trials = [
        {"lr": lr, "warmup": warmup, "rungs": [lr + 0.01 * warmup]}
        for lr in (0.1, 0.2, 0.3, 0.4, 0.5)
        for warmup in (0.0, 0.1)
    ]
    shares = importance(trials, ("lr", "warmup"))
    assert shares["lr"] > 0.9 and sum(shares.values()) == pytest.approx(1)


def test_each_tasks_adapter(tiny_config, monkeypatch):
    monkeypatch.setattr(search_module, "Search", Pretended)
    config = tiny_config(tasks=("sst", "sts"), adapters="per-task", sts=TaskLoraConfig(r=2))
    run_search(config, find_inputs(config), HOW, quiet=True)
    best, found = read_toml(config.out / "best.toml"), read_json(config.out / "search.json")
    assert best["adapters"] == "per-task"
    for task in ("sst", "sts"):
        for key in ("r", "lr", "warmup", "dropout"):
            assert best[task][key] == found[task]["best"][key]
    assert found["sts"]["trials"][0]["r"] == 2 and found["sst"]["trials"][0]["r"] == 4
