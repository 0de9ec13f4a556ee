"""The tokens of a checkpoint's folder, against transformers' AutoTokenizer on the same folder."""

import json
import shutil

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers.implementations import BertWordPieceTokenizer

from fastlora.data.source import Source
from fastlora.data.tokenizer import Tokenizer
from fastlora.errors import UserError

WORDS = ["the", "good", "Good", "film", "café", "cafe", "ent", "sep", "SEP", "cls", "mask", "東京"]
MARKS = "[]/-.,東京"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>é"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "<s>", "</s>", *WORDS, *MARKS, *LETTERS, *(f"##{x}" for x in LETTERS)]
NEXT = len(VOCABULARY)
TEXTS = [
    "Good film, good Café at the cafe.",
    "good <ent> film<ent>s < ent > <ENT>, <Ent>good",
    "a literal [SEP] and [CLS] and [MASK] and [PAD], [sep] <s>x</s>",
    "東京 東 京 the東京good",
    "fi[MASK]lm a-b--<new>, <x> <y>x",
    "",
]


def entry(content, **rules):
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **plain, **rules}


def tokenizer_json(lowercase=True, words=3, added=(), **changes):
    """What tokenizer.json holds, with rules that BertTokenizer does not look at."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    built = json.loads(BertWordPieceTokenizer(vocabulary, lowercase=lowercase).to_str())
    built["model"]["max_input_chars_per_word"] = words
    built["added_tokens"] += [{"id": NEXT + i, **token} for i, token in enumerate(added)]
    return {**built, **changes}


LEFT = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# The files beside vocab.txt and config.json.
FOLDERS = {
    "vocabulary alone": {},
    "cased": {"tokenizer_config": {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}},
    "accents kept": {"tokenizer_config": {"strip_accents": False}},
    "accents stripped, cased": {
        "tokenizer_config": {"strip_accents": True, "do_lower_case": False}
    },
    "Chinese words": {"tokenizer_config": {"tokenize_chinese_chars": False}},
    "tokenizer.json lowers, its configuration does not": {
        "tokenizer": tokenizer_json(),
        "tokenizer_config": {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"},
    },
    "tokenizer.json is cased, without a configuration": {"tokenizer": tokenizer_json(False)},
    "tokenizer.json as it is": {
        "tokenizer": tokenizer_json(False),
        "tokenizer_config": {**GENERIC, "do_lower_case": True},
    },
    "tokenizer.json as it is, with a token added": {
        "tokenizer": tokenizer_json(added=[entry("<ent>")]),
        "tokenizer_config": {**GENERIC, "additional_special_tokens": ["<new>"]},
    },
    "added in the configuration": {
        "tokenizer_config": {"added_tokens_decoder": {str(NEXT): entry("<ent>")}},
    },
    "added in the configuration, not by number": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(NEXT + 1): entry("<new>"),
                str(NEXT): entry("<ent>", normalized=True, lstrip=True, single_word=True),
                "3": entry("[SEP]", special=True),
            }
        },
    },
    "added in a file of their own": {"added_tokens": {"<new>": NEXT + 1, "<ent>": NEXT}},
    "added in a file of their own, one special": {
        "added_tokens": {"<ent>": NEXT, "<new>": NEXT + 1},
        "special_tokens_map": {"additional_special_tokens": ["<new>"]},
    },
    "added in tokenizer.json": {"tokenizer": tokenizer_json(added=[entry("<ent>", rstrip=True)])},
    "added in tokenizer.json, not in the configuration": {
        "tokenizer": tokenizer_json(added=[entry("<ent>")]),
        "tokenizer_config": {"added_tokens_decoder": {str(NEXT): entry("<new>")}},
    },
    "other special tokens": {
        "tokenizer_config": {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "[PAD]"},
    },
    "special tokens in their map": {
        "special_tokens_map": {"cls_token": "<s>", "sep_token": entry("</s>", lstrip=True)},
        "tokenizer_config": {"cls_token": "[CLS]", "mask_token": {"__type": "AddedToken"}}
        | {"mask_token": {"__type": "AddedToken", **entry("[MASK]", lstrip=True)}},
    },
    "a map that the configuration overrides": {
        "special_tokens_map": {"cls_token": "<s>"},
        "tokenizer_config": {"added_tokens_decoder": {}, "cls_token": "[CLS]"},
    },
    "further special tokens": {"tokenizer_config": {"extra_special_tokens": ["<ent>", "<new>"]}},
    "further special tokens, with names": {
        "tokenizer_config": {"extra_special_tokens": {"x_token": "<x>"}, "y_token": "<y>"},
    },
    "no further special tokens": {
        "tokenizer_config": {"extra_special_tokens": {}, "additional_special_tokens": ["<ent>"]},
    },
    "special tokens split": {"tokenizer_config": {"split_special_tokens": True}},
    "cut on the left": {"tokenizer_config": {"truncation_side": "left"}},
    "cut on the left by tokenizer.json": {"tokenizer": tokenizer_json(truncation=LEFT)},
    "cut on the left by tokenizer.json as it is": {
        "tokenizer": tokenizer_json(truncation=LEFT),
        "tokenizer_config": GENERIC,
    },
}


def write(folder, files, vocabulary=VOCABULARY):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {"model_type": "bert", "max_position_embeddings": 8}
    for name, value in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def check(folder, reference=None):
    """Compare all texts and pairs, whole and cut to 8 tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(reference or folder)
    for longest in (8, 512):
        config = {"model_type": "bert", "max_position_embeddings": longest}
        (folder / "config.json").write_text(json.dumps(config))
        ours = Tokenizer.from_folder(folder)
        options = {"truncation": True, "max_length": longest, "return_token_type_ids": True}
        for pair in ((TEXTS,), (TEXTS, TEXTS[::-1])):
            expected = theirs(*pair, **options)
            encoded = ours.encode(*pair)
            bounds = list(zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True))
            found = [encoded.ids[start:stop].tolist() for start, stop in bounds]
            assert found == expected["input_ids"], list(map(theirs.convert_ids_to_tokens, found))
            if len(pair) == 2:
                types = [encoded.types[start:stop].tolist() for start, stop in bounds]
                assert types == expected["token_type_ids"]
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_are_those_of_transformers(tmp_path, name):
    check(write(tmp_path / "model", FOLDERS[name]))


@pytest.mark.parametrize("missing", ["[PAD]", "[MASK]"])
def test_a_vocabulary_without_a_special_token(tmp_path, missing):
    check(write(tmp_path / "model", {}, [token for token in VOCABULARY if token != missing]))


def test_what_transformers_saves_after_adding_tokens(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "old", {}))
    tokenizer.add_tokens(["<ent>", "<new>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    write(tmp_path / "new", {})
    tokenizer.save_pretrained(tmp_path / "new")
    check(tmp_path / "new")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json lowers, its configuration does not",
        "added in a file of their own, one special",
        "special tokens in their map",
    ],
)
def test_a_copied_tokenizer_gives_the_same_tokens(tmp_path, name):
    folder = write(tmp_path / "model", FOLDERS[name])
    (folder / "model.safetensors").touch()
    (tmp_path / "copy").mkdir()
    Source(folder, "model").copy_tokenizer(tmp_path / "copy")
    shutil.copy(folder / "config.json", tmp_path / "copy")
    check(tmp_path / "copy", folder)


@pytest.mark.parametrize(
    "kind", ["BertJapaneseTokenizer", "RobertaTokenizerFast", "DistilBertTokenizer", "Unknown"]
)
@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_other_classes_are_refused_by_name(tmp_path, kind, file):
    given = {"model_type": "bert", "tokenizer_class": kind, "word_tokenizer_type": "mecab"}
    folder = write(tmp_path / "model", {file: given})
    expected = "expected BertTokenizer, or PreTrainedTokenizerFast with a tokenizer.json"
    with pytest.raises(UserError, match=rf"tokenizer_class is '{kind}' \({expected}\)"):
        Tokenizer.from_folder(folder)


def test_a_generic_class_needs_a_tokenizer_json(tmp_path):
    folder = write(tmp_path / "model", {"tokenizer_config": GENERIC})
    with pytest.raises(UserError, match="'PreTrainedTokenizerFast'"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("value", ["128", -1, 0, 2, None, 1.5, True, 2**70])
def test_a_maximum_length_that_is_no_number_is_refused(tmp_path, value):
    folder = write(tmp_path / "model", {"config": {"max_position_embeddings": value}})
    with pytest.raises(UserError, match=r"config\.json: max_position_embeddings is ") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": None},
        {"model": {"type": "WordPiece"}},
        {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 3]}},
        {"post_processor": {"type": "TemplateProcessing"}},
    ],
)
def test_a_tokenizer_json_that_is_not_berts_is_refused(tmp_path, change):
    files = {"tokenizer": tokenizer_json(**change), "tokenizer_config": GENERIC}
    folder = write(tmp_path / "model", files)
    with pytest.raises(UserError, match="not a BERT tokenizer") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


def with_types(one, first, second):
    """tokenizer.json with these types: of a text alone, and of the two of a pair."""
    built = tokenizer_json()
    ids = {token: VOCABULARY.index(token) for token in ("[CLS]", "[SEP]")}

    def template(parts):
        kinds = {"A": "Sequence", "B": "Sequence"}
        return [{kinds.get(n, "SpecialToken"): {"id": n, "type_id": kind}} for n, kind in parts]

    text = [("[CLS]", first), ("A", first), ("[SEP]", first)]
    built["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template([(name, one) for name, _ in text]),
        "pair": template([*text, ("B", second), ("[SEP]", second)]),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in ids.items()
        },
    }
    return built


def test_types_of_a_pair_must_be_two(tmp_path):
    built = with_types(0, 0, 300)
    assert Backend.from_str(json.dumps(built)).encode("", "").type_ids == [0, 0, 300]
    folder = write(tmp_path / "model", {"tokenizer": built, "tokenizer_config": GENERIC})
    with pytest.raises(UserError, match=r"types of a pair's tokens are \[0, 0, 300\]"):
        Tokenizer.from_folder(folder)


def test_a_text_alone_is_of_the_first_type_whatever_its_file_says(tmp_path):
    files = {"tokenizer": with_types(300, 0, 1), "tokenizer_config": GENERIC}
    tokenizer = Tokenizer.from_folder(write(tmp_path / "model", files))
    assert set(tokenizer.encode(["good film"]).types) == {0}
    assert set(tokenizer.encode(["good"], ["film"]).types) == {0, 1}
