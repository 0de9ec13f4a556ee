"""Encodes texts with the tokenizer that transformers reads, into flat arrays without padding."""

import hashlib
import json
import logging
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from fastlora.bert.config import BertConfig
from fastlora.errors import UserError
from fastlora.files import read_json

# Tokenizers whose rules for case, accents, Chinese or digits differ give other ids for this text.
_PROBE = "The Café's naïve ÅNGSTRÖM, 東京 2.5\u00a0%\t\u200b[MASK] don't--STOP ﬁn 😀"
_CHUNK = 8192
_LOGGER_LOCK = threading.Lock()


@dataclass(frozen=True)
class Encoded:
    """N token sequences end to end; sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [N + 1]
    types: np.ndarray  # int8 [T], such as 0 in the first text and 1 in the second
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
    """A tokenizer as transformers builds it, whose special tokens also surround an empty text.

    A sequence has at most `max_length` tokens; longer ones are cut on the `truncation_side`. Token
    types must be below `types`, the model's type_vocab_size.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, max_length: int, truncation_side: str, types: int = 2
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._types, self._longest = backend, types, max_length
        self._probe = backend.encode(_PROBE).ids
        if not backend.encode("").ids:
            raise ValueError("an empty text has no tokens (expected special tokens around a text)")
        backend.enable_truncation(max_length, strategy="longest_first", direction=truncation_side)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model's folder; its tokens are those of transformers.

        Raises UserError if the folder has no fast tokenizer, or one that does not fit the model's
        ``config.json``, which says how long a sequence may be.
        """
        config = BertConfig.from_json(Path(folder) / "config.json")
        try:
            found = _read(Path(folder))
            if (tokens := max(found.get_vocab().values()) + 1) > config.vocab_size:
                raise ValueError(f"it has {tokens} tokens but the model {config.vocab_size}")
            longest, types = config.longest, config.type_vocab_size
            return cls(found.backend_tokenizer, longest, found.truncation_side, types)
        except KeyboardInterrupt:
            raise
        # For a malformed file the Rust side raises a bare Exception, or panics.
        except BaseException as error:
            for file in Path(folder).glob("*.json"):
                read_json(file)  # raises an error that names a file that is not JSON
            cause = " ".join(str(error).split())
            raise UserError(f"{folder}: its tokenizer cannot be used: {cause}") from error

    @property
    def definition(self) -> str:
        """The tokenizer's complete definition as text; the fingerprint misses its rarest rules."""
        return f"{self._types} {self._backend.encode_special_tokens} {self._backend.to_str()}"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary and the ids of a text, whatever the format of the files."""
        content = [sorted(self._backend.get_vocab().items()), self._probe]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, a: Sequence[str], b: Sequence[str] | None = None) -> Encoded:
        """Encode each text, or each pair as one sequence, with special tokens between and around.

        The longer text of a pair is cut first. Raises UserError if the model has fewer token types
        than the sequences, or no room for a token of each text.
        """
        least = 2 + self._backend.num_special_tokens_to_add(is_pair=True)
        if b is not None and least > self._longest:
            room = f"the model has room for {self._longest}; use --pairs separate"
            raise UserError(f"a joint pair has {least} tokens or more but {room}")
        inputs: Sequence = a if b is None else list(zip(a, b, strict=True))
        ids, types = array("i"), array("i")
        lengths, truncated = [0], 0
        # In chunks, because an Encoding object takes kilobytes and Quora has 140,000 pairs.
        for start in range(0, len(inputs), _CHUNK):
            for encoding in self._backend.encode_batch_fast(inputs[start : start + _CHUNK]):
                ids.extend(encoding.ids)
                types.extend(encoding.type_ids)
                lengths.append(len(encoding))
                truncated += bool(encoding.overflowing)
        if types and (kind := np.max(types)) >= self._types:
            known = f"the model has type_vocab_size {self._types}; use --pairs separate"
            raise UserError(f"the tokenizer gives tokens of type {kind} but {known}")
        offsets = np.cumsum(lengths, dtype=np.int64)
        return Encoded(np.array(ids, np.int32), offsets, np.array(types, np.int8), truncated)


def _read(folder: Path) -> Any:
    """The fast tokenizer that transformers reads from a folder, without its warnings."""
    from transformers import AutoTokenizer  # imported here, because it takes a second

    model = read_json(file).get("model") if (file := folder / "tokenizer.json").is_file() else None
    if isinstance(model, dict) and str in {type(model.get(key)) for key in ("vocab", "merges")}:
        raise ValueError("tokenizer.json names another file, which transformers would read")
    logger = logging.getLogger("transformers")
    with _LOGGER_LOCK:
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            options = {"local_files_only": True, "trust_remote_code": False}
            found = AutoTokenizer.from_pretrained(folder, **options)  # nosec B615
        finally:
            logger.setLevel(level)
    name, files = type(found).__name__, found.vocab_files_names
    if not found.is_fast or "auto_map" in found.init_kwargs:
        name = found.init_kwargs.get("auto_map", name)
        raise ValueError(f"{name} is not one of the fast tokenizers of transformers")
    if not any((folder / files[key]).is_file() for key in ("vocab_file", "tokenizer_file")):
        raise ValueError(f"found none of {', '.join(files.values())}, which a {name} reads")
    return found
