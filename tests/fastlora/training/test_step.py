"""One training step: whose gradients and learning rates are whose, and what it waits for."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.bert import attention
from fastlora.console import Log
from fastlora.data.batches import collate
from fastlora.errors import UserError
from fastlora.training import loop as train
from fastlora.training.checkpoint import trainable
from fastlora.training.config import TaskLoraConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import build_model, prepare


@pytest.fixture
def still(tiny_config, tiny_model, tmp_path):
    """A maker of setups whose encoder (and heads, which follow it) drops nothing itself."""
    folder = shutil.copytree(tiny_model, tmp_path / "still")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))

    def make(**changes):
        config = tiny_config(model=str(folder), **changes)
        return prepare(config, find_inputs(config))

    return make


def make_trainer(setup):
    model, *_ = build_model(setup, setup.inputs.tasks, setup.config)
    return Trainer(setup, model, None, World(setup.device), Log(quiet=True))


@pytest.mark.parametrize("others", [("quora", "sts"), ("sts",)])
def test_a_tasks_gradients_do_not_change_in_company(still, others):
    """Mask, mean and clipping are the task's own: LoRA dropout is on."""
    setup = still(adapters="per-task", dropout=0.3)
    trainer = make_trainer(setup)
    names = list(setup.train)
    sst = np.array([[names.index("sst"), i] for i in range(9)])
    rest = np.array([[names.index(name), i] for name in others for i in range(5)])

    def gradients(plan):
        trainer.model.zero_grad()
        trainer.seed_part(0, 1)
        trainer.loss(*trainer.gather(plan)).backward()
        found = {n: p.grad for n, p in trainable(trainer.model).items() if ".sst" in n}
        return {name: gradient.clone() for name, gradient in found.items()}

    for parameter in trainer.parameters:  # B = 0 would leave A without a gradient
        torch.nn.init.normal_(parameter, std=0.1)
    by_itself, in_company = gradients(sst), gradients(np.concatenate([rest, sst]))
    assert len(by_itself) == 2 * 6 * 2 + 2  # A and B of two layers' matrices, and the head
    for name, gradient in by_itself.items():
        torch.testing.assert_close(in_company[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0


def test_a_tasks_own_learning_rate(still):
    settings = {"lr": 1e-3, "head_lr": 3e-3, "sts": TaskLoraConfig(lr=5e-3)}
    setup = still(adapters="shared+per-task", **settings)
    trainer = make_trainer(setup)
    of = {id(p): group["peak"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainable(trainer.model).items():
        expected = 3e-3 if name.startswith("heads.") else 1e-3
        if name.endswith(("lora_A.sts", "lora_B.sts")):
            expected = 5e-3
        assert of[id(parameter)] == expected


def test_a_tasks_own_settings_need_its_own_adapter(tiny_config):
    with pytest.raises(UserError, match="settings of sts need --adapters per-task"):
        tiny_config(sts=TaskLoraConfig(r=2))


class Waits(TorchDispatchMode):
    """Keeps the operations for whose result a host must wait: a number, or a result's shape."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.name() == "aten::index.Tensor" else ()
        masks = any(index is not None and index.dtype == torch.bool for index in indices)
        if masks or func.name() in self.NAMES:
            self.found.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("adapters", ["shared", "per-task", "shared+per-task"])
def test_a_step_waits_for_nothing_on_the_device(still, monkeypatch, adapters, precision):
    """Batches come from the host. As on a GPU: no mask and no attention of the CPU's."""
    monkeypatch.setattr(attention, "USE_CPU_KERNEL", False)
    setup = still(adapters=adapters, precision=precision, dropout=0.0)
    trainer = make_trainer(setup)
    plan = trainer.plan(0)[0]
    batch = collate(setup.train, plan)
    assert batch.layout.index is not None
    monkeypatch.setattr(train, "collate", lambda *_: batch)
    with Waits() as waits:
        trainer.step(plan)
    assert not waits.found
