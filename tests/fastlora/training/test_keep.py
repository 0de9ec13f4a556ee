"""Which weights a run keeps, when it evaluates, and when it stops early."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastlora.errors import Interrupted, RunError, UserError
from fastlora.multitask.predictor import predict, scores_of
from fastlora.runs import session
from fastlora.runs.trained import load
from fastlora.training import loop
from fastlora.training.stopping import Stop


@pytest.fixture
def falling_scores(monkeypatch):
    """Dev scores of a run that overfits: the second evaluation is the best."""

    def scores(datasets, outputs):
        means = state.setdefault("left", [0.5, 0.9, 0.4, 0.3, 0.2, 0.1])
        return dict.fromkeys(datasets, means.pop(0))

    state = {}
    monkeypatch.setattr(loop, "scores_of", scores)
    return state


def run(config, **options):
    return session.run_training(config, quiet=True, **options)


def weights(folder):
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


def history(folder):
    return json.loads((folder / "result.json").read_text())["history"]


def test_a_run_keeps_the_weights_of_its_best_evaluation(tiny_config, tmp_path, falling_scores):
    # With a constant rate and no warmup, a step does not depend on the number of epochs.
    config = tiny_config(epochs=4, schedule="constant", warmup=0.0)
    result = run(config)
    falling_scores.clear()
    two = run(replace(config, epochs=2, out=tmp_path / "two"))
    assert (result.kept, result.steps) == (two.steps, 2 * two.steps)
    assert set(result.scores.values()) == {0.9}
    kept = weights(config.out)
    assert kept
    for name, value in weights(tmp_path / "two").items():
        assert torch.equal(value, kept[name]), name
    text = (config.out / "train.log").read_text()
    assert f"kept the weights of step {result.kept}" in text
    assert f"the last ones, of step {result.steps}" in text


def test_predictions_and_scores_are_those_of_the_kept_weights(tiny_config):
    config = tiny_config(epochs=4, lr=0.05, head_lr=0.05)
    result = run(config)
    setup = session.prepare(config, session.find_inputs(config))
    assert (
        result.kept
        == max(history(config.out), key=lambda entry: sum(entry["scores"].values()))["step"]
    )
    trained = load(config.out, "cpu")
    assert scores_of(setup.dev, predict(trained.model, setup.dev)) == result.scores


@pytest.mark.parametrize("after", [3, 8])
def test_a_run_that_continues_keeps_the_same_weights(tiny_config, tmp_path, monkeypatch, after):
    config = tiny_config(epochs=3, lr=0.05, head_lr=0.05, eval_every=4, patience=3)
    whole = run(config)
    second, stop = replace(config, out=tmp_path / "second"), Stop()
    step = loop.Trainer.step

    def interrupted(trainer, plan):
        result = step(trainer, plan)
        return result or trainer.progress.step + 1 == after

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    with pytest.raises(Interrupted):
        run(second, stop=stop)
    monkeypatch.undo()
    again = run(second)
    assert (again.kept, again.steps, again.scores) == (whole.kept, whole.steps, whole.scores)
    for name, value in weights(config.out).items():
        assert torch.equal(value, weights(second.out)[name]), name
    assert history(second.out) == history(config.out)


@pytest.mark.usefixtures("falling_scores")
def test_evaluations_between_epochs_and_patience(tiny_config):
    config = tiny_config(epochs=4, eval_every=2, patience=3)
    result = run(config)
    assert [entry["step"] for entry in history(config.out)] == [2, 4, 6, 8, 10]
    assert (result.kept, result.steps) == (4, 10)
    assert "stopped by --patience 3" in (config.out / "train.log").read_text()


@pytest.mark.usefixtures("falling_scores")
def test_the_best_checkpoint_must_be_there(tiny_config, monkeypatch):
    config = tiny_config(epochs=3)
    load_kept = loop.Trainer.load_kept

    def lose(trainer):
        best = trainer.progress.best["step"]
        shutil.rmtree(config.out / "checkpoints" / f"step-{best:06d}")
        return load_kept(trainer)

    monkeypatch.setattr(loop.Trainer, "load_kept", lose)
    with pytest.raises(RunError, match=r"step-.*checkpoint is missing .*--keep last"):
        run(config)
    monkeypatch.setattr(loop.Trainer, "load_kept", load_kept)
    result = run(replace(config, keep="last"))  # as the message says
    assert result.kept == result.steps
    with pytest.raises(UserError, match="finished, with keep 'last'"):
        run(config)


@pytest.mark.usefixtures("falling_scores")
def test_a_best_checkpoint_that_a_killed_process_left_is_kept(tiny_config, monkeypatch):
    config, save = tiny_config(eval_every=2, patience=3), loop.checkpoints.save_checkpoint

    def killed(folder, model, optimizer, scaler, progress, inputs):
        save(folder, model, optimizer, scaler, progress, inputs)
        if progress.step == 4:
            (folder / "step-000004").rename(folder / ".step-000004-abcdefgh")
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.checkpoints, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(loop.checkpoints, "save_checkpoint", save)
    assert run(config).kept == 4


def test_what_a_kill_in_the_last_save_left_is_removed(tiny_config, monkeypatch):
    config, save = tiny_config(max_steps=2), loop.checkpoints.save_checkpoint

    def killed(folder, *state):
        save(folder, *state)
        shutil.copytree(folder / "step-000002", folder / ".step-000002-abcdefgh.old")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.checkpoints, "save_checkpoint", killed)
        run(config)
    run(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-000002"]


def test_lora_plus_scales_the_rate_of_b(tiny_config):
    config = tiny_config(lora_plus=16.0, lr=1e-3)
    setup = session.prepare(config, session.find_inputs(config))
    model, *_ = session.build_model(setup, setup.inputs.tasks, config)
    rates = {}
    for group in loop.make_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["peak"]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert rates[id(parameter)] == (16e-3 if ".lora_B." in name else 1e-3)


@pytest.mark.parametrize("name", ["all", "all-linear"])
def test_all_targets(tiny_config, name):
    assert len(tiny_config(targets=(name,)).targets) == 6


@pytest.mark.parametrize("sampling", ["square", "0", "-1", "nan"])
def test_unknown_sampling(tiny_config, sampling):
    with pytest.raises(UserError, match="proportional, sqrt, uniform or a positive number"):
        tiny_config(sampling=sampling)


def test_the_untouched_encoder_is_beside_the_score(tiny_config):
    """The similarity head starts as the cosine, so a run that learns nothing scores the same."""
    config = tiny_config(lr=1e-30, head_lr=1e-30, tasks=("sst", "sts"), max_steps=1)
    result = run(config)
    table = json.loads((config.out / "result.json").read_text())["table"]
    header, rows = table
    untouched = {tuple(row[:2]): row[header.index("untouched encoder")] for row in rows}
    assert untouched["sst", "accuracy"] == "n/a"
    assert untouched["sts", "pearson"] == f"{result.scores['sts']:.3f}"
