import json
import logging
import os
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import transformers

from fastlora.data.tokenizer import Tokenizer
from fastlora.errors import UserError

GOLDEN = [101, 7592, 1010, 2026, 3899, 2003, 10140, 102]
TEXTS = [
    "Hello, my dog is cute",
    "",
    "   ",
    " A PTB-tokenised review , with a leading space . <br /><br />",
    "The Café's naïve ÅNGSTRÖM",
    "東京 2.5 % of 北京",
    "tabs\tand\nnewlines\r\nand\u200bzero\u00a0width\x00\ufffd",
    'don\'t--STOP... """quoted""" #$%^&*',
    "😀 emoji and ﬁ ligatures, ½",
    "a literal [SEP] and [MASK] and [PAD] in text",
    "x" * 101 + " " + "y" * 99,
    "antidisestablishmentarianism " * 30,
]
LONG = "long " * 700


@pytest.fixture(scope="module")
def ours(minilm):
    return Tokenizer.from_folder(minilm)


@pytest.fixture(scope="module")
def theirs(minilm):
    return transformers.BertTokenizer.from_pretrained(minilm)


@pytest.fixture
def vocab_only(minilm, tmp_path):
    for name in ("vocab.txt", "config.json"):
        shutil.copy(minilm / name, tmp_path)
    return tmp_path


def sequences(encoded, values=None):
    values = encoded.ids if values is None else values
    return [part.tolist() for part in np.split(values, encoded.offsets[1:-1])]


def test_golden_ids(ours):
    encoded = ours.encode(["Hello, my dog is cute"])
    assert encoded.ids.tolist() == GOLDEN
    assert (encoded.ids.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    assert (len(encoded.offsets), set(encoded.types), encoded.truncated) == (2, {0}, 0)


def test_joint_pairs_need_room(ours):
    """Of a token of each text, besides the special ones."""
    backend = deepcopy(ours._backend)
    assert len(Tokenizer(backend, 5, "right").encode(["a"], ["b"]).ids) == 5
    short = Tokenizer(backend, 4, "right")
    assert len(short.encode(["a good film"]).ids) == 4
    with pytest.raises(UserError, match=r"5 tokens or more but .* for 4; use --pairs separate"):
        short.encode(["a"], ["b"])


def test_texts_match_transformers(ours, theirs):
    expected = theirs([*TEXTS, LONG], truncation=True, max_length=512)["input_ids"]
    encoded = ours.encode([*TEXTS, LONG])
    assert sequences(encoded) == expected
    assert encoded.truncated == 1


@pytest.mark.parametrize("max_length", [512, 48, 13, 8])
def test_pairs_match_transformers(theirs, max_length):
    long = "long " * (max_length + 60)
    a = [*TEXTS, long, "short", long]
    b = [*reversed(TEXTS), "short", long, long]
    expected = theirs(a, b, truncation="longest_first", max_length=max_length)
    encoded = Tokenizer(deepcopy(theirs.backend_tokenizer), max_length, "right").encode(a, b)
    assert sequences(encoded) == expected["input_ids"]
    assert sequences(encoded, encoded.types) == expected["token_type_ids"]
    assert encoded.types.dtype == np.int8
    whole = theirs(a, b)["input_ids"]
    assert encoded.truncated == sum(len(ids) > max_length for ids in whole)


def test_vocabulary_file_alone_does_the_same(ours, vocab_only):
    rebuilt = Tokenizer.from_folder(vocab_only)
    assert sequences(rebuilt.encode(TEXTS)) == sequences(ours.encode(TEXTS))
    assert rebuilt.fingerprint == ours.fingerprint


def test_cased_rules_come_from_the_config(ours, vocab_only):
    rules = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (vocab_only / "tokenizer_config.json").write_text(json.dumps(rules))
    cased = Tokenizer.from_folder(vocab_only)
    assert cased.fingerprint != ours.fingerprint
    theirs = transformers.BertTokenizer.from_pretrained(vocab_only)
    assert sequences(cased.encode(TEXTS)) == theirs(TEXTS)["input_ids"]


def test_more_texts_than_a_chunk_keep_their_order(ours, monkeypatch):
    monkeypatch.setattr("fastlora.data.tokenizer._CHUNK", 3)
    encoded = ours.encode(TEXTS)
    assert sequences(encoded) == [ours.encode([text]).ids.tolist() for text in TEXTS]


def test_no_texts(ours):
    encoded = ours.encode([], [])
    assert (encoded.offsets.tolist(), encoded.ids.size, encoded.types.size) == ([0], 0, 0)


def test_pairs_of_different_counts_are_refused(ours):
    with pytest.raises(ValueError, match="shorter"):
        ours.encode(["a", "b"], ["c"])


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_only_a_regular_file_is_a_vocabulary(vocab_only, make):
    """Of anything else, transformers makes an empty one, without a word."""
    (vocab_only / "vocab.txt").unlink()
    make(vocab_only / "vocab.txt")
    with pytest.raises(UserError, match=r"found none of vocab\.txt"):
        Tokenizer.from_folder(vocab_only)


def test_reading_leaves_the_logging_of_transformers_alone(vocab_only, caplog):
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        Tokenizer.from_folder(vocab_only)
        assert logger.level == logging.DEBUG
        (vocab_only / "vocab.txt").unlink()
        with pytest.raises(UserError, match=r"found none of vocab\.txt, tokenizer\.json"):
            Tokenizer.from_folder(vocab_only)
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: cannot be read as JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: holds a JSON list"),
        ("vocab.txt", "[CLS]\n[SEP]\nhello\n", r"Missing \[UNK\] token"),
        ("vocab.txt", "\n".join(map(str, range(30530))), "30535 tokens but the model 30522"),
    ],
)
def test_broken_files_are_named(vocab_only, name, text, cause):
    (vocab_only / name).write_text(text)
    with pytest.raises(UserError, match=cause) as error:
        Tokenizer.from_folder(vocab_only)
    assert "\n" not in str(error.value)
