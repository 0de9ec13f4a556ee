"""Heads: how they start, and that a regression does not depend on its labels' unit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastlora.console import Log
from fastlora.data.tasks import BUILTIN
from fastlora.multitask.heads import SimilarityHead, pair_features
from fastlora.training.checkpoint import trainable
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import build_model, prepare

STS = BUILTIN["sts"]


def test_similarity_head_starts_as_the_cosine():
    head = SimilarityHead(16, STS, 0.1).eval()
    u, v = torch.randn(9, 16), torch.randn(9, 16)
    torch.testing.assert_close(head(u, v)[:, 0], F.cosine_similarity(u, v))


def test_pair_features_are_symmetric_and_of_unit_size():
    u, v = torch.randn(200, 64), torch.randn(200, 64)
    features, cosine = pair_features(u, v)
    swapped, _ = pair_features(v, u)
    torch.testing.assert_close(features, swapped)
    torch.testing.assert_close(cosine[:, 0], F.cosine_similarity(u, v))
    assert 0.5 < features.square().mean() < 2


def train(config, scale, offset):
    """Train on labels * scale + offset; the losses, the weights, and the dev data's outputs."""
    inputs = find_inputs(config)
    setup = prepare(config, inputs)
    ((name, task),) = inputs.tasks.items()
    task = replace(task, low=scale * task.low + offset, high=scale * task.high + offset)
    moved = {
        split: {name: replace(data[name], task=task, labels=scale * data[name].labels + offset)}
        for split, data in (("train", setup.train), ("dev", setup.dev))
    }
    setup = replace(setup, inputs=replace(inputs, tasks={name: task}), **moved)
    model, *_ = build_model(setup, {name: task}, setup.config)
    trainer = Trainer(setup, model, None, World(setup.device), Log(quiet=True))
    losses, loss = [], trainer.loss
    trainer.loss = lambda *arguments: losses.append(loss(*arguments)) or losses[-1]
    scores = trainer.run().scores
    return torch.stack(losses).detach(), trainable(model), trainer.outputs[name], scores[name]


@pytest.mark.parametrize("kind", ["one text", "joint pair", "two texts"])
def test_the_unit_of_the_labels_changes_nothing_but_the_predictions_unit(tiny_config, kind):
    settings = {"tasks": ("sts",), "pairs": "joint" if kind == "joint pair" else "separate"}
    if kind == "one text":
        files = {split: STS.files[split] for split in ("train", "dev")}
        table = {**STS.to_table(), "columns": ["sentence1"], "files": files}
        settings |= {"tasks": ("one",), "task": {"one": table}}
    config = tiny_config(epochs=4, lr=2e-3, **settings)
    losses, weights, outputs, score = train(config, 1.0, 0.0)
    assert losses[-4:].mean() < losses[:4].mean()
    for scale, offset in ((1000.0, 0.0), (0.01, 0.0), (20.0, 1e9)):
        again = train(config, scale, offset)
        torch.testing.assert_close(again[0], losses, rtol=1e-3, atol=0)
        for name, weight in again[1].items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)
        np.testing.assert_allclose((again[2] - offset) / scale, outputs, rtol=0, atol=1e-3)
        assert again[3] == pytest.approx(score, abs=1e-3)
