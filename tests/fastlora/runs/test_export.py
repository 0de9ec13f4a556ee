"""Exported models: transformers, PEFT and ONNX compute what the run computes."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fastlora.data.tasks import BUILTIN
from fastlora.errors import UserError
from fastlora.multitask.predictor import predict
from fastlora.runs.export import export
from fastlora.runs.session import run_training
from fastlora.runs.trained import load

TEXTS = ["the good film .", "", "not very good", "a dog sees the red boat " * 30]
MANY = {
    "kind": "multilabel",
    "columns": ["sentence"],
    "label": "sentiment",
    "labels": ["0", "1", "2", "3", "4"],
    "files": {split: BUILTIN["sst"].files[split] for split in ("train", "dev")},
}


@pytest.fixture(scope="module")
def make(tiny_model, tiny_data, tmp_path_factory):
    from fastlora.training.config import TrainConfig

    def run(**changes):
        settings = {"model": str(tiny_model), "data": tiny_data, "device": "cpu", "lr": 2e-2}
        settings |= {"max_steps": 12, "tokens_per_batch": 256, "head_lr": 2e-2, "pairs": "joint"}
        config = TrainConfig(**settings | {"out": tmp_path_factory.mktemp("run") / "x"} | changes)
        run_training(config, quiet=True)
        return config.out

    return run


@pytest.fixture(scope="module")
def joint(make):
    return make(tasks=("sst", "many", "quora", "sts"), task={"many": MANY})


def logits_of(model, folder, texts):
    columns = [texts] if isinstance(texts[0], str) else list(map(list, zip(*texts, strict=True)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = {"truncation": True, "max_length": 64, "padding": True, "return_tensors": "pt"}
    batch = tokenizer(*columns, **limit)
    with torch.no_grad():
        return model.eval()(**batch).logits.double()


def expected(trained, texts, task):
    data = {task: trained.encode(texts, task)}
    return torch.from_numpy(predict(trained.model, data)[task]).double()


@pytest.mark.parametrize("task", ["sst", "many", "quora", "sts"])
def test_transformers_and_peft_compute_the_same_logits(joint, tiny_model, tmp_path, task):
    trained = load(joint, "cpu")
    texts = TEXTS if task in ("sst", "many") else list(zip(TEXTS, TEXTS[::-1], strict=True))
    wanted = expected(trained, texts, task)
    for merged in (False, True):
        out = tmp_path / f"merged {merged}"
        export(trained, task, out, merged)
        config = AutoConfig.from_pretrained(out)
        model = AutoModelForSequenceClassification.from_pretrained(
            out if merged else tiny_model, config=config
        )
        if not merged:
            untrained = logits_of(model, out, texts)
            model = peft.PeftModel.from_pretrained(model, out)
            assert isinstance(model, peft.PeftModelForSequenceClassification)
            assert (untrained - wanted).abs().max() > 0.1
        found = logits_of(model, out, texts)
        assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert trained.predict(texts, task) == load(joint, "cpu").predict(texts, task)
    assert wanted.std() > 0.1


@pytest.mark.parametrize("task", ["sst", "many", "quora", "sts"])
def test_a_pipeline_gives_the_probabilities_by_name(joint, tmp_path, task):
    trained = load(joint, "cpu")
    export(trained, task, tmp_path / "out", merged=True)
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    texts = inputs = [text for text in TEXTS[:3] if text]  # it drops a second text that is empty
    if task in ("quora", "sts"):
        texts = list(zip(texts, texts[::-1], strict=True))
        inputs = [{"text": a, "text_pair": b} for a, b in texts]
    for found, ours in zip(pipe(inputs), trained.predict(texts, task), strict=True):
        scores = {entry["label"]: entry["score"] for entry in found}
        if task == "sts":
            assert scores == {"similarity": pytest.approx(ours.score, abs=1e-5)}
        else:
            assert scores == pytest.approx(ours.probabilities, abs=1e-5)


def test_what_has_no_such_form_says_so(make, joint, tmp_path):
    separate = make(tasks=("sst", "quora"), pairs="separate", adapters="shared+per-task")
    both = load(separate, "cpu")
    for task, merged, message in (
        ("quora", True, "encodes the two texts of a pair separately"),
        ("sst", False, "has 2 adapters: only --merged"),
        ("stt", True, "expected one of sst, quora"),
    ):
        with pytest.raises(UserError, match=message):
            export(both, task, tmp_path / "out", merged)
    export(both, "sst", tmp_path / "out", merged=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    found = logits_of(model, tmp_path / "out", TEXTS)
    assert (found - expected(both, TEXTS, "sst")).abs().max() < 1e-5
    with pytest.raises(UserError, match="not empty"):
        export(both, "sst", tmp_path / "out", merged=True)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_run_without_adapters_is_exported_merged(make, tmp_path, mode):
    run = make(tasks=("sst",), mode=mode, lr=None)
    trained = load(run, "cpu")
    with pytest.raises(UserError, match="has 0 adapters"):
        export(trained, None, tmp_path / "out", merged=False)
    export(trained, None, tmp_path / "out", merged=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    found = logits_of(model, tmp_path / "out", TEXTS)
    assert (found - expected(trained, TEXTS, "sst")).abs().max() < 1e-5


def test_the_labels_have_their_names(joint, tmp_path):
    export(load(joint, "cpu"), "sst", tmp_path / "out", merged=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(5)}
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS" and "classifier" in adapter["modules_to_save"]


@pytest.mark.slow
def test_onnx_computes_the_same_logits(joint, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    trained, out = load(joint, "cpu"), tmp_path / "out"
    export(trained, "sst", out, merged=True)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    batch = AutoTokenizer.from_pretrained(out)(TEXTS[:3], padding=True, return_tensors="pt")
    free = {name: {0: torch.export.Dim("n"), 1: torch.export.Dim("s")} for name in batch}
    torch.onnx.export(model, (), str(tmp_path / "x.onnx"), kwargs=dict(batch), dynamic_shapes=free)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0]
    assert np.abs(found - expected(trained, TEXTS[:3], "sst").numpy()).max() < 1e-5
