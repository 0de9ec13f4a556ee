import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from fastlora.bert.config import BertConfig
from fastlora.bert.model import ACTIVATIONS
from fastlora.errors import UserError

BASE = BertConfig(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)


def write(folder: Path, **changes) -> Path:
    values = json.loads(transformers.BertConfig().to_json_string(use_diff=False))
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_defaults_are_transformers_own(tmp_path):
    assert BertConfig.from_json(write(tmp_path)) == BASE


def test_unknown_keys_are_ignored(tmp_path):
    assert BertConfig.from_json(write(tmp_path, chunk_size_feed_forward=7)) == BASE


def test_transformers_reads_what_we_write(tmp_path):
    config = replace(BASE, hidden_size=24, num_attention_heads=3, layer_norm_eps=1e-5)
    config.to_json(tmp_path / "config.json")
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert theirs.hidden_size == 24
    assert theirs.layer_norm_eps == 1e-5
    assert theirs.architectures == ["BertModel"]
    assert BertConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_robertas_are_read_and_written_under_their_names(tmp_path, kind):
    values = getattr(transformers, f"{kind}Config")(max_position_embeddings=514).to_dict()
    del values["pad_token_id"]  # then it is 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = BertConfig.from_json(tmp_path / "config.json")
    assert (config.pad_token_id, config.longest) == (1, 512)
    config.to_json(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == f"{kind}Config"
    assert (theirs.architectures, theirs.pad_token_id) == ([f"{kind}Model"], 1)
    assert BertConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("kind", ["deberta-v2", "distilbert", "mpnet", "modernbert", "new"])
def test_other_models_are_sent_to_accelerate(tmp_path, kind):
    with pytest.raises(UserError, match=rf"model_type is '{kind}' .*fastlora\.accelerate"):
        BertConfig.from_json(write(tmp_path, model_type=kind))


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation_of_the_model_is_read(tmp_path, act):
    assert BertConfig.from_json(write(tmp_path, hidden_act=act)).hidden_act == act


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "xlm-roberta-xl"),
        ("max_position_embeddings", 2),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("type_vocab_size", 0),
        ("vocab_size", 30522.0),
        ("pad_token_id", 99999),
        ("layer_norm_eps", "x"),
        ("hidden_dropout_prob", float("nan")),
        ("attention_probs_dropout_prob", 7.5),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_act", "swish"),
        ("hidden_size", 770),
        ("intermediate_size", None),
    ],
)
def test_refuses_by_name_what_minbert_cannot_do(tmp_path, key, value):
    path = write(tmp_path, **{key: value})
    with pytest.raises(UserError, match=key) as caught:
        BertConfig.from_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"vocab_size": '])
def test_broken_json_names_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        BertConfig.from_json(path)
