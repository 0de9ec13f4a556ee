"""MultitaskBert: pooling, losses, and rows of several tasks in one pass."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastlora.data.batches import collate, eval_batches
from fastlora.data.tasks import BUILTIN
from fastlora.multitask.model import task_losses
from fastlora.multitask.predictor import Features, predict
from fastlora.training.inputs import find_inputs
from fastlora.training.setup import build_model, prepare

STS, QUORA, SST = BUILTIN["sts"], BUILTIN["quora"], BUILTIN["sst"]


@pytest.fixture
def built(tiny_config):
    def make(**changes):
        config = tiny_config(**changes)
        inputs = find_inputs(config)
        setup = prepare(config, inputs)
        model, *_ = build_model(setup, inputs.tasks, setup.config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return setup, model.eval()

    return make


def test_task_losses():
    outputs = {"sst": torch.zeros(3, 5), "sts": torch.tensor([[1.0], [0.0]])}
    labels = {"sst": torch.tensor([0, 1, 2]), "sts": torch.tensor([0.0, 0.0])}
    batch = SimpleNamespace(labels=labels, real={})
    losses = task_losses({"sst": SST, "sts": STS}, outputs, batch)
    assert losses["sst"].item() == pytest.approx(3 * np.log(5), rel=1e-5)
    # A squared error is counted in the variance of labels spread evenly over the range.
    assert losses["sts"].item() == pytest.approx(12.0)
    batch.real["sst"] = torch.tensor([1.0, 0.0, 1.0])
    losses = task_losses({"sst": SST, "sts": STS}, outputs, batch)
    assert losses["sst"].item() == pytest.approx(2 * np.log(5), rel=1e-5)


def test_losses_of_weighted_classes_and_of_several_labels():
    tasks = {"sst": SST, "many": replace(SST, name="many", kind="multilabel")}
    outputs = {"sst": torch.zeros(2, 5), "many": torch.zeros(3, 5)}
    labels = {"sst": torch.tensor([0, 1]), "many": torch.ones(3, 5)}
    batch = SimpleNamespace(labels=labels, real={})
    losses = task_losses(tasks, outputs, batch, {"sst": torch.tensor([3.0, 0.5, 1, 1, 1])})
    assert losses["sst"].item() == pytest.approx(3.5 * np.log(5), rel=1e-5)
    assert losses["many"].item() == pytest.approx(3 * np.log(2), rel=1e-5)


@pytest.mark.parametrize("adapters", ["shared", "per-task", "shared+per-task"])
def test_an_example_scores_the_same_alone_and_in_a_mixed_batch(built, adapters):
    setup, model = built(adapters=adapters)
    mixed = predict(model, setup.dev)
    for name, data in setup.dev.items():
        alone = predict(model, {name: data})
        np.testing.assert_allclose(mixed[name], alone[name], atol=2e-5)
        assert np.ptp(mixed[name]) > 0
    index = list(setup.dev).index("quora")
    single = model(collate(setup.dev, np.array([[index, 3]])))["quora"]
    np.testing.assert_allclose(single.detach().numpy()[0], mixed["quora"][3], atol=2e-5)


def test_another_tasks_adapter_does_not_touch_a_task(built):
    setup, model = built(adapters="per-task")
    before = predict(model, setup.dev)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.sst"):
            torch.nn.init.normal_(parameter, std=0.5)
    after = predict(model, setup.dev)
    assert not np.allclose(before["sst"], after["sst"], atol=1e-3)
    np.testing.assert_array_equal(before["quora"], after["quora"])


def test_per_task_settings(tiny_config, built):
    from fastlora.training.config import TaskLoraConfig

    _, model = built(
        adapters="per-task", sst=TaskLoraConfig(r=2, targets=("value",)), sts=TaskLoraConfig(r=7)
    )
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n}
    prefix = "encoder.encoder.layer.0.attention.self."
    assert shapes[prefix + "value.lora_A.sst"] == (2, 32)
    assert prefix + "query.lora_A.sst" not in shapes
    assert shapes[prefix + "query.lora_A.sts"] == (7, 32)
    assert shapes[prefix + "query.lora_A.quora"] == (4, 32)


def test_joint_pairs_are_one_sequence(built):
    setup, model = built(pairs="joint")
    assert len(setup.dev["quora"].columns) == 1
    assert predict(model, setup.dev)["quora"].shape == (24, 2)


def test_frozen_features_are_what_the_encoder_gives(built):
    setup, model = built(mode="frozen")
    features = Features(model, setup.dev)
    for batch in eval_batches(setup.dev, 200):
        torch.testing.assert_close(features(batch), model.embed(batch), rtol=0, atol=1e-5)
