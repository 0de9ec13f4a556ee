"""One line for models of transformers, PEFT and sentence-transformers: `accelerate`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.errors import UserError
from fastlora.interop.encoders import ATTENTIONS, ENCODERS, kind_of, why_square
from fastlora.interop.peft import PeftLinear, is_linear, is_lora_layer
from fastlora.interop.swap import SwappedDropout, SwappedLinear, swap, swap_back
from fastlora.lora.layer import LoRALinear

# Ends of the names of transformers' models that read no states at padding, besides those of single
# tokens, for which padding has no label.
_READERS = (
    *("Model", "SequenceClassification", "TokenClassification", "MaskedLM", "PreTraining"),
    *("NextSentencePrediction", "MultipleChoice"),
)
# Packages whose modules only wrap a model of transformers, and mask what they read.
_WRAPPERS = ("peft", "sentence_transformers")


@dataclass
class Report:
    """What `accelerate` did: as a context manager, it restores the model at the end of a block."""

    model: nn.Module = field(repr=False)
    fused: dict[str, str] = field(default_factory=dict)  # by module name: what it is
    kept: dict[str, str] = field(default_factory=dict)  # by module name: why it stays as it was

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: Any) -> None:
        restore(self.model)

    def __str__(self) -> str:
        lines = [f"fastlora: {type(self.model).__name__}"]
        counts = Counter(self.fused.values())
        lines += [f"  {number} {what}" for what, number in counts.items()]
        lines += [f"  as it was: {name or 'the model'}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def accelerate(model: Any, *, real_tokens: bool | None = None) -> Report:
    """Let a model's LoRA layers run fused and its encoder on real tokens only, in place.

    `model` is a `PeftModel`, a model of transformers (with `add_adapter` or without adapters), a
    `SentenceTransformer` or `CrossEncoder`, or a module that contains some of these. Parameters,
    their names, state dicts, checkpoints and PEFT's methods stay as they are. Where a call needs
    PEFT's own way or the padded square, it takes it, and a warning says so once.

    States at padding become zeros. So by default an encoder runs on real tokens where fastlora
    knows that no head reads them; `real_tokens` True says that yours does not, and False keeps all
    encoders as they are. Called again, it sees to what has been added.

    Returns a report of each layer. Raises UserError where there is nothing to accelerate.
    """
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        raise UserError(f"accelerate got a {type(model).__name__} (expected an nn.Module)")
    report, said = Report(root), set[str]()
    for name, module in list(root.named_modules()):
        if kind_of(module) in ENCODERS:
            if why := _why_not(root, name, module, real_tokens):
                report.kept[name] = why
            else:
                report.fused[name] = "encoder on real tokens"
                _swap_encoder(module, said)
        elif isinstance(module, LoRALinear):
            report.fused[name] = "LoRA layer of fastlora"
        elif is_linear(module):
            swap(module, PeftLinear, said)
            swap_linear(module.base_layer, said)  # type: ignore[arg-type]
            plan = module.plan()  # type: ignore[operator]
            if isinstance(plan, str):
                report.kept[name] = plan
            else:
                report.fused[name] = "LoRA layer of PEFT"
        elif is_lora_layer(module):
            report.kept[name] = f"fastlora has no fused form of {type(module).__name__}"
    if not report.fused:
        reasons = "; ".join(dict.fromkeys(report.kept.values()))
        raise UserError(
            f"nothing in {type(root).__name__} can be accelerated: "
            f"{reasons or 'it has neither LoRA layers nor an encoder that fastlora knows'}"
        )
    return report


def restore(model: Any) -> None:
    """Undo `accelerate`: every module is of its own class again; nothing else had changed.

    Raises UserError, with nothing changed, where a module was parametrised or sharded since.
    """
    swap_back(model if isinstance(model, nn.Module) else model.model)


def _swap_encoder(encoder: nn.Module, said: set[str]) -> None:
    swap(encoder, ENCODERS[kind_of(encoder)], said)
    for module in encoder.modules():
        if kind_of(module) in ATTENTIONS:
            swap(module, ATTENTIONS[kind_of(module)], said)
        elif type(module) is nn.Dropout and not module.inplace:
            swap(module, SwappedDropout, said)
        else:
            swap_linear(module, said)


def swap_linear(module: nn.Module, said: set[str]) -> None:
    """A plain linear layer is faster by oneDNN while its weight is frozen."""
    if type(module) is nn.Linear:
        swap(module, SwappedLinear, said)


def _why_not(root: nn.Module, name: str, encoder: nn.Module, real_tokens: bool | None) -> str:
    """Why an encoder stays on the padded square, or ""."""
    if real_tokens is False:
        return "real_tokens is False"
    config = next(m.config for m in encoder.modules() if hasattr(m, "config"))
    if why := why_square(config):
        return why
    attentions = [m for m in encoder.modules() if kind_of(m) in ATTENTIONS]
    if len(attentions) != len(encoder.layer):  # type: ignore[arg-type]
        return "its layers have attention of another kind"
    if any("forward" in vars(m) for m in encoder.modules()):
        return "a forward inside it has been replaced"
    return "" if real_tokens else _why_read(root, name)


def _why_read(root: nn.Module, name: str) -> str:
    """Why the states at padding might be read by what is around an encoder, or ""."""
    parents = name.split(".")[:-1]
    around = [root.get_submodule(".".join(parents[:i])) for i in range(len(parents) + 1)]
    for module in around:
        kind = type(module)
        if kind.__module__.split(".")[0] in _WRAPPERS:
            continue
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            continue
        if kind_of(module) and kind.__name__.endswith(_READERS):
            return ""
        return (
            f"{kind.__name__} may read states at padding, which would be zeros (expected "
            "accelerate(model, real_tokens=True) if it does not)"
        )
    return ""
