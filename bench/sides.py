"""An unchanged PEFT script and the same one with `fastlora.accelerate`: the sides of a ratio.

Both are made from the same seed, see the same batches and step alike: forward, loss, backward,
clipping and AdamW, as transformers' Trainer does.
"""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trainers import peak_memory, wait
from transformers import AutoTokenizer, BertForSequenceClassification

import fastlora
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs

THREADS, BATCH, RANK, LR = 2, 32, 32, 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEAK_ROWS = 192  # that a side trains on for its peak


class Data:
    """SST's sentences as tokens, STS's pairs as text, and the folder of the model's files."""

    def __init__(self, data: Path | None, model: str) -> None:
        inputs = find_inputs(TrainConfig(tasks=("sst", "sts"), data=data, model=model))
        self.model = inputs.source.folder
        sst, sts = (_read(inputs.folder / task.files["train"]) for task in inputs.tasks.values())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        texts = [row["sentence"] for row in sst]
        self.ids = self.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        self.labels = [int(row["sentiment"]) for row in sst]
        self.pairs = [
            (row["sentence1"], row["sentence2"], float(row["similarity"]) / 5) for row in sts
        ]

    def batches(self, order: str, size: int, count: int) -> list[dict[str, Tensor]]:
        """Batches of sentences in "random" order, or "sorted" by length and then shuffled."""
        rng = np.random.default_rng(0)
        rows = rng.permutation(len(self.ids))
        if order == "sorted":
            rows = rows[np.argsort([len(self.ids[i]) for i in rows], kind="stable")]
        full = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        chosen = [full[i % len(full)] for i in rng.permutation(max(count, len(full)))[:count]]
        return [self._batch(rows) for rows in chosen]

    def _batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        found = self.tokenizer.pad({"input_ids": [self.ids[i] for i in rows]}, return_tensors="pt")
        labels = torch.tensor([self.labels[i] for i in rows])
        return {n: t.to(DEVICE) for n, t in {**found, "labels": labels}.items()}


class Side:
    """A model with its optimiser; `seconds` and `losses` are those of all its steps."""

    def __init__(self, model: nn.Module, bf16: bool = False) -> None:
        self.model = model.to(DEVICE)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR)
        self.bf16 = bf16
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        """What a step descends."""
        return self.model(**batch).loss

    def step(self, batch: Any) -> None:
        """Train on a batch, and note what it took."""
        self.model.train()
        start = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(DEVICE)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def evaluate(self, batch: Any) -> Tensor:
        """The logits of a batch."""
        self.model.eval()
        with torch.no_grad():
            return self.model(**batch).logits

    def note(self, name: str) -> str:
        """What its steps took, as a line of the table."""
        mean = statistics.fmean(self.losses)
        rest = statistics.median(self.seconds[1:])
        return (
            f"{name:<14} first step {1e3 * self.seconds[0]:7.0f} ms, the others' "
            f"median {1e3 * rest:6.1f} ms; all {len(self.seconds)} steps "
            f"{sum(self.seconds):6.2f} s, mean loss {mean:.4f}"
        )


class PairSide(Side):
    """A SentenceTransformer under a loss of its own, on batches of pairs."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__(model)
        self.judge = loss

    def loss(self, batch: Any) -> Tensor:
        """The loss of features and labels; the model writes into the features."""
        features, labels = batch
        return self.judge([dict(f) for f in features], labels)


def lora_config(dropout: float = 0.1, **settings: Any) -> LoraConfig:
    """PEFT's settings of both sides."""
    targets = ["query", "value"]
    rates = dict(r=RANK, lora_alpha=RANK, lora_dropout=dropout)
    return LoraConfig(**rates, target_modules=targets, **settings)


def classifier(folder: Path, how: str, dropout: float = 0.1, **settings: Any) -> nn.Module:
    """A `BertForSequenceClassification` under PEFT: "peft", "accelerated" or "compiled"."""
    torch.manual_seed(0)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=5, **rates)
    model = get_peft_model(model, lora_config(dropout, task_type="SEQ_CLS", **settings)).to(DEVICE)
    if how == "accelerated":
        fastlora.accelerate(model)
    elif how == "compiled":
        model.base_model.model.bert.compile(dynamic=True)
    return model


def differences(data: Data) -> dict[str, float]:
    """How far both sides' logits and gradients are apart without dropout, by name, relative."""
    (batch,) = data.batches("random", 16, 1)
    found = []
    for how in ("peft", "accelerated"):
        model = classifier(data.model, how, dropout=0.0, init_lora_weights=False)
        logits = model(**batch).logits
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": logits.detach(), **gradients})
    theirs, ours = found
    return {n: ((ours[n] - t).norm() / t.norm()).item() for n, t in theirs.items()}


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def _serve_peak(connection: Any, data: Data, how: str, size: int) -> None:
    torch.set_num_threads(THREADS)
    side = Side(classifier(data.model, how))
    loaded = peak_memory(DEVICE)
    for batch in data.batches("random", size, max(2, PEAK_ROWS // size)):
        side.step(batch)
    connection.send((loaded, peak_memory(DEVICE)))


def peak_of(data: Data, how: str, size: int) -> tuple[int, int]:
    """Peak bytes of a side that trains alone in a process: once loaded, and at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_peak, args=(theirs, data, how, size), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the process of side {how!r} ended: see its own error") from None
    finally:
        process.join()
