"""Predictions for sentences in random order: against a pipeline of transformers and `encode`.

Ours is what `fastlora predict` does, from a file to a file, with the adapter merged. The pipeline
runs what `fastlora export --merged` writes of the run, and sentence-transformers the merged encoder
with the head as a linear layer. A ratio is the other side's time to ours; the other sides start
with a list of texts and end with a list of labels.
"""

import csv
import json
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


def test_pipeline(compare, trained, texts, rows, tmp_path):
    from transformers import pipeline

    model, _ = trained
    export(model, "sst", tmp_path / "merged", merged=True)
    other = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")
    labels = [found["label"] for found in other(texts[:500], batch_size=BATCH, truncation=True)]
    compare(
        "predict cpu: 5,000 sentences of SST in random order, ratio to",
        lambda: other(texts, batch_size=BATCH, truncation=True),
        lambda: predict_file(model, rows, rows.with_name("answers.csv")),
        "cpu",
        rounds=ROUNDS,
        warm=True,
        name="transformers.pipeline, batch 32",
        agrees=same_labels(model.predict(texts[:500]), labels),
    )


def test_sentence_transformers(compare, trained, texts, rows, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model, _ = trained
    merge_encoder(model, "sst", tmp_path / "encoder")
    words = Transformer(str(tmp_path / "encoder"))
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    other = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    head = model.model.heads["sst"]
    names = model.tasks["sst"].labels

    def predict(sentences):
        states = other.encode(sentences, batch_size=BATCH, convert_to_tensor=True)
        with torch.inference_mode():
            return [names[i] for i in head(states).argmax(-1).tolist()]

    compare(
        "predict cpu: 5,000 sentences of SST in random order, ratio to",
        lambda: predict(texts),
        lambda: predict_file(model, rows, rows.with_name("answers.csv")),
        "cpu",
        rounds=ROUNDS,
        warm=True,
        name="sentence-transformers encode and a head",
        agrees=same_labels(model.predict(texts[:500]), predict(texts[:500])),
    )
