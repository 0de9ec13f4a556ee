"""`accelerate` and `restore`: for models of transformers, PEFT and sentence-transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn

from fastlora.errors import UserError
from fastlora.interop.encoders import ATTENTIONS, ENCODERS, config_of, kind_of, why_padded
from fastlora.interop.padding import is_bare_encoder, why_padding_read
from fastlora.interop.peft import PeftLinear, is_linear, is_lora_layer
from fastlora.interop.swap import Swapped, SwappedDropout, SwappedLinear, swap, swap_back
from fastlora.kernels import route
from fastlora.lora.layer import LoRALinear

_ZEROS = "states at padding may be zeros from now on: if your code reads them (a mean without the "
_ZEROS += "mask does), call accelerate(model, real_tokens=False)"


@dataclass
class Report:
    """What `accelerate` did. As a context manager, it undoes that at the end of the block."""

    model: str  # its class
    kernels: str  # the route on the model's present device, why, and what the self-check found
    # By module name: what is accelerated, and why other modules are not.
    fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: WeakSet[nn.Module] = field(default_factory=WeakSet, repr=False)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: Any) -> None:
        swap_back(self.changed)

    def __str__(self) -> str:
        lines = [f"fastlora: {self.model}", f"  kernels: {self.kernels}"]
        for what, number in Counter(self.fused.values()).items():
            lines.append(f"  {number} {what if number == 1 else what.replace('layer', 'layers')}")
        lines += [f"  left as it was: {name or 'all'}: {why}" for name, why in self.kept.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def accelerate(model: Any, *, real_tokens: bool | None = None) -> Report:
    """Make a model faster in place: its LoRA layers run fused, its encoder on real tokens only.

    `model` is a `PeftModel`, a model of transformers (with `add_adapter` or without adapters), a
    `SentenceTransformer` or `CrossEncoder`, or a module that contains some of these. Parameters,
    state dicts and PEFT's methods stay as they are. A call that needs PEFT's own forward or the
    padded batch runs as before, and a warning says so once.

    States at padding may become zeros. So by default an encoder runs on real tokens where fastlora
    knows that no head reads them; pass `real_tokens=True` if yours does not, and False to keep all
    encoders as they are. Call it again when a head has been replaced or adapters were added.

    Returns a report. Raises UserError, with nothing changed, where nothing can be accelerated.
    """
    root = _module(model)
    kernels = next(("{} ({})".format(*route(p.device, p.dtype)) for p in root.parameters()), "")
    report, plan = Report(type(root).__name__, kernels), dict[nn.Module, type[Swapped]]()
    dropouts: list[nn.Module] = []
    to_restore: list[nn.Module] = []  # modules of encoders that must not be accelerated any more
    for name, module in root.named_modules():
        if is_encoder(module):
            if why := _why_not(root, name, module, real_tokens):
                report.kept[name] = why
                to_restore += [m for m in module.modules() if not is_linear(m)]
            else:
                report.fused[name] = "encoder on real tokens"
                if is_bare_encoder(root, name):
                    report.notes.append(_ZEROS)
                plan.update(_parts(module))
        elif isinstance(module, LoRALinear):
            report.fused[name] = "LoRA layer of fastlora"
        elif is_linear(module):
            found = PeftLinear.plan(module)  # type: ignore[arg-type]
            kind = report.kept if isinstance(found, str) else report.fused
            kind[name] = found if isinstance(found, str) else "LoRA layer of PEFT"
            plan[module] = PeftLinear
            if type(module.base_layer) is nn.Linear:
                plan[module.base_layer] = SwappedLinear
        elif type(module) is nn.Dropout and not module.inplace:
            dropouts.append(module)
        elif is_lora_layer(module):
            report.kept[name] = f"fastlora has no fused form of {type(module).__name__}"
    if not report.fused:
        reasons = "; ".join(dict.fromkeys(report.kept.values()))
        raise UserError(
            f"nothing in {type(root).__name__} can be accelerated: "
            f"{reasons or 'it has neither LoRA layers nor an encoder that fastlora knows'}"
        )
    if "encoder on real tokens" in report.fused.values():
        plan.update(dict.fromkeys(dropouts, SwappedDropout))
    swap_back(to_restore)
    earlier = (vars(m)["_warned"] for m in root.modules() if isinstance(m, Swapped))
    warned: set[str] = next(earlier, set())
    for module, mixin in plan.items():
        if not isinstance(module, Swapped):
            swap(module, mixin, warned)
            report.changed.add(module)
    return report


def restore(model: Any) -> None:
    """Undo `accelerate`: give every module its own class back (nothing else was changed).

    Raises UserError, with nothing changed, where a module was parametrised, sharded or patched
    since. No call of the model may be running in another thread.
    """
    swap_back(_module(model).modules())


def _module(model: Any) -> nn.Module:
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        raise UserError(f"got a {type(model).__name__} (expected an nn.Module)")
    return root


def is_encoder(module: nn.Module) -> bool:
    """Whether it is an encoder that we know, or an instance of a subclass of one."""
    return any(kind_of(kind) in ENCODERS for kind in type(module).__mro__)


def _parts(encoder: nn.Module) -> Iterator[tuple[nn.Module, type[Swapped]]]:
    """The modules of an encoder, and what each becomes."""
    yield encoder, ENCODERS[kind_of(type(encoder))]
    for name, module in encoder.named_modules():
        if kind_of(type(module)) in ATTENTIONS:
            yield module, ATTENTIONS[kind_of(type(module))]
        elif type(module) is nn.Linear and "lora_" not in name:
            yield module, SwappedLinear


def _why_not(root: nn.Module, name: str, encoder: nn.Module, real_tokens: bool | None) -> str:
    """Why an encoder keeps computing on the padded batch, or ""."""
    if real_tokens is False:
        return "real_tokens is False"
    if kind_of(type(encoder)) not in ENCODERS:
        return f"{type(encoder).__name__} is a subclass of an encoder of transformers"
    if why := why_padded(config_of(encoder)):
        return why
    attentions = [m for m in encoder.modules() if kind_of(type(m)) in ATTENTIONS]
    if len(attentions) != len({*encoder.layer}):  # type: ignore[misc]
        return "its layers have attention that fastlora does not know"
    return "" if real_tokens else why_padding_read(root, name)
