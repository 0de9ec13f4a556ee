"""What a run keeps to go on with, and what it refuses to keep or to go on with."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlora import devices
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.runs.session import run_training
from fastlora.training.checkpoint import latest_checkpoint
from fastlora.training.loop import Trainer
from fastlora.training.stopping import Stop


def run(config, **options):
    return run_training(config, quiet=True, **options)


def before_step(monkeypatch, number, action):
    """Have something happen just before a run takes a step."""
    step = Trainer.step

    def patched(self, plan):
        if self.progress.step == number:
            action(self)
        return step(self, plan)

    monkeypatch.setattr(Trainer, "step", patched)


def losses(config):
    """The mean losses that a run logged, by step."""
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_mean_loss_has_the_steps_before_a_stop_in_it(tiny_config, tmp_path, monkeypatch):
    whole, parts = (tiny_config(out=tmp_path / name, max_steps=20) for name in ("whole", "parts"))
    whole, parts = (replace(config, tokens_per_batch=128) for config in (whole, parts))
    run(whole)
    stop = Stop()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_step(patch, 12, lambda _: setattr(stop, "asked", True))
        run(parts, stop=stop)
    assert latest_checkpoint(parts.out / "checkpoints").name == "step-000013"
    run(parts)
    assert losses(parts) == losses(whole) and list(losses(whole)) == [10, 20]


def test_a_full_disk_is_one_line(tiny_config, monkeypatch):
    config = tiny_config(max_steps=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(
        monkeypatch, 1, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    )
    try:
        with pytest.raises(RunError, match=r"checkpoints: cannot be written to: .*File too large"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_seconds_are_those_of_finished_work(tiny_config, monkeypatch):
    """The clock is read at log lines and checkpoints, and the device's work is waited for first."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: order.append("clock") or 0.0)
    devices.synchronized_time(torch.device("cuda"))
    assert order == ["synchronize", "clock"]
    monkeypatch.undo()
    times = iter(range(1000))
    monkeypatch.setattr(
        "fastlora.training.loop.synchronized_time", lambda device: float(next(times))
    )
    result = run(tiny_config(max_steps=15, tokens_per_batch=128))
    # From one reading to the next: steps 1 to 10, and 11 to 15.
    assert result.seconds == 2.0 and next(times) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_seconds_on_a_gpu_have_the_kernels_in_them(tiny_config, monkeypatch):
    cycles = 200_000_000  # about a tenth of a second
    before_step(monkeypatch, 3, lambda _: torch.cuda._sleep(cycles))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    result = run(tiny_config(max_steps=4, device="cuda"))
    assert result.seconds > 0.9e-3 * start.elapsed_time(end)


def test_joint_pairs_need_two_segments(tiny_config, tmp_path):
    import transformers

    config = tiny_config(pairs="joint")
    folder = tmp_path / "one-segment"
    settings = transformers.BertConfig.from_pretrained(config.model, type_vocab_size=1)
    transformers.BertModel(settings).save_pretrained(folder)
    shutil.copy(Path(config.model) / "vocab.txt", folder)
    with pytest.raises(UserError, match=r"tokens of type 1 .* use --pairs separate"):
        run(replace(config, model=str(folder)))
    assert not config.out.exists()


def test_a_run_goes_on_from_another_folder(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(max_steps=2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").symlink_to(config.model)
    monkeypatch.chdir(tmp_path / "here")
    first = run(replace(config, model="model"))
    monkeypatch.chdir(tmp_path)
    assert run(replace(config, model="here/model")) == first
