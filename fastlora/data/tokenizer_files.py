"""The tokenizer of a checkpoint's files, built as transformers 5 builds it, for the same tokens."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from fastlora.errors import UserError
from fastlora.files import read_json

# These classes rebuild WordPiece from the vocabulary and the rules in tokenizer_config.json,
# whatever rules tokenizer.json has.
_BERT = ("BertTokenizer", "BertTokenizerFast")
_BERT_SPECIAL = {
    f"{name}_token": AddedToken(f"[{name.upper()}]", special=True)
    for name in ("unk", "sep", "pad", "cls", "mask")
}
# These take tokenizer.json as it is.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, int, str]:
    """Build the tokenizer of a folder in Hugging Face layout.

    Returns:
        The tokenizer, the longest sequence that the model beside it takes (512 without a model),
        and the side on which long texts are cut: "right" or "left".

    Raises:
        UserError: for a tokenizer class that is not reproduced here, without a vocabulary, or for a
            length that is none.
        Exception: whatever the ``tokenizers`` library raises for a broken file.
    """
    settings, stored, config = (
        _read_if_there(folder / f"{name}.json")
        for name in ("tokenizer_config", "tokenizer", "config")
    )
    longest = config.get("max_position_embeddings", 512)
    if type(longest) is not int or not 3 <= longest < 2**31:
        where = f"{folder / 'config.json'}: max_position_embeddings"
        raise UserError(f"{where} is {longest!r} (expected a whole number, 3 or more)")
    if not stored and not (folder / "vocab.txt").exists():
        raise UserError(f"{folder}: found neither tokenizer.json nor vocab.txt")
    if "added_tokens_decoder" not in settings:
        settings |= _read_if_there(folder / "special_tokens_map.json")
    special = _special_tokens(settings)
    declared = _declared_tokens(folder, settings, stored, special)
    name = settings.get("tokenizer_class")
    if stored and name in _GENERIC:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        _add_tokens(backend, declared, special)
    elif (name := name or config.get("tokenizer_class") or _BERT[0]) in _BERT:
        backend = _bert_tokenizer(folder, settings, stored, declared, _BERT_SPECIAL | special)
    else:
        expected = f"{_BERT[0]}, or {_GENERIC[0]} with a tokenizer.json"
        raise UserError(f"{folder}: tokenizer_class is {name!r} (expected {expected})")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    side = (stored.get("truncation") or {}).get("direction", "right")
    return backend, longest, settings.get("truncation_side", side).lower()


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """The special tokens that the files name, as "cls_token", and those without a name."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or {}
    values = {key: value for key, value in settings.items() if key.endswith("_token")}
    values |= extra if isinstance(extra, dict) else {f"extra {i}": t for i, t in enumerate(extra)}
    tokens = {k: {"content": v} if isinstance(v, str) else v for k, v in values.items()}
    return {k: _token(v | {"special": True}) for k, v in tokens.items() if isinstance(v, dict)}


def _token(rules: dict[str, Any]) -> AddedToken:
    return AddedToken(**{k: v for k, v in rules.items() if k not in ("id", "__type")})


def _declared_tokens(
    folder: Path, settings: dict[str, Any], stored: dict[str, Any], special: dict[str, AddedToken]
) -> list[AddedToken]:
    """The tokens that the files add to the vocabulary, by id."""
    if "added_tokens_decoder" in settings:
        rules = settings["added_tokens_decoder"]
        return [_token(rules[number]) for number in sorted(rules, key=int)]
    names = {token.content for token in special.values()}
    declared = {
        number: AddedToken(content, normalized=content not in names, special=content in names)
        for content, number in _read_if_there(folder / "added_tokens.json").items()
    }
    for token in stored.get("added_tokens", ()):
        declared[token["id"]] = _token(token)
    return [declared[number] for number in sorted(declared)]


def _add_tokens(
    backend: tokenizers.Tokenizer, declared: list[AddedToken], special: dict[str, AddedToken]
) -> None:
    """Add the declared tokens and the special ones, in the order that gives the same ids."""
    names = {token.content for token in special.values()}
    for token in declared:
        token.special = token.special or token.content in names
    present = [*backend.get_added_tokens_decoder().values(), *declared]
    contents = {token.content for token in present}
    backend.add_tokens([*declared, *(t for t in special.values() if t.content not in contents)])


def _bert_tokenizer(
    folder: Path,
    settings: dict[str, Any],
    stored: dict[str, Any],
    declared: list[AddedToken],
    special: dict[str, AddedToken],
) -> tokenizers.Tokenizer:
    """WordPiece with BERT's rules; ValueError without the special tokens that every text needs."""
    if stored:
        vocabulary = stored["model"]["vocab"]
    else:
        vocabulary = models.WordPiece.read_file(str(folder / "vocab.txt"))
    unknown, first, last = (special[f"{name}_token"].content for name in ("unk", "cls", "sep"))
    for token in {unknown, first, last} - {token.content for token in declared}:
        if token not in vocabulary:
            raise ValueError(f"its vocabulary lacks {token!r}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _add_tokens(backend, declared, special)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (first, last)],
    )
    return backend
