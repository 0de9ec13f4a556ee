"""The tokens of a checkpoint's folder, against transformers' AutoTokenizer on the same folder."""

import json
import shutil

import pytest
import transformers
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


SIZES = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), 1)
MODEL = {"model_type": "bert", "vocab_size": NEXT + 8, "intermediate_size": 1, **SIZES}


def write(folder, files, vocabulary=VOCABULARY):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {**MODEL, **files.get("config", {})}
    files = {**files, "config": config}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def check(folder, reference=None):
    """Compare all texts and pairs, whole and cut to 8 tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(reference or folder)
    for longest in (8, 512):
        config = {**MODEL, "max_position_embeddings": longest}
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
    Source(folder, "model", "model").copy_tokenizer(tmp_path / "copy")
    shutil.copy(folder / "config.json", tmp_path / "copy")
    check(tmp_path / "copy", folder)


@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "BertJapaneseTokenizer is not one of the fast",
        ),
        ({"tokenizer_class": "RobertaTokenizer"}, "which a RobertaTokenizer reads"),
        ({"tokenizer_class": "Unknown"}, "Couldn't instantiate the backend .* sentencepiece"),
        (GENERIC, "Couldn't instantiate the backend .* sentencepiece"),
    ],
)
def test_classes_that_do_not_fit_are_refused(tmp_path, given, cause, file):
    given = {"word_tokenizer_type": "basic", **given}
    folder = write(tmp_path / "model", {file: given})
    with pytest.raises(UserError, match=f"cannot be used: .*{cause}") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [["code.Own", None], [None, "code.Own"]])
def test_code_beside_the_files_is_refused_by_name(tmp_path, classes):
    given = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": classes}}
    files = {"tokenizer": tokenizer_json(), "tokenizer_config": given}
    with pytest.raises(UserError, match=r"code\.Own"):
        Tokenizer.from_folder(write(tmp_path / "model", files))


@pytest.mark.parametrize("value", ["128", -1, 0, 2, 1.5, True, 2**70])
def test_a_maximum_length_that_is_no_number_is_refused(tmp_path, value):
    folder = write(tmp_path / "model", {"config": {"max_position_embeddings": value}})
    with pytest.raises(UserError, match=r"config\.json: max_position_embeddings is ") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"post_processor": None}, "an empty text has no tokens"),
        ({"model": {"type": "WordPiece"}}, "missing field"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "did not match"),
    ],
)
def test_a_tokenizer_json_that_is_broken_is_refused(tmp_path, change, cause):
    files = {"tokenizer": tokenizer_json(**change), "tokenizer_config": GENERIC}
    folder = write(tmp_path / "model", files)
    with pytest.raises(UserError, match=cause) as error:
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


@pytest.mark.parametrize("kinds", [(0, 0, 300), (0, 0, 1), (1, 0, 0), (0, 0, 0)])
def test_types_are_those_of_the_template_and_the_model_must_know_them(tmp_path, kinds):
    files = {"tokenizer": with_types(*kinds), "tokenizer_config": GENERIC}
    folder = write(tmp_path / "model", files)
    tokenizer = Tokenizer.from_folder(folder)
    assert set(tokenizer.encode(["good film"]).types) == {kinds[0]}
    if kinds[2] < 2:
        assert set(tokenizer.encode(["good"], ["film"]).types) == set(kinds[1:])
    else:
        known = "tokens of type 300 but the model has type_vocab_size 2"
        with pytest.raises(UserError, match=known):
            tokenizer.encode(["good"], ["film"])


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_tokenizer_that_names_another_file_is_refused(tiny_model, tmp_path, key):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    Tokenizer.from_folder(folder)._backend.save(str(folder / "tokenizer.json"))
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"][key] = str(folder / "vocab.txt")
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"tokenizer\.json names another file"):
        Tokenizer.from_folder(folder)
