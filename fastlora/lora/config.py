"""The settings of one adapter, and which linear layers it targets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from fastlora.errors import UserError

# Short names of BERT's matrices, and the ends of their modules' names.
TARGETS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "ffn_output": "output.dense",
}
ALL = ("all", "all-linear")
_INSTEAD = "inject(..., train=('classifier',)) trains a head; accelerate takes PEFT's models"
# Default targets by model family: query and value, under the family's names.
FAMILIES = (
    ("query", "value"),  # BERT, RoBERTa, XLM-R, ELECTRA, CamemBERT, ALBERT, ViT
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("q_proj", "v_proj"),  # Llama, OPT, CLIP, BART
    ("q", "v"),  # MPNet, T5
    ("Wqkv",),  # ModernBERT
    ("in_proj",),  # DeBERTa
)


def check(ok: bool, what: str, found: object, expected: str) -> None:
    """Raise a UserError that says what was found and what was expected, unless `ok`."""
    if not ok:
        raise UserError(f"{what} is {found!r} (expected {expected})")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA settings of one adapter (Hu et al. 2021; defaults of the minBERT LoRA paper).

    `targets` are names or ends of names of linear layers, regular expressions that match a whole
    name, short names of BERT's matrices (`TARGETS`), or "all": all linear layers but the head. None
    means query and value, as the model's family names them. `rank_pattern` and `alpha_pattern` map
    regular expressions, which the end of a layer's name must match, to that layer's rank or alpha.
    PEFT's spellings, the last four fields, are accepted. Raises UserError if out of range.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    rslora: bool = False
    targets: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    target_modules: InitVar[str | Iterable[str] | None] = None
    use_rslora: InitVar[bool | None] = None

    def __new__(cls, *_: Any, **settings: Any) -> LoraConfig:
        """Raise UserError for a name that is no field, such as another one of PEFT's."""
        other = min(settings.keys() - cls.__annotations__.keys(), default="")
        check(not other, "an argument", other, f"{', '.join(cls.__annotations__)}; {_INSTEAD}")
        return super().__new__(cls)

    def __post_init__(self, *spelled: Any) -> None:
        # PEFT's spellings, in the order of the fields above.
        for name, value in zip(("alpha", "dropout", "targets", "rslora"), spelled, strict=True):
            if value is not None:
                ours = getattr(self, name)
                check(ours in (value, getattr(LoraConfig, name)), name, ours, f"{value!r} alone")
                object.__setattr__(self, name, value)
        if self.targets is not None:
            names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            object.__setattr__(self, "targets", names)
            ok = len(names) > 0 and all(isinstance(name, str) for name in names)
            check(ok, "targets", names, "one name or more")
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            ok = isinstance(patterns, Mapping) and all(map(_is_pattern, patterns))
            check(ok, name, patterns, "a mapping of regular expressions to numbers")
        for r in (self.r, *self.rank_pattern.values()):
            check(type(r) is int and r >= 1, "r", r, "1 or more")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check(_is_number(alpha) and 0 < alpha < 2**127, "alpha", alpha, "a positive number")
        ok = _is_number(self.dropout) and 0 <= self.dropout < 1
        check(ok, "dropout", self.dropout, "0 <= p < 1")
        check(isinstance(self.rslora, bool), "rslora", self.rslora, "true or false")

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def same_adapter(self, other: LoraConfig) -> bool:
        """Whether both give a layer the same adapter; targets are not compared."""
        return replace(self, targets=None) == replace(other, targets=None)

    def for_layer(self, name: str) -> LoraConfig:
        """The settings of the layer of this name: the patterns are applied and removed."""
        found: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
        for setting, patterns in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            values = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name))
            found[setting] = next(values, getattr(self, setting))
        return replace(self, **found)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pattern(text: Any) -> bool:
    try:
        return bool(re.compile(f"({text})")) and isinstance(text, str)
    except re.error:
        return False


def ends_with(name: str, *ends: str) -> bool:
    """Whether a module's or parameter's name is one of these, or ends in one after a dot."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def is_target(name: str, target: str) -> bool:
    """Whether `target`, one of `LoraConfig.targets`, means the linear layer of this name."""
    if target == "ffn_output" and name.endswith(TARGETS["output"]):
        return False
    # A dot alone does not make a name a regular expression: "layer.1" must not match "layer_1".
    is_regex = re.search(r"[\\^$*+?(\[{|]", target) is not None and _is_pattern(target)
    matches = is_regex and re.fullmatch(target, name) is not None
    return matches or ends_with(name, target, TARGETS.get(target, target))
