"""What decides a run's memory: recomputed layers, and what happens when it runs out."""

import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.console import Log
from fastlora.multitask.model import MultitaskBert
from fastlora.runs import session
from fastlora.training import loop as train
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import build_model, prepare, to_compute


def run(config):
    return session.run_training(config, quiet=True)


def trained(config):
    files = sorted((config.out / "adapter").rglob("*.safetensors"))
    return {f"{file.name} {name}": t for file in files for name, t in load_file(file).items()}


def forward_and_backward(config):
    """The gradients by name of one step, and the bytes kept from its forward to its backward."""
    setup = prepare(config, find_inputs(config))
    model, _, _ = build_model(setup, setup.inputs.tasks, setup.config)
    to_compute(model, setup.config, setup.device)
    trainer = train.Trainer(setup, model, config.out, World(setup.device), Log(quiet=True))
    trainer.seed_part(0, 1)
    model.train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.loss(*trainer.gather(trainer.plan(0)[0]))
    loss.backward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(kept.values())


@pytest.mark.parametrize(
    ("mode", "precision", "adapters"),
    [("full", "bf16", "shared")]
    + [("lora", p, a) for p in ("fp32", "bf16") for a in ("shared", "per-task", "shared+per-task")],
)
def test_recomputed_layers_give_the_same_gradients(tiny_config, mode, precision, adapters):
    """All dropouts on, in bits; and what is kept for backward shrinks to the layers' inputs."""
    config = tiny_config(mode=mode, precision=precision, adapters=adapters)
    expected, all_kept = forward_and_backward(config)
    found, kept = forward_and_backward(replace(config, grad_checkpoint=True))
    assert found.keys() == expected.keys()
    assert any("heads." in name for name in found) and any("encoder." in name for name in found)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert kept < all_kept / 4


def test_a_run_may_go_on_with_recomputed_layers(tiny_config, tmp_path):
    whole = tiny_config(epochs=2, out=tmp_path / "whole")
    run(whole)
    parts = tiny_config(epochs=2, out=tmp_path / "parts", save_every=4)
    step = train.Trainer.step

    def full_memory(self, plan):
        if self.progress.step == 7:
            raise KeyboardInterrupt
        return step(self, plan)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "step", full_memory)
        run(parts)
    run(replace(parts, grad_checkpoint=True))
    for name, tensor in trained(whole).items():
        assert torch.equal(trained(parts)[name], tensor)


def no_memory_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    "allocate", [no_memory_on_a_gpu, lambda: torch.empty(2**55), lambda: np.empty(2**55)]
)
def test_out_of_memory_is_one_line_and_exit_code_1(tiny_config, monkeypatch, capsys, allocate):
    monkeypatch.setattr(train.Trainer, "loss", lambda self, *share: allocate())
    config = tiny_config()
    given = ["--model", config.model, "--data", config.data, "--out", config.out, "--quiet"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, given)])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory on cpu (")
    assert "pass --grad-checkpoint, lower --tokens-per-batch (it is 1024) or raise" in line


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_evaluating_without_memory_is_one_line_and_exit_code_1(
    tiny_config, tmp_path, monkeypatch, capsys, command
):
    config = tiny_config(tasks=("sst",), max_steps=1)
    run(config)
    monkeypatch.setattr(MultitaskBert, "forward", lambda self, *batch: torch.empty(2**55))
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\nwhat a film\n")
    given = ["--data", config.data] if command == "eval" else [rows]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, str(config.out), *map(str, given), "--device", "cpu"])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory on cpu (")
    assert line.endswith("; it takes 4,096 tokens at a time: free memory or use another --device")
    assert not list(tmp_path.glob("rows.predictions*"))


def test_another_runtime_error_is_not_taken_for_memory(tiny_config, monkeypatch):
    monkeypatch.setattr(train.Trainer, "loss", lambda self, *share: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(tiny_config())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep it or not")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch
        from fastlora.cli.process import keep_freed_memory
        keep_freed_memory()
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def use():
            del [torch.ones(1 << size) for size in (20, 22, 24)][:]  # 4, 16 and 64 MiB
        for _ in range(5):
            use()
        found = []
        for _ in range(3):
            before = faults()
            for _ in range(10):
                use()
            found.append(faults() - before)
        print(min(found))  # a machine short of memory takes pages away
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 160,000 pages and more
