"""Whole runs on a tiny model: learning, precision, resuming, reloading, parallel ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastlora.console import Log
from fastlora.data.token_cache import load_tasks
from fastlora.devices import local_device
from fastlora.errors import RunError, UserError
from fastlora.multitask.predictor import predict, scores_of
from fastlora.runs import session
from fastlora.runs.trained import load, merge_encoder
from fastlora.training import loop as train
from fastlora.training.checkpoint import Progress, latest_checkpoint, save_checkpoint
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.metrics_log import Metrics
from fastlora.training.optimizer import schedule
from fastlora.training.setup import build_model, prepare
from fastlora.training.stopping import Stop


def run(config, **options):
    return session.run_training(config, quiet=True, **options)


def final(folder):
    return {
        str(file.relative_to(folder)): load_file(file)
        for file in sorted((folder / "adapter").rglob("*.safetensors"))
    }


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for file in a:
        for name in a[file]:
            torch.testing.assert_close(a[file][name], b[file][name], rtol=0, atol=atol)


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("mode", ["lora", "frozen", "full"])
def test_training_lowers_the_loss(tiny_config, mode):
    config = tiny_config(mode=mode, epochs=8, lr=2e-3, head_lr=5e-3)
    result = run(config)
    losses = [line["loss"] for line in logged(config.out) if "loss" in line]
    for task in ("sst", "quora", "sts"):
        assert np.mean([x[task] for x in losses[-3:]]) < np.mean([x[task] for x in losses[:3]])
    assert set(result.scores) == {"sst", "quora", "sts"}
    assert result.examples == 8 * 3 * 96


def test_run_folder(tiny_config):
    config = tiny_config(epochs=1)
    run(config)
    names = {str(p.relative_to(config.out)) for p in config.out.rglob("*") if p.is_file()}
    for name in (
        "run.toml",
        "env.json",
        "metrics.jsonl",
        "train.log",
        "result.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/heads.safetensors",
        "adapter/heads.json",
        "predictions/sst-dev.csv",
    ):
        assert name in names
    assert any(name.startswith("tensorboard/") for name in names)
    assert not [name for name in names if Path(name).name.startswith(".")]
    assert len((config.out / "predictions/sts-dev.csv").read_text().splitlines()) == 25


def test_lora_leaves_the_encoder_bit_identical(tiny_config):
    config = tiny_config()
    run(config)
    trained = load(config.out, "cpu")
    before = load_file(Path(config.model) / "model.safetensors")
    after = dict(trained.model.encoder.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("mode", "adapters"),
    [("lora", kind) for kind in ("shared", "per-task", "shared+per-task")]
    + [("frozen", "shared"), ("full", "shared")],
)
def test_reloading_gives_the_same_predictions(tiny_config, mode, adapters, monkeypatch):
    config, ends = tiny_config(mode=mode, adapters=adapters, lr=5e-3), []
    finish = session._finish
    monkeypatch.setattr(session, "_finish", lambda *a: ends.append(a[0].outputs) or finish(*a))
    result = run(config)
    trained = load(config.out, "cpu")
    data = load_tasks(config.data, trained.tasks.values(), "dev", trained.tokenizer)
    outputs = predict(trained.model, data)
    for name, own in data.items():
        saved = (config.out / f"predictions/{name}-dev.csv").read_text().splitlines()[1:]
        column = [float(line.split(",")[1]) for line in saved]
        again = outputs[name].argmax(-1) if own.task.outputs > 1 else outputs[name][:, 0].clip(0, 5)
        np.testing.assert_allclose(column, again, atol=1e-4)
        np.testing.assert_array_equal(outputs[name], ends[0][name])
    assert result.scores == scores_of(data, outputs)


def test_same_configuration_gives_the_same_run(tiny_config, tmp_path):
    a, b = tiny_config(out=tmp_path / "a"), tiny_config(out=tmp_path / "b")
    run(a)
    run(b)
    assert_same(final(a.out), final(b.out))


@pytest.mark.parametrize("mode", ["lora", "frozen"])
def test_interrupted_run_continues_bit_for_bit(tiny_config, tmp_path, monkeypatch, mode):
    whole = tiny_config(out=tmp_path / "whole", epochs=2, mode=mode)
    run(whole)
    parts = tiny_config(out=tmp_path / "parts", epochs=2, mode=mode)
    step = train.Trainer.step

    def interrupt(self, plan):
        if self.progress.step in (3, 20):
            signal.raise_signal(signal.SIGTERM)
        return step(self, plan)

    monkeypatch.setattr(train.Trainer, "step", interrupt)
    for expected in (4, 21):
        with pytest.raises(train.Interrupted):
            run(parts, stop=Stop(signal.SIGTERM))
        assert latest_checkpoint(parts.out / "checkpoints").name == f"step-{expected:06d}"
    run(parts)
    assert_same(final(whole.out), final(parts.out))
    steps = [line["step"] for line in logged(parts.out) if "loss" in line]
    assert steps == sorted(set(steps))


def _commanded(config: TrainConfig) -> TrainConfig:
    """The settings of `_command`."""
    return replace(config, r=8, save_every=3, tokens_per_batch=128)


def _command(config: TrainConfig) -> list[str]:
    flags = {
        "--data": config.data,
        "--model": config.model,
        "--out": config.out,
        "--epochs": config.epochs,
        "--save-every": 3,
        "--tokens-per-batch": 128,
        "--device": "cpu",
    }
    given = [str(part) for flag in flags.items() for part in flag]
    return [sys.executable, "-m", "fastlora.cli", "train", "--quiet", *given]


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(tiny_config, tmp_path):
    """kill -9 at some step, then the same command."""
    whole = _commanded(tiny_config(out=tmp_path / "whole", epochs=2))
    killed = replace(whole, out=tmp_path / "killed")
    run(whole)
    for steps in (4, 11):
        process = subprocess.Popen(_command(killed), cwd=tmp_path)
        while (last := latest_checkpoint(killed.out / "checkpoints")) is None or (
            int(last.name.split("-")[1]) < steps
        ):
            assert process.poll() is None, "ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run(_command(killed), check=True, cwd=tmp_path)
    assert_same(final(whole.out), final(killed.out))


@pytest.mark.slow
def test_a_process_without_examples_in_the_first_step(tiny_config, two_ranks):
    """In fp16, whose scaling starts at the first loss."""
    command = [*_command(tiny_config()), "--precision", "fp16", "--max-steps", "3"]
    command[command.index("--tokens-per-batch") + 1] = "1"
    two_ranks(command, "29512")


@pytest.mark.slow
def test_two_processes_equal_one_that_takes_the_same_parts(tiny_config, tmp_path):
    """Dropout on: a part's masks do not depend on which process computes it."""
    one, two = tiny_config(out=tmp_path / "one"), tiny_config(out=tmp_path / "two")
    run(replace(_commanded(one), accumulate=2))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    command = [sys.executable, *launch, "-m", "fastlora.cli", "--", *_command(two)[3:]]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert_same(final(one.out), final(two.out), atol=1e-5)


def _without_dropout(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_accumulation_equals_the_whole_batch(tiny_config, tmp_path):
    model = str(_without_dropout(Path(tiny_config().model), tmp_path / "model"))
    runs = []
    for parts in (1, 3):
        config = tiny_config(dropout=0.0, model=model, accumulate=parts, out=tmp_path / str(parts))
        run(config)
        runs.append(final(config.out))
    assert_same(*runs, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_half_precision_trains_fp32_masters(tiny_config, precision, mode):
    config = tiny_config(precision=precision, mode=mode, epochs=4, lr=2e-3)
    run(config)
    losses = [line["loss"]["quora"] for line in logged(config.out) if "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    for tensors in final(config.out).values():
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_compiled_run_trains(tiny_config, tmp_path):
    plain = run(tiny_config(max_steps=4, lr=1e-3))
    compiled = run(tiny_config(max_steps=4, lr=1e-3, compile=True, out=tmp_path / "compiled"))
    assert compiled.steps == plain.steps == 4
    logs = [logged(tmp_path / name) for name in ("run", "compiled")]
    for task, loss in logs[0][0]["loss"].items():
        assert logs[1][0]["loss"][task] == pytest.approx(loss, rel=0.2)  # other dropout masks


def test_divergence_is_a_run_error(tiny_config):
    with pytest.raises(RunError, match=r"diverged by step 10 .*lower --lr"):
        run(tiny_config(mode="full", lr=1e30, head_lr=1e30, warmup=0.0, epochs=3, clip=1e30))


def test_a_run_of_a_version_without_an_option_goes_on(tiny_config):
    config = tiny_config()
    run(config)
    file = config.out / "run.toml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("compile")))
    assert file.read_text().count("\n") == len(lines) - 1
    run(config)
    with pytest.raises(UserError, match=r"the setting compile \(default -> true\)"):
        run(replace(config, compile=True))


def test_another_configuration_does_not_touch_a_run(tiny_config):
    config = tiny_config()
    run(config)
    before = final(config.out)
    with pytest.raises(UserError, match=r"the setting seed \(default -> 1\)"):
        run(replace(config, seed=1))
    assert_same(before, final(config.out))


def test_foreign_folder_is_refused(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things \(no run.toml\)"):
        run(tiny_config())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_dry_run_writes_nothing(tiny_config, tmp_path):
    assert run(tiny_config(), dry_run=True) is None
    assert not (tmp_path / "run").exists()


def test_finished_run_is_reported_again(tiny_config):
    config = tiny_config()
    first = run(config)
    assert run(config) == first


def test_damaged_checkpoint_is_passed_over(tiny_config):
    config = tiny_config(epochs=2)
    run(config)
    newest = latest_checkpoint(config.out / "checkpoints")
    file = newest / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    older = latest_checkpoint(config.out / "checkpoints")
    assert older is not None and older < newest
    file.unlink()
    os.mkfifo(file)  # which would never end
    assert latest_checkpoint(config.out / "checkpoints") == older


def test_merged_encoder_loads_in_transformers(tiny_config, tmp_path):
    import transformers

    config = tiny_config(lr=5e-3)
    run(config)
    trained = load(config.out, torch.device("cpu"))
    merge_encoder(trained, None, tmp_path / "merged")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found = theirs(ids).last_hidden_state
        expected = trained.model.encoder(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapters", ["per-task", "shared+per-task"])
def test_merge_asks_which_adapter(tiny_config, tmp_path, adapters):
    config = tiny_config(adapters=adapters, lr=2e-2)
    run(config)
    trained = load(config.out, "cpu")
    with pytest.raises(UserError, match="expected one of sst, quora, sts"):
        merge_encoder(trained, None, tmp_path / "merged")
    merge_encoder(trained, "sts", tmp_path / "merged")


def test_epochs_are_planned_as_they_come(tiny_config, monkeypatch):
    planned = []
    plan = train.plan_epoch

    def counting(data, tokens, seed, epoch, sampling):
        planned.append(epoch)
        assert len(planned) < 300
        return plan(data, tokens, seed, epoch, sampling)

    monkeypatch.setattr(train, "plan_epoch", counting)
    result = run(tiny_config(epochs=10**9, max_steps=1, accumulate=10**9))
    assert result.steps == 1 and planned == [0, 0]
    planned.clear()
    setup = prepare(tiny_config(epochs=10**9), find_inputs(tiny_config()))
    model, *_ = build_model(setup, setup.inputs.tasks, setup.config)
    trainer = train.Trainer(setup, model, None, World(setup.device), Log(quiet=True))
    mean = np.mean([len(trainer.plan(epoch)) for epoch in range(100)])
    assert trainer.total == round(mean * 10**9)
    planned.clear()
    trainer.config = tiny_config(epochs=10**9, max_steps=10**5)  # after the epochs that are counted
    assert trainer.count_steps() == 10**5


def test_schedules():
    config = TrainConfig(warmup=0.1)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert factors[10] == 1.0 and factors[99] == pytest.approx(1 / 90)
    assert schedule(replace(config, schedule="constant"), 99, 100) == 1.0
    cosine = [schedule(replace(config, schedule="cosine"), s, 100) for s in (10, 55, 99)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


def test_the_newest_checkpoint_is_that_of_most_steps(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    (tmp_path / ".step-000007-killed").mkdir()
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, model, optimizer, scaler, Progress(step=step), {})
    assert latest_checkpoint(tmp_path).name == "step-1000001"
    assert {path.name for path in tmp_path.iterdir()} == {"step-1000000", "step-1000001"}


def test_half_a_line_of_a_killed_process_is_cut_away(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": {"sst": 1.2}')
    Metrics(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_evaluation_that_no_checkpoint_has_is_removed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": {}}\n{"step": 5, "dev": {}}\n')
    Metrics(tmp_path, 5, scored=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 5, "loss": {}}\n'


@pytest.mark.parametrize("damage", [b"\0\0\0", b"5", b"[]", b"\xff{", b'{"step": "x"}', b"{}"])
def test_damaged_lines_of_the_metrics_are_left_out(tmp_path, damage):
    notes, file = [], tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 9}\n')
    Metrics(tmp_path, 5, notes.append).close()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert notes == [f"{file}: damaged lines are left out (1)"]


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="device is 'cuda:1' but PyTorch finds 1 CUDA GPUs here"):
        local_device("cuda:1")


def test_names_that_modules_use_are_refused(tiny_config):
    table = {
        "kind": "classification",
        "columns": ["sentence"],
        "label": "sentiment",
        "labels": ["0", "1", "2", "3", "4"],
        "files": {"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv"},
    }
    config = tiny_config(tasks=("type",), task={"type": table})
    with pytest.raises(UserError, match="task 'type': PyTorch's modules use this name"):
        run(config)
    assert not config.out.exists()
