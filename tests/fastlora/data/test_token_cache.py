"""Tokens kept on disk: found again when nothing changed, and never when anything did."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest

from fastlora.data import token_cache as cache
from fastlora.data.batches import collate, plan_epoch
from fastlora.data.tasks import BUILTIN, task_from_table
from fastlora.data.token_cache import load_tasks
from fastlora.data.tokenizer import Tokenizer
from fastlora.errors import UserError

SST, QUORA, STS = BUILTIN["sst"], BUILTIN["quora"], BUILTIN["sts"]
HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
ROWS = "0\ta\tthe good film\tnot good ?\t1\n1\tb\tthe\t\t0.0\n2\tc\ta cat\tred red dog .\t1\n"


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """A function that lists the entries of a new cache."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache").glob("tokens/*"))


@pytest.fixture
def folder(tmp_path):
    """A data folder with a training file of three Quora pairs."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "quora-train.csv").write_text(HEADER + ROWS)
    return folder


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model's tokenizer, to edit."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("vocab.txt", "config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


@pytest.fixture
def tokenizer(tiny_model):
    return Tokenizer.from_folder(tiny_model)


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows with every file that is tokenised."""
    calls = []

    def encode_rows(rows, *arguments):
        calls.append(rows)
        return encode(rows, *arguments)

    encode = cache.encode_rows
    monkeypatch.setattr(cache, "encode_rows", encode_rows)
    return calls


def load(folder, tokenizer, task=QUORA, split="train", **options):
    return load_tasks(folder, [task], split, tokenizer, **options)[task.name]


def same(a, b):
    assert [x.name for x in fields(a)] == [x.name for x in fields(b)]
    assert (a.task, a.ids, len(a.columns)) == (b.task, b.ids, len(b.columns))
    assert (a.skipped, a.truncated, a.empty) == (b.skipped, b.truncated, b.empty)
    pairs = [(a.labels, b.labels)]
    for x, y in zip(a.columns, b.columns, strict=True):
        assert x.truncated == y.truncated
        pairs += [(x.ids, y.ids), (x.offsets, y.offsets), (x.types, y.types)]
    for x, y in pairs:
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("pairs", ["separate", "joint"])
def test_the_second_load_reads_what_the_first_tokenised(
    folder, tokenizer, entries, monkeypatch, pairs
):
    long = f"3\td\t{'cat ' * 600}\tdog\t1\n4\te\tno label\tx\t\n"
    (folder / "quora-train.csv").write_text(HEADER + ROWS + long)
    first = load(folder, tokenizer, pairs=pairs, bad_rows="skip")
    assert (first.skipped, first.truncated, first.empty) == (1, 1, 1)
    monkeypatch.setattr(tokenizer, "encode", None)
    again = load(folder, tokenizer, pairs=pairs, bad_rows="skip")
    same(first, again)
    assert len(entries()) == 1
    plans = [plan_epoch({"quora": data}, 16, 0, 0) for data in (first, again)]
    for plan, other in zip(*plans, strict=True):
        assert np.array_equal(plan, other)
        a, b = collate({"quora": first}, plan), collate({"quora": again}, plan)
        assert a.input_ids.equal(b.input_ids) and a.token_type_ids.equal(b.token_type_ids)
        assert a.labels["quora"].equal(b.labels["quora"])


def test_a_moved_or_touched_file_is_the_same(folder, tokenizer, entries, encoded, tmp_path):
    first = load(folder, tokenizer)
    os.utime(folder / "quora-train.csv", (0, 0))
    moved = folder.rename(tmp_path / "elsewhere")
    same(first, load(moved, tokenizer))
    assert len(encoded) == len(entries()) == 1


def test_an_edited_file_is_read_again(folder, tokenizer, entries):
    path = folder / "quora-train.csv"
    before, times = load(folder, tokenizer), (path.stat().st_atime, path.stat().st_mtime)
    path.write_text(HEADER + ROWS.replace("cat", "dog"))  # as long as it was, and as old
    os.utime(path, times)
    after = load(folder, tokenizer)
    assert not np.array_equal(before.columns[0].ids, after.columns[0].ids)
    assert len(entries()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": "joint"},
        {"bad_rows": "skip"},
        {"quoting": "none"},
        {"limit": 2},
        {"task": replace(QUORA, labels=("1", "0"))},
        {"task": replace(QUORA, columns=("sentence2", "sentence1"))},
        {"task": replace(STS, label="is_duplicate", files=QUORA.files)},
    ],
)
def test_another_reading_is_another_entry(folder, tokenizer, entries, encoded, change):
    first = load(folder, tokenizer)
    other = load(folder, tokenizer, **change)
    assert len(entries()) == len(encoded) == 2
    same(first, load(folder, tokenizer))
    same(other, load(folder, tokenizer, **change))
    assert len(encoded) == 2


def test_the_same_bytes_under_another_suffix_are_read_again(folder, tokenizer, encoded):
    shutil.copy(folder / "quora-train.csv", folder / "quora.tsv")
    load(folder, tokenizer)
    load(folder, tokenizer, replace(QUORA, files={"train": "quora.tsv"}))
    assert len(encoded) == 2


def test_an_edited_tokenizer_tokenises_again(folder, model, entries):
    def ids():
        return load(folder, Tokenizer.from_folder(model)).columns[0].ids.tolist()

    before = ids()
    vocabulary = model / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("cat\n", "caterpillar\n"))
    assert ids() != before and len(entries()) == 2
    # A rule that neither the vocabulary nor the fingerprint's probe shows.
    tokenizer = Tokenizer.from_folder(model)
    rules = json.loads(tokenizer.definition[tokenizer.definition.index("{") :])
    rules["model"]["max_input_chars_per_word"] = 3
    (model / "tokenizer.json").write_text(json.dumps(rules))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert Tokenizer.from_folder(model).fingerprint == tokenizer.fingerprint
    known = ids()
    assert len(entries()) == 3 and known != before


def test_nothing_is_kept_of_a_file_with_errors(folder, tokenizer, entries):
    (folder / "quora-train.csv").write_text(HEADER + ROWS + "4\te\tx\ty\t\n")
    messages = set()
    for _ in range(2):
        with pytest.raises(UserError, match=r"quora-train\.csv:5: column 'is_dupl") as error:
            load(folder, tokenizer)
        messages.add(str(error.value))
    assert len(messages) == 1 and not entries()
    load(folder, tokenizer, bad_rows="skip")
    with pytest.raises(UserError):
        load(folder, tokenizer)
    with pytest.raises(UserError, match=r"quora-dev\.csv: cannot be read: No such file"):
        load(folder, tokenizer, split="dev")
    table = {**SST.to_table(), "files": {"train": "a", "dev": "b"}}
    with pytest.raises(UserError, match="task 'own' names no test file"):
        load(folder, tokenizer, task_from_table("own", table), "test")


@pytest.mark.parametrize("harm", ["pipe", "emptied", "cut", "flipped", "another's"])
def test_a_damaged_entry_is_written_anew(folder, tokenizer, entries, encoded, harm):
    first = load(folder, tokenizer, pairs="joint")
    file = entries()[0] / "tokens.npz"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(first.labels.tobytes())] ^= 1
    load(folder, tokenizer)
    (others,) = (path.read_bytes() for path in file.parents[1].glob("*/*.npz") if path != file)
    ruin = {"emptied": b"", "cut": whole[:-1], "flipped": flipped, "another's": others}
    file.unlink()
    os.mkfifo(file) if harm == "pipe" else file.write_bytes(ruin[harm])
    for _ in range(2):
        same(first, load(folder, tokenizer, pairs="joint"))
        assert len(encoded) == 3


def test_no_flipped_bit_is_read(folder, tokenizer, entries):
    first = load(folder, tokenizer)
    file = entries()[0] / "tokens.npz"
    whole = file.read_bytes()
    for place in range(0, len(whole), 19):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        same(first, load(folder, tokenizer))


def test_a_cache_that_cannot_be_written_is_done_without(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    same(load(folder, tokenizer), load(folder, tokenizer))
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "full"))

    def no_space(file, **arrays):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", no_space)
        load(folder, tokenizer)
    assert not list((tmp_path / "full" / "tokens").iterdir())


def test_many_at_once(folder, tiny_model, entries):
    def ranks(i):
        tokenizer = Tokenizer.from_folder(tiny_model)
        for _ in range(10):
            data = load(folder, tokenizer)
            assert data.ids == ["a", "b", "c"] and data.columns[0].ids[0] == 2
            if i == 0 and (found := entries()):
                (found[0] / "tokens.npz").unlink(missing_ok=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ranks, range(8)))
    load(folder, Tokenizer.from_folder(tiny_model))
    assert len(entries()) == 1
