"""WordPiece tokenisation through the ``tokenizers`` library, into flat arrays without padding."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from fastlora.errors import UserError
from fastlora.files import read_json

# Case, accents, Chinese, controls, punctuation, digits: any difference in the rules shows here.
_PROBE = "The Café's naïve ÅNGSTRÖM, 東京 2.5\u00a0%\t\u200b[MASK] don't--STOP ﬁn 😀"
_CHUNK = 8192


@dataclass(frozen=True)
class Encoded:
    """N token sequences end to end; sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [N + 1]
    types: np.ndarray | None  # int8 [T], 0 in the first text and 1 in the second
    truncated: int  # how many of the N were cut to the maximum length


class Tokenizer:
    """A BERT tokenizer; raises ValueError for a ``tokenizers.Tokenizer`` that is none.

    ``max_length`` is the most tokens of a sequence.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int = 512) -> None:
        self.max_length = max_length
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._probe = backend.encode(_PROBE).ids
        if backend.encode("").ids != [backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")]:
            raise ValueError("it does not build '[CLS] text [SEP]'")

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read ``tokenizer.json``, or ``vocab.txt`` with the rules of ``tokenizer_config.json``.

        How long a sequence may be is in the model's ``config.json`` beside it, else 512. Raises
        UserError when the folder has neither, or for a broken file.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            path = folder / "vocab.txt"
        if not path.exists():
            raise UserError(f"{folder}: found neither tokenizer.json nor vocab.txt")
        config = folder / "config.json"
        longest = read_json(config).get("max_position_embeddings", 512) if config.exists() else 512
        read = _from_vocabulary if path.suffix == ".txt" else tokenizers.Tokenizer.from_file
        try:
            return cls(read(str(path)), longest)
        # The Rust side raises a bare Exception for any malformed file.
        except Exception as error:
            raise UserError(f"{path}: not a BERT tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the fewest embeddings a model must have."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def definition(self) -> str:
        """The vocabulary and every rule, as JSON; the fingerprint's probe misses the rarest."""
        return self._backend.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the tokenizer does (vocabulary, ids of a probe), however it is stored."""
        facts = [sorted(self._backend.get_vocab().items()), self._probe]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encode(self, a: Sequence[str], b: Sequence[str] | None = None) -> Encoded:
        """Encode each text as ``[CLS] a [SEP]``, or each pair ``[CLS] a [SEP] b [SEP]`` with types.

        The longer text is cut first, to ``max_length`` tokens in all.
        """
        inputs: Sequence = a if b is None else list(zip(a, b, strict=True))
        ids, types = array("i"), array("b")
        lengths, truncated = [0], 0
        self._backend.enable_truncation(self.max_length, strategy="longest_first")
        # In chunks: one Encoding object is some kilobytes, and Quora has 140,000 pairs.
        for start in range(0, len(inputs), _CHUNK):
            for encoding in self._backend.encode_batch_fast(inputs[start : start + _CHUNK]):
                ids.extend(encoding.ids)
                if b is not None:
                    types.extend(encoding.type_ids)
                lengths.append(len(encoding))
                truncated += bool(encoding.overflowing)
        self._backend.no_truncation()
        return Encoded(
            ids=np.array(ids, np.int32),
            offsets=np.cumsum(lengths, dtype=np.int64),
            types=None if b is None else np.array(types, np.int8),
            truncated=truncated,
        )


def _from_vocabulary(path: str) -> tokenizers.Tokenizer:
    config = Path(path).with_name("tokenizer_config.json")
    rules = read_json(config) if config.exists() else {}
    built = BertWordPieceTokenizer.from_file(
        path,
        lowercase=rules.get("do_lower_case", True),
        strip_accents=rules.get("strip_accents"),
        handle_chinese_chars=rules.get("tokenize_chinese_chars", True),
    )
    return tokenizers.Tokenizer.from_str(built.to_str())
