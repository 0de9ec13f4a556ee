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

from fastlora.data.tokenizer_files import read_tokenizer
from fastlora.errors import UserError

# Case, accents, Chinese, controls, punctuation, digits: any difference in the rules shows here.
_PROBE = "The Café's naïve ÅNGSTRÖM, 東京 2.5\u00a0%\t\u200b[MASK] don't--STOP ﬁn 😀"
_CHUNK = 8192


@dataclass(frozen=True)
class Encoded:
    """N token sequences end to end; sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [N + 1]
    types: np.ndarray  # int8 [T], 0 in the first text and 1 in the second
    truncated: int  # how many of the N were cut to the maximum length; 0 after `take`

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sequence, int64 [N]."""
        return np.diff(self.offsets)

    def take(self, indices: np.ndarray) -> "Encoded":
        """The sequences with these indices [n]."""
        ends = self.offsets[indices + 1]
        lengths = ends - self.offsets[indices]
        offsets = np.append(0, np.cumsum(lengths))
        positions = np.arange(offsets[-1]) + np.repeat(ends - offsets[1:], lengths)
        return Encoded(self.ids[positions], offsets, self.types[positions], 0)


class Tokenizer:
    """A BERT tokenizer; raises ValueError for a ``tokenizers.Tokenizer`` that is none.

    A sequence has at most ``max_length`` tokens; what is cut is on the ``truncation_side``.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, max_length: int, truncation_side: str
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._probe = backend.encode(_PROBE).ids
        one, two = backend.encode(""), backend.encode("", "")
        if not len(set(one.ids)) == len(one.ids) == 2 or two.ids != [*one.ids, one.ids[1]]:
            raise ValueError("it does not build '[CLS] a [SEP]' and '[CLS] a [SEP] b [SEP]'")
        if two.type_ids != [0, 0, 1]:
            types = f"the types of a pair's tokens are {two.type_ids}"
            raise ValueError(f"{types} (expected [0, 0, 1])")
        backend.enable_truncation(max_length, strategy="longest_first", direction=truncation_side)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model's folder; its tokens are those of transformers.

        How long a sequence may be is in the model's ``config.json`` beside it, else 512. Raises
        UserError when the folder has no tokenizer, another class's, or a broken file.
        """
        try:
            return cls(*read_tokenizer(Path(folder)))
        except (UserError, KeyboardInterrupt):
            raise
        # For a malformed file the Rust side raises a bare Exception, or panics.
        except BaseException as error:
            raise UserError(f"{folder}: not a BERT tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the fewest embeddings a model must have."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def definition(self) -> str:
        """The vocabulary, every rule and the length, as JSON; the fingerprint misses the rarest."""
        return self._backend.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the tokenizer does (vocabulary, ids of a probe), however it is stored."""
        content = [sorted(self._backend.get_vocab().items()), self._probe]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, a: Sequence[str], b: Sequence[str] | None = None) -> Encoded:
        """Encode each text as ``[CLS] a [SEP]``, or each pair ``[CLS] a [SEP] b [SEP]`` with types.

        The longer text is cut first, to the maximum length in all.
        """
        inputs: Sequence = a if b is None else list(zip(a, b, strict=True))
        ids, types = array("i"), array("b")
        lengths, truncated = [0], 0
        # In chunks: one Encoding object is some kilobytes, and Quora has 140,000 pairs.
        for start in range(0, len(inputs), _CHUNK):
            for encoding in self._backend.encode_batch_fast(inputs[start : start + _CHUNK]):
                ids.extend(encoding.ids)
                types.extend(encoding.type_ids if b is not None else bytes(len(encoding)))
                lengths.append(len(encoding))
                truncated += bool(encoding.overflowing)
        return Encoded(
            ids=np.array(ids, np.int32),
            offsets=np.cumsum(lengths, dtype=np.int64),
            types=np.array(types, np.int8),
            truncated=truncated,
        )
