"""WordPiece tokenisation through the ``tokenizers`` library, into flat arrays without padding."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from fastlora.bert.source import CheckpointError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Case, accents, Chinese, controls, punctuation, digits: any difference in the rules shows here.
_PROBE = "The Café's naïve ÅNGSTRÖM, 東京 2.5\u00a0%\t\u200b[MASK] don't--STOP ﬁn 😀"
_CHUNK = 8192


@dataclass(frozen=True)
class Encoded:
    """N token sequences end to end; sequence i is ``ids[offsets[i]:offsets[i + 1]]``.

    ids [T] int32, offsets [N + 1] int64, types [T] int8 (0 first, 1 second text) or None,
    truncated: how many of the N were cut to the maximum length.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None
    truncated: int

    def __len__(self) -> int:
        """The number of sequences, N."""
        return len(self.offsets) - 1


class Tokenizer:
    """A BERT tokenizer read from a Hugging Face folder; ``pad_id`` is the id of ``[PAD]``."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Take a ``tokenizers.Tokenizer``; its own padding and truncation are switched off."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        pad = backend.token_to_id("[PAD]")
        ends = [backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")]
        if pad is None or backend.encode("").ids != ends:
            raise ValueError("does not build '[CLS] text [SEP]': not a BERT tokenizer")
        self.pad_id: int = pad

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read ``tokenizer.json``, or ``vocab.txt`` with the rules of ``tokenizer_config.json``.

        Raises CheckpointError when the folder has neither, or for a broken file.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            path = folder / "vocab.txt"
        if not path.exists():
            raise CheckpointError(f"{folder}: found neither tokenizer.json nor vocab.txt")
        try:
            return cls(_from_vocab(path) if path.suffix == ".txt" else _from_json(path))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the fewest embeddings a model must have."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the tokenizer does (vocabulary, ids of a probe), however it is stored."""
        facts = [sorted(self._backend.get_vocab().items()), self._backend.encode(_PROBE).ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encode(self, texts: Sequence[str], max_length: int = 512) -> Encoded:
        """Encode each text as ``[CLS] text [SEP]``, cut to ``max_length`` tokens in all."""
        return self._encode(iter(texts), max_length, pairs=False)

    def encode_pairs(self, a: Sequence[str], b: Sequence[str], max_length: int = 512) -> Encoded:
        """Encode ``[CLS] a [SEP] b [SEP]`` with types; the longer text is cut first."""
        return self._encode(zip(a, b, strict=True), max_length, pairs=True)

    def _encode(self, inputs: Iterator[Any], max_length: int, pairs: bool) -> Encoded:
        ids: list[np.ndarray] = []
        types: list[np.ndarray] = []
        lengths = [0]
        truncated = 0
        self._backend.enable_truncation(max_length, strategy="longest_first")
        # In chunks: one Encoding object is some kilobytes, and Quora has 140,000 pairs.
        while chunk := list(islice(inputs, _CHUNK)):
            for encoding in self._backend.encode_batch_fast(chunk):
                ids.append(np.array(encoding.ids, dtype=np.int32))
                lengths.append(len(ids[-1]))
                truncated += bool(encoding.overflowing)
                if pairs:
                    types.append(np.array(encoding.type_ids, dtype=np.int8))
        self._backend.no_truncation()
        return Encoded(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            offsets=np.cumsum(lengths, dtype=np.int64),
            types=np.concatenate([np.zeros(0, np.int8), *types]) if pairs else None,
            truncated=truncated,
        )


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The Rust side raises a bare Exception for any malformed file.
    except Exception as error:
        raise ValueError(f"not a tokenizer file: {error}") from error


def _from_vocab(path: Path) -> tokenizers.Tokenizer:
    rules_path = path.with_name("tokenizer_config.json")
    rules = json.loads(rules_path.read_text(encoding="utf-8")) if rules_path.exists() else {}
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token: index for index, token in enumerate(lines)}
    missing = [token for token in _SPECIAL if token not in vocab]
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=rules.get("do_lower_case", True),
        strip_accents=rules.get("strip_accents"),
        handle_chinese_chars=rules.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    backend.add_special_tokens(list(_SPECIAL))
    return backend
