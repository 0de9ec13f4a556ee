"""The contenders of the training benchmarks.

All train the library's loop, data, heads, loss, optimiser and clipping; what differs is the encoder
and its LoRA layers, and the order of the examples.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.bert.config import BertConfig
from fastlora.cli.process import keep_freed_memory
from fastlora.console import Log
from fastlora.data.batches import Batch, collate
from fastlora.data.reading import TaskData
from fastlora.multitask.model import MultitaskBert
from fastlora.training.config import TrainConfig
from fastlora.training.distributed import World
from fastlora.training.inputs import find_inputs
from fastlora.training.loop import Trainer
from fastlora.training.setup import DTYPES, Setup, build_model, prepare, to_compute

RANK, LR, FULL_LR = 32, 1e-3, 5e-5


@dataclass(frozen=True)
class Job:
    """What all contenders train on."""

    data: Path | None = None
    model: str = "minilm"
    limit: int = 200  # examples a task
    tokens: int = 1024  # a batch
    device: str = "cpu"
    precision: Any = "fp32"
    threads: int = os.cpu_count() or 1

    def setup(self, full: bool, graphs: bool = False) -> Setup:
        """SST, Quora and STS, query and value adapted; a constant rate, so any number of steps."""
        lora = {"r": RANK, "targets": ("query", "value")}
        config = TrainConfig(
            **({"mode": "full"} if full else lora),
            tasks=("sst", "quora", "sts"),
            data=self.data,
            model=self.model,
            limit=self.limit,
            tokens_per_batch=self.tokens,
            lr=FULL_LR if full else LR,
            warmup=0.0,
            schedule="constant",
            precision=self.precision,
            device=self.device,
            cuda_graphs=graphs,
        )
        keep_freed_memory()  # as the commands do
        return prepare(config, find_inputs(config))


def dtype_of(setup: Setup) -> torch.dtype:
    """The type that a contender computes in."""
    return DTYPES[setup.config.precision]


@dataclass(frozen=True)
class Work:
    """What a contender did when it was asked."""

    seconds: float
    examples: int
    tokens: int
    flops: float  # that the real tokens need
    computed: float  # FLOPs with those spent on padding
    loss: float  # mean over examples


class HuggingFace(MultitaskBert):
    """The library's model with `transformers.BertModel` in it, under PEFT or trained in full."""

    def __init__(self, setup: Setup, attention: str, compiled: bool) -> None:
        import peft
        import transformers

        encoder = transformers.BertModel.from_pretrained(
            setup.inputs.source.folder,
            attn_implementation=attention,
            add_pooling_layer=False,
            dtype=torch.float32 if setup.config.mode == "full" else dtype_of(setup),
        )
        super().__init__(encoder, setup.inputs.tasks, setup.config.pairs)
        if setup.config.mode == "lora":
            lora = setup.config.lora
            config = peft.LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
            )
            self.encoder = peft.get_peft_model(encoder, config)
        if compiled:
            self.encoder = torch.compile(self.encoder, dynamic=True)
        self.dtype = dtype_of(setup)

    def embed(self, batch: Batch) -> Tensor:
        """As the library's: fp32 [B, H]."""
        device = batch.input_ids.device.type
        mixed = self.dtype != torch.float32
        with torch.autocast(device, self.dtype if mixed else torch.bfloat16, enabled=mixed):
            found = self.encoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                token_type_ids=batch.token_type_ids,
            )
        mask = batch.attention_mask.unsqueeze(-1)
        return (found.last_hidden_state.float() * mask).sum(1) / mask.sum(1)


def make_trainer(name: str, job: Job) -> Trainer:
    """A contender: "fastlora", "fastlora graphs", or "peft" with "sdpa", "eager" or "compiled".

    With "full" for "peft", and in "full fastlora", every weight trains.
    """
    setup = job.setup(full=name.startswith("full"), graphs=name.endswith("graphs"))
    if "fastlora" in name:
        model, _, _ = build_model(setup, setup.inputs.tasks, setup.config)
        to_compute(model, setup.config, setup.device)
    else:
        torch.manual_seed(setup.config.seed)
        attention = "eager" if name.endswith("eager") else "sdpa"
        model = HuggingFace(setup, attention, name.endswith("compiled")).to(setup.device)
    return Trainer(setup, model, Path(), World(setup.device), Log(quiet=True))


def step_flops(
    config: BertConfig, lengths: np.ndarray, full: bool, tokens: int = 0, longest: int = 0
) -> float:
    """What one step on sentences of these lengths takes: products only.

    Forward, dx and (in full fine-tuning) dW of every matrix; LoRA needs no dx below layer 0's
    adapters. Attention's products run forward and twice backward. Matrices see `tokens`, if not
    these, and attention sees every sentence at the length `longest`, if not at its own.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    tokens = tokens or lengths.sum()
    seen = np.full(len(lengths), longest) if longest else lengths
    squares = (seen.astype(np.float64) ** 2).sum()
    attention = layers * 12 * width * squares
    if full:
        return 6 * weights * tokens + attention
    lora = layers * 2 * 2 * RANK * width
    return (4 * weights - 2 * 3 * width**2 + 6 * lora) * tokens + attention


def computed_flops(trainer: Trainer, rows: np.ndarray, config: BertConfig) -> float:
    """What one step takes with what it computes of padding."""
    batch = collate(trainer.setup.train, rows, trainer.max_length)
    (count, longest), index = batch.input_ids.shape, batch.layout.index
    everything = index is None or isinstance(trainer.model, HuggingFace)
    lengths = batch.attention_mask.sum(1).numpy()
    tokens = count * longest if everything else len(index)
    return step_flops(config, lengths, trainer.config.mode == "full", tokens, longest)


def gemm_rate(config: BertConfig, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of `torch.mm` at the encoder's GEMM shapes, each weighted by its FLOPs."""
    width, wide = config.hidden_size, config.intermediate_size
    flops = seconds = 0.0
    for K, N in ((width, 3 * width), (width, width), (width, wide), (wide, width)):
        a = torch.randn(rows, K, device=device, dtype=dtype)
        b = torch.randn(K, N, device=device, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            torch.mm(a, b)
            wait(device)
            times.append(time.perf_counter() - start)
        flops += 2 * rows * K * N
        seconds += sorted(times)[len(times) // 2]
    return flops / seconds


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process, or its work on a GPU, has held.

    Not `ru_maxrss`, which begins with the peak of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak)


def plan_of(trainer: Trainer, order: str) -> list[np.ndarray]:
    """The library's batches of similar lengths, or as many batches in random order."""
    plan = trainer.plan(0)
    if order == "buckets":
        return plan
    rows = np.random.default_rng(0).permutation(np.concatenate(plan))
    return np.array_split(rows, len(plan))


def lengths_of(datasets: dict[str, TaskData], rows: np.ndarray) -> np.ndarray:
    """The tokens of every sentence of a batch."""
    found = []
    for task, example in rows:
        data = list(datasets.values())[task]
        found += [c.offsets[example + 1] - c.offsets[example] for c in data.columns]
    return np.array(found)


def train(trainer: Trainer, batches: list[np.ndarray], config: BertConfig) -> Work:
    """Train on the batches and time it, from token lists to updated weights."""
    trainer.sums.zero_()
    wait(trainer.device)
    start = time.perf_counter()
    for rows in batches:
        trainer.step(rows)
        trainer.progress.step += 1
    wait(trainer.device)
    seconds = time.perf_counter() - start
    loss, count = trainer.sums.sum(0).tolist()
    lengths = [lengths_of(trainer.setup.train, rows) for rows in batches]
    full = trainer.config.mode == "full"
    return Work(
        seconds,
        int(count),
        sum(int(found.sum()) for found in lengths),
        sum(step_flops(config, found, full) for found in lengths),
        sum(computed_flops(trainer, rows, config) for rows in batches),
        loss / count,
    )
