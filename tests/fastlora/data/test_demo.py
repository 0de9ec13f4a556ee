"""The demo corpus: what its generator writes, readable strictly, and split without overlap."""

import itertools
import re

import numpy as np
import pytest
from make_demo import COSTS, DEV, FORMS, LEXICON, TRAIN, Writer, write_demo

from fastlora.data import DEMO
from fastlora.data.reading import read_rows
from fastlora.data.tasks import BUILTIN

NAMES = ("sst", "quora", "sts")


def rows_of(name, split):
    return read_rows(DEMO / BUILTIN[name].files[split], BUILTIN[name])


def test_the_generator_writes_the_files_that_are_shipped(tmp_path):
    write_demo(tmp_path / "again")
    write_demo(tmp_path / "other", seed=1)
    files = sorted(path.name for path in DEMO.iterdir())
    assert files == sorted(BUILTIN[n].files[s] for n in NAMES for s in ("train", "dev"))
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (DEMO / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (DEMO / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_sentence_and_repeat_no_example(name):
    train, dev = rows_of(name, "train"), rows_of(name, "dev")
    assert (len(train.ids), len(dev.ids)) == (TRAIN, DEV)
    assert train.skipped == train.empty == dev.skipped == dev.empty == 0
    sentences = [set(itertools.chain(*rows.texts)) for rows in (train, dev)]
    assert sentences[0].isdisjoint(sentences[1])
    for rows in (train, dev):
        examples = list(zip(*rows.texts, strict=True))
        assert len(set(examples)) == len(examples)
        assert all(len(set(texts)) == len(texts) for texts in examples)
    ids = train.ids + dev.ids
    assert len(set(ids)) == len(ids)
    assert {len(identity) for identity in ids} == {25}


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_short_and_well_formed(name):
    sentences = list(itertools.chain(*rows_of(name, "train").texts))
    words = np.array([len(sentence.split()) for sentence in sentences])
    assert 8 <= np.median(words) <= 20
    assert words.max() <= 32
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence[-1] in ".?"
        assert not set("{}|/\t") & set(sentence)
        assert "  " not in sentence


def test_labels_are_balanced():
    classes = np.bincount(rows_of("sst", "train").labels.astype(int)) / TRAIN
    assert len(classes) == 5
    assert classes.min() > 0.12
    assert classes.max() < 0.32
    assert 0.38 < rows_of("quora", "train").labels.mean() < 0.5
    similarity = rows_of("sts", "train").labels
    assert (similarity.min(), similarity.max()) == (0, 5)
    assert similarity.std() > 1.5


def test_dev_uses_words_that_training_never_shows():
    text = {
        split: " ".join(t for n in NAMES for ts in rows_of(n, split).texts for t in ts)
        for split in ("train", "dev")
    }
    held = [
        word for _, *rest in LEXICON.values() for word in itertools.chain(*itertools.chain(*rest))
    ]
    starts = {word: re.compile(rf"\b{word}", re.IGNORECASE) for word in held}
    assert [word for word in held if starts[word].search(text["train"])] == []
    assert len([word for word in held if starts[word].search(text["dev"])]) > 0.9 * len(held)


def test_lexicon_and_forms_agree():
    for kind, (shown, *held) in LEXICON.items():
        meanings = [*shown, *itertools.chain(*held)]
        words = [word for meaning in meanings for word in meaning]
        assert len(set(words)) == len(words), kind
        assert len(held) <= 1, kind
    writer = Writer([0], dev=True)
    for forms in FORMS["questions"]:
        slots = writer.fill(forms)
        assert set(slots) & set(FORMS["opposites"])
        for form in forms:
            # Every way of asking says the same things.
            assert all("{" + slot + "}" in form for slot in slots)
    assert min(COSTS.values()) > 0
