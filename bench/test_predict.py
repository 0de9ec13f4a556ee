"""Predictions for sentences in random order: against a pipeline of transformers and `encode`.

Ours is what `fastlora predict` does, from a file to a file, with the adapter merged. The pipeline
runs what `fastlora export --merged` writes of the run, and sentence-transformers the merged encoder
with the head as a linear layer. A ratio is the other side's time to ours; the other sides start
with a list of texts and end with a list of labels.
"""

import csv
import json
import statistics
import time
from itertools import cycle, islice

import pytest
import torch

import fastlora
from fastlora.runs.export import export
from fastlora.runs.prediction import predict_file
from fastlora.runs.trained import merge_encoder
from fastlora.training.inputs import find_inputs

SENTENCES, BATCH, ROUNDS, THREADS = 5000, 32, 2, 2


@pytest.fixture(scope="module")
def trained(pytestconfig, tmp_path_factory):
    """A run of a few steps, loaded, and its folder."""
    torch.set_num_threads(THREADS)
    option = pytestconfig.option
    config = fastlora.TrainConfig(
        model=option.model,
        data=option.data,
        tasks=("sst",),
        max_steps=20,
        limit=2000,
        out=tmp_path_factory.mktemp("runs") / "sst",
    )
    fastlora.run_training(config, quiet=True)
    return fastlora.load(config.out), config


@pytest.fixture(scope="module")
def texts(trained):
    """Sentences of the training file in random order, again from the first where it has fewer."""
    inputs = find_inputs(trained[1])
    path = inputs.folder / inputs.tasks["sst"].files["train"]
    with path.open(encoding="utf-8", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        sentences = [row["sentence"] for row in csv.DictReader(file, delimiter=delimiter)]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    return [sentences[i] for i in islice(cycle(order), SENTENCES)]


def same_labels(ours, theirs):
    """Whether nearly all labels agree: a tie may fall either way."""
    agree = sum(a.label == b for a, b in zip(ours, theirs, strict=True))
    return agree >= 0.999 * len(ours)


@pytest.fixture(scope="module")
def rows(texts, tmp_path_factory):
    """A file of the sentences."""
    path = tmp_path_factory.mktemp("rows") / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"sentence": text}) for text in texts))
    return path


def pipeline_side(model, folder):
    """The labels of sentences by transformers' pipeline."""
    from transformers import pipeline

    export(model, "sst", folder, merged=True)
    run = pipeline("text-classification", str(folder), device="cpu")
    return lambda sentences: [
        found["label"] for found in run(sentences, batch_size=BATCH, truncation=True)
    ]


def encode_side(model, folder):
    """The labels of sentences by sentence-transformers and the head."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    merge_encoder(model, "sst", folder)
    words = Transformer(str(folder))
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    encoder = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    head, names = model.model.heads["sst"], model.tasks["sst"].labels

    def run(sentences):
        states = encoder.encode(sentences, batch_size=BATCH, convert_to_tensor=True)
        with torch.inference_mode():
            return [names[i] for i in head(states).argmax(-1).tolist()]

    return run


def test_predict(benchmark, trained, texts, rows, tmp_path):
    model, _ = trained
    others = {
        "transformers.pipeline, batch 32": pipeline_side(model, tmp_path / "merged"),
        "sentence-transformers encode, a head": encode_side(model, tmp_path / "encoder"),
    }
    few = texts[:200]
    agrees = all(same_labels(model.predict(few), other(few)) for other in others.values())
    times = {name: [] for name in others}

    def theirs():
        for name, other in others.items():
            start = time.perf_counter()
            other(texts)
            times[name].append(time.perf_counter() - start)

    benchmark.group = "predict cpu: 5,000 sentences of SST in random order, ratio to"
    predict = lambda: predict_file(model, rows, rows.with_name("answers.csv"))  # noqa: E731
    benchmark.pedantic(predict, setup=theirs, rounds=ROUNDS)
    ours = benchmark.stats.stats.data
    facts = {}
    for name in others:
        ratios = sorted(a / b for a, b in zip(times[name], ours, strict=True))
        facts[name] = statistics.median(ratios), ratios[0], ratios[-1]
    (name, (ratio, low, high)), *more = facts.items()
    notes = [f"{other:<20} {r:5.2f}x [{a:.2f}, {b:.2f}]" for other, (r, a, b) in more]
    took = {"milliseconds": 1e3 * statistics.median(ours), "notes": notes}
    benchmark.extra_info.update(name=name, ratio=ratio, low=low, high=high, agrees=agrees, **took)
