"""The encoder's configuration, under the names of Hugging Face's ``config.json``."""

from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import UserError, in_place_of
from fastlora.files import read_json, write_json

# The model types, and their classes in transformers. All but the first are RoBERTa by another name.
_CLASSES = {"bert": "BertModel", "roberta": "RobertaModel"}
_CLASSES |= {"xlm-roberta": "XLMRobertaModel", "camembert": "CamembertModel"}
# The values that a config.json may have for these keys; the first is the default.
_SUPPORTED = {
    "model_type": tuple(_CLASSES),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of one encoder, by default BERT's; ValueError for impossible ones."""

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
    model_type: str = "bert"

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value, pad = getattr(self, name), name == "pad_token_id"
            most = 1 if "dropout" in name else 2**31 - 1
            low, end = (0, self.vocab_size - 1) if pad else (int(kind is int), most)
            if type(value) not in (kind, int) or (kind is not str and not low <= value <= end):
                raise ValueError(f"{name} is {value!r} (expected {kind.__name__} {low} to {end})")
        if (H := self.hidden_size) % (heads := self.num_attention_heads):
            raise ValueError(f"hidden_size {H} is no multiple of num_attention_heads {heads}")
        if (P := self.max_position_embeddings) < 3 + self.first_position:
            raise ValueError(f"max_position_embeddings is {P} (expected room for 3 tokens)")

    @property
    def first_position(self) -> int:
        """The first token's position; RoBERTa's follow the position that has its padding's id."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Read a ``config.json``; UserError naming the file and key for what minBERT cannot do."""
        values = {key: v for key, v in read_json(Path(path)).items() if v is not None}
        for key, supported in _SUPPORTED.items():
            if values.get(key, supported[0]) not in supported:
                expected = " or ".join(map(repr, supported)) + "; fastlora.accelerate takes others"
                raise UserError(f"{path}: {key} is {values[key]!r} (minBERT has {expected})")
        values = {"pad_token_id": int(values.get("model_type", "bert") != "bert")} | values
        with in_place_of((ValueError, TypeError, ArithmeticError), UserError, f"{path}: "):
            return cls(**{key: values[key] for key in cls.__annotations__ if key in values})

    def to_json(self, path: str | Path) -> None:
        """Write a ``config.json`` that transformers reads."""
        write_json(Path(path), {"architectures": [_CLASSES[self.model_type]]} | vars(self))
