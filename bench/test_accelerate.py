"""`fastlora.accelerate` against the PEFT model it was given, unchanged: MiniLM on SST and STS.

Both sides run in turns in one process with two threads, on the same batches of 32 (where nothing
else is said), LoRA r = 32 on query and value, dropout 0.1. A ratio is PEFT's time to ours.
"""

import itertools
import shutil
import statistics
import tempfile
import time

import pytest
import torch
from race import LOSS_NOISE
from sides import (
    BATCH,
    DEVICE,
    LR,
    THREADS,
    Data,
    PairSide,
    Side,
    classifier,
    differences,
    lora_config,
    peak_of,
)
from trainers import wait

import fastlora

STEPS = 2  # of a turn at batch 32
SIZES = {1: 5, 2: 5, 4: 5, 8: 5, 64: 3, 256: 2}  # batches, and rounds of turns
LEAST_ROWS = 16  # that one turn covers: small batches are several steps
TOLERANCE = 1e-4  # of logits and gradients in fp32, relative
COMPILE_STEPS, COMPILE_ROUNDS, COMPILE_SUMS = 8, 4, (100, 500, 2000)
TRAINER_STEPS, TRAINER_ROUNDS = 12, 2


@pytest.fixture(scope="module")
def data(pytestconfig):
    """What both sides learn; the process is warm, with a side that is then thrown away."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    found = Data(pytestconfig.option.data, pytestconfig.option.model)
    Side(classifier(found.model, "peft")).step(*found.batches("random", BATCH, 1))
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def agrees(data):
    """Whether logits and gradients are PEFT's, without dropout."""
    return all(difference < TOLERANCE for difference in differences(data).values())


def turns(work, batches, steps):
    """A function that works on the next so many batches."""
    stream = itertools.cycle(batches)
    return lambda: [work(next(stream)) for _ in range(steps)]


def report(benchmark, theirs, ours, agrees):
    """Note first steps, sums and losses of both sides; fail where the losses differ."""
    loss, other = (statistics.fmean(side.losses) for side in (ours, theirs))
    near = abs(loss / other - 1) <= LOSS_NOISE
    total = sum(theirs.seconds) / sum(ours.seconds)
    notes = [theirs.note("PEFT"), ours.note("accelerated")]
    notes.append(f"all steps, the first included: {total:.2f}x")
    benchmark.extra_info.update(agrees=agrees and near, notes=notes)
    assert near, f"losses disagree: accelerated {loss:.4f}, PEFT {other:.4f}"


def race_steps(compare, benchmark, group, name, sides, batches, agrees):
    """Train both sides in turns on the same batches."""
    theirs, ours = sides
    runs = [turns(side.step, batches, STEPS) for side in sides]
    compare(group, *runs, DEVICE.type, name=name, agrees=agrees)
    report(benchmark, theirs, ours, agrees)


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_step(compare, benchmark, data, agrees, order):
    sides = [Side(classifier(data.model, how)) for how in ("peft", "accelerated")]
    batches = data.batches(order, BATCH, 10 * STEPS)
    group = f"accelerate {DEVICE.type}: a training step of {BATCH} sentences"
    race_steps(compare, benchmark, group, f"{order} order", sides, batches, agrees)


def test_step_bf16(compare, benchmark, data, agrees):
    if DEVICE.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        pytest.skip("bf16 is not faster on this CPU: it has no AMX")
    sides = [Side(classifier(data.model, how), bf16=True) for how in ("peft", "accelerated")]
    batches = data.batches("random", BATCH, 10 * STEPS)
    group = f"accelerate {DEVICE.type}: a training step of {BATCH} sentences, bf16 autocast"
    race_steps(compare, benchmark, group, "bf16", sides, batches, agrees)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_batch_size(compare, data, agrees, mode, size):
    sides = [Side(classifier(data.model, how)) for how in ("peft", "accelerated")]
    steps, rounds = max(1, LEAST_ROWS // size), SIZES[size]
    batches = data.batches("random", size, steps * (rounds + 1))

    def work(side):
        return (
            side.step if mode == "training" else lambda batch: (side.evaluate(batch), wait(DEVICE))
        )

    compare(
        f"accelerate, {mode} {DEVICE.type}: random order, so many steps a turn",
        *(turns(work(side), batches, steps) for side in sides),
        DEVICE.type,
        rounds=rounds,
        name=f"{steps} x batch {size}",
        agrees=agrees,
    )


def pair_side(data, accelerated):
    """A SentenceTransformer with an adapter, under the cosine loss."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    torch.manual_seed(0)
    model = SentenceTransformer(str(data.model), device=str(DEVICE))
    model.add_adapter(lora_config())
    if accelerated:
        fastlora.accelerate(model)
    return PairSide(model, CosineSimilarityLoss(model))


def test_sentence_transformer(compare, benchmark, data):
    pytest.importorskip("sentence_transformers")
    sides = [pair_side(data, accelerated) for accelerated in (False, True)]
    rows = torch.randperm(len(data.pairs), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for first in range(0, 10 * STEPS * BATCH, BATCH):
        pairs = [data.pairs[rows[i % len(rows)]] for i in range(first, first + BATCH)]
        *texts, labels = zip(*pairs, strict=True)
        features = [sides[0].model.preprocess(list(text)) for text in texts]
        features = [{n: t.to(DEVICE) for n, t in f.items() if torch.is_tensor(t)} for f in features]
        batches.append((features, torch.tensor(labels, device=DEVICE)))
    with torch.no_grad():
        theirs, ours = (s.model.eval()(dict(batches[0][0][0]))["sentence_embedding"] for s in sides)
    agrees = torch.allclose(theirs, ours, atol=1e-5)
    group = f"accelerate {DEVICE.type}: SentenceTransformer, cosine loss of {BATCH} pairs of STS"
    race_steps(compare, benchmark, group, "sentence pairs", sides, batches, agrees)


def test_trainer(benchmark, data, agrees):
    """Whole runs of transformers' Trainer, each with a new model, so with its first step."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    rows = [{"input_ids": i, "labels": n} for i, n in zip(data.ids, data.labels, strict=True)]
    losses, times = {"peft": [], "accelerated": []}, []

    def trainer(how, folder):
        options = dict(save_strategy="no", report_to="none", disable_tqdm=True)
        options |= dict(max_steps=TRAINER_STEPS, per_device_train_batch_size=BATCH)
        return Trainer(
            model=classifier(data.model, how),
            args=TrainingArguments(output_dir=folder, learning_rate=LR, **options),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(data.tokenizer),
        )

    def run(how, made):
        losses[how].append(made.train().training_loss)

    def their_turn(folder):
        made = trainer("peft", folder)
        start = time.perf_counter()
        run("peft", made)
        times.append(time.perf_counter() - start)
        return ("accelerated", trainer("accelerated", folder)), {}

    with tempfile.TemporaryDirectory() as folder:
        benchmark.group = (
            f"accelerate {DEVICE.type}: Trainer.train(), {TRAINER_STEPS} steps of {BATCH}"
        )
        benchmark.pedantic(run, setup=lambda: their_turn(folder), rounds=TRAINER_ROUNDS)
    found = benchmark.stats.stats.data
    ratios = sorted(a / b for a, b in zip(times, found, strict=True))
    means = {how: statistics.fmean(values) for how, values in losses.items()}
    benchmark.extra_info.update(
        name="Trainer",
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
        milliseconds=1e3 * statistics.median(found),
        agrees=agrees and abs(means["accelerated"] / means["peft"] - 1) <= LOSS_NOISE,
        notes=[f"lowest and highest of {TRAINER_ROUNDS} runs; mean losses {means}"],
    )


@pytest.mark.parametrize("size", [BATCH, 256])
def test_peak_memory(benchmark, data, agrees, size):
    """Each side alone in a process: PEFT's peak to ours, model and libraries included."""
    found = {}

    def one(how):
        found[how] = peak_of(data, how, size)

    benchmark.group = f"accelerate, memory {DEVICE.type}: peak of training, a process each"
    benchmark.pedantic(lambda: one("accelerated"), setup=lambda: one("peft"), rounds=1)
    (base, theirs), (other_base, ours) = found["peft"], found["accelerated"]
    ratio = theirs / ours
    benchmark.extra_info.update(
        name=f"batch {size}",
        ratio=ratio,
        low=ratio,
        high=ratio,
        agrees=agrees,
        notes=[
            f"PEFT {theirs / 2**20:.0f} MiB, {base / 2**20:.0f} of them before the first step",
            f"accelerated {ours / 2**20:.0f} MiB, {other_base / 2**20:.0f} before the first step",
        ],
    )


def test_compiled(benchmark, data, agrees):
    """PEFT with its encoder compiled, as Unsloth does: what compiling costs, and when it pays."""
    if DEVICE.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    from torch._inductor.utils import fresh_cache

    def others():
        run["peft"](), run["compiled"]()

    names = ("peft", "compiled", "accelerated")
    batches = data.batches("random", BATCH, COMPILE_STEPS + COMPILE_ROUNDS * STEPS)
    first, steady = batches[:COMPILE_STEPS], batches[COMPILE_STEPS:]
    torch._dynamo.reset()
    with fresh_cache():  # as at the first run on a machine
        sides = {how: Side(classifier(data.model, how)) for how in names}
        for side in sides.values():
            for batch in first:
                side.step(batch)
        run = {how: turns(side.step, steady, STEPS) for how, side in sides.items()}
        benchmark.group = f"accelerate {DEVICE.type}: PEFT with torch.compile(dynamic=True)"
        benchmark.pedantic(run["accelerated"], setup=others, rounds=COMPILE_ROUNDS)
    torch._dynamo.reset()
    begin = {how: sum(side.seconds[:COMPILE_STEPS]) for how, side in sides.items()}
    turn = {how: _by_turn(side) for how, side in sides.items()}
    step = {how: statistics.median(seconds) / STEPS for how, seconds in turn.items()}
    loss = {how: statistics.fmean(side.losses) for how, side in sides.items()}
    near = max(loss.values()) / min(loss.values()) - 1 <= LOSS_NOISE
    pairs = zip(turn["compiled"], turn["accelerated"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    notes = [
        f"{how:<12} measured: first {COMPILE_STEPS} steps {begin[how]:7.2f} s, then a step "
        f"{1e3 * step[how]:6.1f} ms (median); mean loss {loss[how]:.4f}"
        for how in names
    ]
    for steps in COMPILE_SUMS:
        total = {how: begin[how] + (steps - COMPILE_STEPS) * step[how] for how in names}
        notes.append(
            f"{steps} steps, computed from these and not measured: "
            + ", ".join(f"{how} {total[how]:.0f} s" for how in names)
            + f"; compiled to accelerated {total['compiled'] / total['accelerated']:.2f}x"
        )
    benchmark.extra_info.update(
        name="compiled, steady",
        ratio=statistics.median(ratios),
        low=ratios[len(ratios) // 4],
        high=ratios[-1 - len(ratios) // 4],
        milliseconds=1e3 * step["accelerated"] * STEPS,
        agrees=agrees and near,
        notes=notes,
    )


def _by_turn(side):
    """Seconds of each of a side's turns after its first steps."""
    steady = side.seconds[COMPILE_STEPS:]
    return [sum(steady[i : i + STEPS]) for i in range(0, len(steady), STEPS)]
