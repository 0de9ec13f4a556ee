"""The encoder's configuration, under the names of Hugging Face's ``config.json``."""

from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import UserError
from fastlora.files import read_json, write_json

# The values that a config.json may have for these keys; the first is the default.
_SUPPORTED = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of one encoder; the defaults are those of Hugging Face's BERT.

    Raises ValueError when heads do not divide hidden_size, or for a wrong number of positions.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        H, heads = self.hidden_size, self.num_attention_heads
        if H % heads:
            raise ValueError(f"hidden_size {H} is no multiple of num_attention_heads {heads}")
        if type(P := self.max_position_embeddings) is not int or P not in range(3, 2**31):
            raise ValueError(f"max_position_embeddings is {P!r} (expected a number, 3 or more)")

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Read a Hugging Face ``config.json``, ignoring the keys that minBERT does not use.

        Raises UserError naming the file and the key for what minBERT cannot do.
        """
        values = read_json(Path(path))
        for key, supported in _SUPPORTED.items():
            if values.get(key, supported[0]) not in supported:
                expected = " or ".join(map(repr, supported))
                raise UserError(f"{path}: {key} is {values[key]!r} (minBERT has {expected})")
        try:
            return cls(**{key: values[key] for key in cls.__annotations__ if key in values})
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"{path}: {error}") from error

    def to_json(self, path: str | Path) -> None:
        """Write a ``config.json`` that ``transformers.BertConfig`` reads."""
        write_json(Path(path), {"architectures": ["BertModel"], "model_type": "bert"} | vars(self))
