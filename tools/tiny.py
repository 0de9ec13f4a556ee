"""A tiny random BERT and tiny task files, so that a whole run takes a second or two."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path

NOUNS = ["film", "dog", "cat", "boat", "runs", "sings", "sleeps", "sees", "red", "blue"]
WORDS = [*NOUNS, "the", "a", "good", "bad", "fine", "not", "very", ".", "?"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
HEADERS = {
    "sst": ["", "id", "sentence", "sentiment"],
    "quora": ["", "id", "sentence1", "sentence2", "is_duplicate"],
    "sts": ["", "id", "sentence1", "sentence2", "similarity"],
}


def write_model(folder: Path) -> Path:
    """Write a Hugging Face folder: 2 layers of width 32, dropout as in BERT."""
    import torch
    import transformers

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


def write_data(folder: Path) -> Path:
    """Write CS224N files of 96 training and 24 dev rows a task."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, header in HEADERS.items():
        for split, count in (("train", 96), ("dev", 24)):
            stem = "ids-sst" if name == "sst" else name
            with (folder / f"{stem}-{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(header)
                writer.writerows(_rows(name, count, rng))
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


def train_arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """The arguments of a training command on the model and data in a folder."""
    flags = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(out)]
    given = ["train", *flags, "--tasks", "sst,sts", "--device", "cpu", "--tokens-per-batch", "160"]
    return [*given, "--quiet", *more]


def outcome(run: Path) -> dict[str, str]:
    """The digests of what a finished run is for: its weights, predictions and scores."""
    files = [*run.glob("adapter/**/*.safetensors"), *run.glob("predictions/*.csv")]
    found = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    record = json.loads((run / "result.json").read_text(encoding="utf-8"))
    for key in ("scores", "history", "steps", "examples", "kept"):
        found[key] = json.dumps(record[key], sort_keys=True)
    return found
