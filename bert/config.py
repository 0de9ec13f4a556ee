"""The encoder's configuration, under the names of Hugging Face's ``config.json``."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastlora.bert.source import CheckpointError

HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# A config.json without one of these describes some other model: no default is guessed for it.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of one encoder; the defaults are bert-base-uncased.

    Raises ValueError for heads that do not divide the width or an activation minBERT lacks.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse what no encoder can be built from."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which num_attention_heads "
                f"{self.num_attention_heads} does not divide"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r} (expected one of {', '.join(HIDDEN_ACTS)})"
            )

    @classmethod
    def from_json(cls, path: Path) -> "BertConfig":
        """Read a Hugging Face ``config.json``, ignoring the keys that minBERT does not use.

        Raises CheckpointError naming the file and the key for what minBERT cannot do.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**_supported(values))
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def to_json(self, path: Path) -> None:
        """Write a ``config.json`` that ``transformers.BertConfig`` reads."""
        values = {"architectures": ["BertModel"], "model_type": "bert", **asdict(self)}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _supported(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"found a JSON {type(values).__name__}, expected an object")
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise ValueError(f"{key} is {values[key]!r}, minBERT supports only {only!r}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ValueError(f"key {missing[0]!r} is missing: not the configuration of a BERT model")
    known = {field.name for field in fields(BertConfig)}
    return {key: value for key, value in values.items() if key in known}
