"""The contenders of trainers.py in turns, each in a process of its own, and their costs' ratio.

A process of its own gives each an honest peak of memory and its own thread pool; idle ones sleep.
"""

from __future__ import annotations

import multiprocessing
import statistics
from typing import Any

import torch
from trainers import Job, Work, dtype_of, gemm_rate, make_trainer, peak_memory, plan_of, train

from fastlora.bert.config import BertConfig
from fastlora.training.checkpoint import trainable

ORDERS = ("buckets", "random")
WARMUP_STEPS = 4
LOSS_NOISE = 0.1  # contenders' mean losses differ by up to 0.03 of them, dropout being random


def serve(connection: Any, name: str, job: Job) -> None:
    """Answer requests until the other side hangs up."""
    torch.set_num_threads(job.threads)
    trainer = make_trainer(name, job)
    weights = {n: p.detach().clone() for n, p in trainable(trainer.model).items()}
    config = BertConfig.from_json(trainer.setup.inputs.source.folder / "config.json")
    plans = {order: plan_of(trainer, order) for order in ORDERS}
    # First calls pay for buffers, thread pools, packed weights and compiling.
    train(trainer, plans["random"][:WARMUP_STEPS], config)
    connection.send(len(plans["buckets"]))
    while (request := connection.recv()) is not None:
        answer: Any = None
        if request == "restart":
            trainer.progress.step = 0
            for moments in trainer.optimizer.state.values():  # in place, for graphs hold them
                for moment in moments.values():
                    moment.zero_()
            with torch.no_grad():
                for key, parameter in trainable(trainer.model).items():
                    parameter.copy_(weights[key])
        elif request == "gemm":
            rows = trainer.config.tokens_per_batch
            answer = gemm_rate(config, rows, trainer.device, dtype_of(trainer.setup))
        elif request == "peak":
            answer = peak_memory(trainer.device)
        else:
            order, first, stop = request
            answer = train(trainer, plans[order][first:stop], config)
        connection.send(answer)


class Contender:
    """A contender's process; close it, or leave a `with` block, to end it."""

    def __init__(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, job), daemon=True)
        self.process.start()
        theirs.close()
        self.batches: int = self._answer()

    def ask(self, request: Any) -> Any:
        """Ask for "restart", "gemm" (FLOP/s), "peak" (bytes) or work on (order, first, stop)."""
        self.connection.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"contender {self.name!r} ended: see its own error") from None

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.send(None)
        self.process.join()


def race(
    benchmark: Any,
    group: str,
    ours: Contender,
    name: str,
    job: Job,
    order: str,
    steps: int,
    rounds: int | None = None,
) -> None:
    """Benchmark fastlora against a contender, `steps` batches each in turn; None: a whole epoch.

    fastlora trains on its own batches, the contender on the same ones or in random order. Between
    turns the machine's rate at `torch.mm` is taken, to put both into its unit.
    """
    mine: list[Work] = []
    theirs: list[Work] = []
    rates: list[float] = []

    def work(contender: Contender, order: str, done: list[Work]) -> None:
        first = len(done) * steps
        done.append(contender.ask((order, first, min(first + steps, contender.batches))))

    def their_turn() -> None:
        rates.append(ours.ask("gemm"))
        work(other, order, theirs)

    benchmark.group = group
    with Contender(name, job) as other:
        for contender in (ours, other):
            contender.ask("restart")
        rounds = rounds or -(-ours.batches // steps)
        benchmark.pedantic(lambda: work(ours, "buckets", mine), setup=their_turn, rounds=rounds)
        peaks = [contender.ask("peak") / 2**20 for contender in (ours, other)]
    ratios = sorted(_cost([b]) / _cost([a]) for a, b in zip(mine, theirs, strict=True))
    # A turn on the same batch is a ratio; in random order only all turns have equal examples.
    same = order == "buckets"
    loss, other_loss = (statistics.fmean(w.loss for w in done) for done in (mine, theirs))
    # Full fine-tuning learns at a rate of its own.
    agrees = name.startswith("full") or abs(loss / other_loss - 1) <= LOSS_NOISE
    benchmark.extra_info.update(
        name=f"{name}, {order}",
        ratio=statistics.median(ratios) if same else _cost(theirs) / _cost(mine),
        low=ratios[len(ratios) // 4],
        high=ratios[-1 - len(ratios) // 4],
        agrees=agrees,
        notes=[
            f"fastlora  {_note(mine, rates, peaks[0], loss)}",
            f"{name:<9} {_note(theirs, rates, peaks[1], other_loss)}",
        ],
    )
    assert agrees, f"losses disagree: fastlora {loss:.3f}, {name} {other_loss:.3f}"


def _cost(works: list[Work]) -> float:
    """Seconds an example."""
    return sum(w.seconds for w in works) / sum(w.examples for w in works)


def _note(works: list[Work], rates: list[float], peak: float, loss: float) -> str:
    tokens, seconds = sum(w.tokens for w in works), sum(w.seconds for w in works)
    waste = 1 - sum(w.flops for w in works) / sum(w.computed for w in works)
    shares = [w.flops / w.seconds / rate for w, rate in zip(works, rates, strict=True)]
    return (
        f"{1 / _cost(works):7.1f} examples/s  {tokens / seconds:8.0f} tokens/s  "
        f"padding {waste:5.1%} of FLOPs  MFU {statistics.median(shares):4.0%}  "
        f"peak {peak:5.0f} MiB  loss {loss:.3f}"
    )
