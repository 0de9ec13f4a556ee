"""Training throughput of fastlora against Hugging Face + PEFT, in one process on the same examples.

    python bench/throughput.py --data data/

SST, LoRA with r = 32 on query and value, batches of 32, fp32, all dropouts at 0.1, a linear head
on the mean of the tokens, AdamW and clipping for both sides. Each round every contender trains one
pass over the same examples, step by step in turn:

    peft       random order, padded to the longest of each batch: what PEFT's users run
    bucketed   the same model on batches of similar lengths
    fastlora   the library's model and step on the very batches of `bucketed`

Rates count from token lists to updated weights, so collating is in them and tokenising is not.
"padding" is the padded share of the batches; of these, fastlora computes attention only.
The exit code is 1 when the contenders' losses differ by more than noise (someone skips work), or
when a target ratio is missed.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fastlora.config import LoraConfig, TrainConfig
from fastlora.console import Log
from fastlora.data import TaskData
from fastlora.inputs import find_inputs
from fastlora.model import unit_size
from fastlora.parallel import Ranks
from fastlora.setup import Setup, build_model, prepare
from fastlora.tasks import BUILTIN
from fastlora.train import Trainer

SST = BUILTIN["sst"]
BATCH, RANK, ALPHA, DROPOUT, LR, CLIP = 32, 32, 16, 0.1, 1e-3, 1.0
TARGETS = {"peft": 2.0, "bucketed": 1.15}  # what fastlora's rate is to be, over each of these
LOSS_NOISE = 0.15
WARMUP_STEPS = 4

# One optimiser step on the examples at these positions: their mean loss and the [B, S] cells used.
Step = Callable[[np.ndarray], tuple[Tensor, int]]


@dataclass(frozen=True)
class Round:
    """One contender's pass over the examples of a round."""

    seconds: float
    examples: int
    tokens: int
    cells: int
    loss: float


class PeftClassifier(nn.Module):
    """transformers.BertModel under PEFT, and the head that fastlora puts on a sentence."""

    def __init__(self, folder: Path, attention: str) -> None:
        super().__init__()
        encoder = transformers.BertModel.from_pretrained(folder, attn_implementation=attention)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["query", "value"]
        )
        self.encoder = peft.get_peft_model(encoder, config)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(encoder.config.hidden_size, SST.outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Two int64 [B, S] -> [B, classes]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask.unsqueeze(-1)
        pooled = (states.last_hidden_state * mask).sum(1) / mask.sum(1)
        return self.head(self.dropout(unit_size(pooled)))


def peft_step(data: TaskData, folder: Path, attention: str) -> Step:
    """Hugging Face + PEFT, trained the plain way."""
    torch.manual_seed(0)
    model = PeftClassifier(folder, attention).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, fused=True)
    (column,) = data.columns
    sequences = [
        torch.from_numpy(s.astype(np.int64)) for s in np.split(column.ids, column.offsets[1:-1])
    ]
    labels = torch.from_numpy(data.labels.astype(np.int64))

    def step(rows: np.ndarray) -> tuple[Tensor, int]:
        parts = [sequences[i] for i in rows]
        ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        loss = F.cross_entropy(model(ids, mask), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        return loss.detach(), ids.numel()

    return step


def fastlora_step(setup: Setup) -> Step:
    """The library's own trainer."""
    model, _, _ = build_model(setup.inputs.source, setup.inputs.tasks, setup.config)
    trainer = Trainer(setup, model, Path(), Ranks(setup.device), Log(quiet=True))
    # What run() sets from the plan; the constant schedule makes any total do.
    trainer.total, trainer.train_features = 1, None

    def step(rows: np.ndarray) -> tuple[Tensor, int]:
        trainer.sums.zero_()
        trainer.step(np.stack((np.zeros_like(rows), rows), 1))
        trainer.progress.step += 1
        return trainer.sums[0, 0] / len(rows), len(rows) * int(data.lengths(rows).max())

    data = setup.train[SST.name]
    return step


def random_batches(examples: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled and cut into batches."""
    return np.array_split(rng.permutation(examples), len(examples) // BATCH)


def bucketed_batches(
    examples: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Cut into batches of similar lengths, batches shuffled."""
    pool = rng.permutation(examples)
    ordered = pool[np.argsort(lengths[pool], kind="stable")]
    batches = np.array_split(ordered, len(examples) // BATCH)
    return [batches[i] for i in rng.permutation(len(batches))]


def run_round(
    steps: dict[str, Step], orders: dict[str, list[np.ndarray]], lengths: np.ndarray
) -> dict[str, Round]:
    """Train each contender on its batches, a step each in turn, and time them.

    Turns are as short as a step, so that a slow spell of the machine meets all of them.
    """
    seconds = dict.fromkeys(steps, 0.0)
    done: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in steps}
    for turn in zip(*orders.values(), strict=True):
        for name, rows in zip(orders, turn, strict=True):
            start = time.perf_counter()
            done[name].append(steps[name](rows))
            seconds[name] += time.perf_counter() - start
    results = {}
    for name, batches in orders.items():
        losses, cells = zip(*done[name], strict=True)
        rows = np.concatenate(batches)
        loss = torch.stack(losses).mean().item()
        tokens = int(lengths[rows].sum())
        results[name] = Round(seconds[name], len(rows), tokens, sum(cells), loss)
    return results


def compare(setup: Setup, options: argparse.Namespace) -> dict[str, list[Round]]:
    """Train all contenders in turn, round by round."""
    data, folder = setup.train[SST.name], setup.inputs.source.folder
    rng = np.random.default_rng(0)
    lengths = data.lengths(np.arange(len(data)))
    examples = rng.permutation(len(data))[: options.examples // BATCH * BATCH]
    steps = {
        "peft": peft_step(data, folder, options.attention),
        "bucketed": peft_step(data, folder, options.attention),
        "fastlora": fastlora_step(setup),
    }
    # First calls pay for buffers and thread pools. All warm up on the same batches.
    warmup = random_batches(examples, rng)[:WARMUP_STEPS]
    run_round(steps, dict.fromkeys(steps, warmup), lengths)
    results: dict[str, list[Round]] = {name: [] for name in steps}
    for number in range(1, options.rounds + 1):
        buckets = bucketed_batches(examples, lengths, rng)
        orders = {"peft": random_batches(examples, rng), "bucketed": buckets, "fastlora": buckets}
        for name, result in run_round(steps, orders, lengths).items():
            results[name].append(result)
            rate = result.examples / result.seconds
            print(f"round {number}  {name:9s} {rate:7.1f} examples/s  loss {result.loss:.3f}")
    return results


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):8.1f} [{min(values):.1f}, {max(values):.1f}]"


def print_table(results: dict[str, list[Round]]) -> None:
    """Rates, padding and losses of each contender."""
    print(f"\n{'':10s}{'examples/s':>26s}{'real tokens/s':>28s}{'padding':>10s}{'loss':>8s}")
    for name, rounds in results.items():
        examples = spread([r.examples / r.seconds for r in rounds])
        tokens = spread([r.tokens / r.seconds for r in rounds])
        padding = 1 - sum(r.tokens for r in rounds) / sum(r.cells for r in rounds)
        print(f"{name:10s}{examples:>26s}{tokens:>28s}{padding:>10.0%}{rounds[-1].loss:>8.3f}")


def verdicts(results: dict[str, list[Round]]) -> list[bool]:
    """Print each criterion with what was found; True where it holds."""
    passed = []
    print()
    for name, target in TARGETS.items():
        pairs = zip(results[name], results["fastlora"], strict=True)
        ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
        ratio = statistics.median(ratios)
        passed.append(ratio >= target)
        found = f"{ratio:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"fastlora / {name:9s} {found:22s} target {target:.2f}x  {_word(passed[-1])}")
    losses = [rounds[-1].loss for rounds in results.values()]
    gap = max(losses) / min(losses) - 1
    passed.append(gap <= LOSS_NOISE)
    print(f"losses apart by      {gap:<22.1%} limit  {LOSS_NOISE:.0%}    {_word(passed[-1])}")
    return passed


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def prepare_sst(options: argparse.Namespace) -> Setup:
    """SST's files in the folder given, else what the library finds, and the library's settings."""
    config = TrainConfig(
        lora=LoraConfig(r=RANK, alpha=ALPHA, dropout=DROPOUT),
        tasks=(SST.name,),
        data=options.data,
        model=options.model,
        lr=LR,
        head_lr=LR,
        clip=CLIP,
        warmup=0.0,
        schedule="constant",
        precision="fp32",
        device="cpu",
    )
    return prepare(config, find_inputs(config))


def main() -> int:
    """Run the comparison; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of ids-sst-train.csv")
    parser.add_argument("--model", default="minilm", help="folder, hub id or minilm")
    parser.add_argument("--examples", type=int, default=1024, help="examples in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="PEFT's")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    setup = prepare_sst(options)
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}; {setup.inputs.source.name}, PEFT's attention "
        f"{options.attention}; data: {setup.inputs.why_data}"
    )
    results = compare(setup, options)
    print_table(results)
    return 0 if all(verdicts(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
