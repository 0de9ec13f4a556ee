"""LoRALinear: a frozen linear layer with any number of named low-rank adapters.

Hu et al. 2021: W = W0 + scale B A with W0 frozen, A Kaiming-uniform and B zero at the start.
"""

from __future__ import annotations

import math
from functools import cache, partial
from types import MethodType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Linear, Term, add_terms, lora_grouped
from fastlora.lora.config import LoraConfig
from fastlora.lora.routing import Choice, choice_of

DEFAULT = "default"
PLAIN = (nn.Linear.forward, Linear.forward)
_FORWARDS = ("forward", "_old_forward")  # the second is set by hooks of Hugging Face accelerate
_uncompiled_choice = torch.compiler.disable(choice_of)


class LoRALinear(Linear):
    """An `nn.Linear` with LoRA: y = x W0^T + b + sum of scale B A dropout(x) over adapters.

    The constructor takes `nn.Linear`'s arguments in their order. Base parameters keep the names
    `weight` and `bias` and are frozen; adapter `name` has `lora_A[name]` [r, in] and `lora_B[name]`
    [out, r], in fp32 (fp64 on an fp64 base). A layer made by the constructor has one adapter,
    "default"; `inject` adapts layers of a model. Raises UserError for a setting out of range.
    """

    base_class: Any = nn.Linear  # the class that the layer had before it was adapted
    base_forward: Any = None  # a forward that had been set on the instance, or None
    stream = 0
    settings: dict[str, LoraConfig]
    streams: dict[str, int]  # by adapter: separates the dropout masks
    active: tuple[str, ...] | None = None  # None: several adapters, and none has been chosen
    scopes = 0  # number of open `use_adapter` blocks, of all threads, that cover this layer
    was_scoped = False  # whether a forward pass that backward may recompute has run in such a block
    merged: tuple[str, ...] = ()  # the adapters that `weight` contains
    base_weight: Tensor  # W0, while something is merged
    base_parameter: list[nn.Parameter]  # the one that holds W0; it may be tied to another module
    frozen_by_merge: list[nn.Parameter]  # the factors that `unmerge` makes trainable again

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.1,
        rslora: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)
        self._prepare()
        self.add_adapter(DEFAULT, LoraConfig(r, alpha, dropout, rslora))
        self.active = (DEFAULT,)

    def _prepare(self) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.settings, self.streams = {}, {}
        # Any hook keeps nn.TransformerEncoderLayer from its fast path, which reads `weight`
        # directly. A hook on the layer itself would slow down each of its calls.
        self.lora_A.register_forward_pre_hook(_nothing)

    @classmethod
    def from_linear(cls, linear: nn.Linear, stream: int = 0) -> LoRALinear:
        """Turn a linear layer, of this class or a subclass, into a LoRALinear in place.

        It stays the same object wherever it is referred to, keeps hooks and parametrisations, and
        has no adapter yet. `stream` separates its random numbers from those of other layers. When
        this raises, as where a subclass refuses new attributes, `to_linear` undoes it.
        """
        base_class: Any = vars(type(linear)).get("swapped_from", type(linear))  # swapped by interop
        linear.__class__ = adapted_class(base_class)
        assert isinstance(linear, LoRALinear)
        linear._prepare()
        linear.stream = stream
        # A forward that was set on the instance becomes the base's. Hooks of Hugging Face
        # accelerate stay in place; they call `_old_forward` and restore it when they are removed.
        hooked = "_old_forward" in vars(linear)
        forward = vars(linear).pop("_old_forward" if hooked else "forward", None)
        if forward is not None and getattr(forward, "__func__", None) is not base_class.forward:
            linear.base_forward = forward
        if hooked:
            vars(linear)["_old_forward"] = MethodType(type(linear).forward, linear)
        return linear

    def why_not_removable(self) -> str:
        """Why `to_linear` cannot be called now, or ""."""
        if type(self) is not adapted_class(self.base_class):
            return f"its class has become {type(self).__name__} since (parametrised or sharded)"
        patched = vars(self).get("forward")
        ours = getattr(patched, "__func__", None) is type(self).forward
        if patched is not None and not ours and "_old_forward" not in vars(self):
            return "its forward has been replaced since"
        return "it is in use in a block of use_adapter" if self.scopes else ""

    def to_linear(self) -> nn.Linear:
        """Turn back in place into the layer that `from_linear` got; the weight is not changed."""
        base_class, base_forward, forward = self.base_class, self.base_forward, type(self).forward
        for name in ADDED:
            for place in (vars(self), self._modules, self._buffers):
                place.pop(name, None)
        self.__class__ = base_class
        # The base's forward replaces ours wherever hooks have set ours on the instance.
        places = [k for k in _FORWARDS if getattr(vars(self).get(k), "__func__", None) is forward]
        for name in places or (["forward"] if base_forward is not None else []):
            vars(self)[name] = base_forward or MethodType(base_class.forward, self)
        return self

    def add_adapter(self, name: str, config: LoraConfig, seed: int | None = None) -> None:
        """Add an adapter; its weights follow from name, stream and seed (None: a random one)."""
        key = crc32(name.encode(), self.stream)
        seed = (draw_number() if seed is None else seed) ^ key
        # Not `self.weight`, because a parametrisation would be computed to get it.
        base = next(p for n, p in self.named_parameters() if "lora_" not in n)
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        A = torch.empty(config.r, self.in_features, dtype=dtype, device="cpu")
        generator = torch.Generator("cpu").manual_seed(seed)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        # A layer that Hugging Face accelerate offloads is on the meta device between calls.
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        A = A.to(base.device if device is None else device)
        B = A.new_zeros(self.out_features, config.r)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.settings[name], self.streams[name] = config, key

    def reset_parameters(self) -> None:
        """Draw the base's and all adapters' parameters anew, as after `to_empty`."""
        self.base_class.reset_parameters(self)
        for name in vars(self).get("settings", ()):
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[name])

    @property
    def base_is_plain(self) -> bool:
        """Whether the base's forward is that of `nn.Linear`."""
        return self.base_class.forward in PLAIN and self.base_forward is None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]; other arguments are for the base's own forward."""
        terms, seed = self.terms(input)
        if self.base_is_plain and not args and not kwargs:
            return lora_grouped(input, self.weight, self.bias, terms, seed, self.packed)
        base_forward = self.base_forward or partial(self.base_class.forward, self)
        y = base_forward(input, *args, **kwargs)
        if terms and y.shape != (*input.shape[:-1], self.out_features):
            found = f"{self.base_class.__name__} returns {list(y.shape)} for {list(input.shape)}"
            raise UserError(f"{found} (expected [..., {self.out_features}] to add adapters to)")
        return add_terms(y, input, terms, seed) if terms else y

    def default_choice(self) -> Choice:
        """What `inject` or `set_adapter` made active."""
        if self.active is None:
            names = ", ".join(self.settings)
            raise UserError(f"adapters {names}: none is chosen (use set_adapter or use_adapter)")
        return Choice(self.active)

    def terms(self, x: Tensor, column: int = 0) -> tuple[list[Term], Tensor | None]:
        """The terms that act on an input [leading, ..., in], and the seed of their masks."""
        if torch.compiler.is_compiling():
            choice = _uncompiled_choice(self) if self.scopes else self.default_choice()
        else:
            choice = choice_of(self)
        if self.merged:
            self._check_merged(x, choice)
            return [], None
        chosen: list[tuple[str, int, int | None]] = [(name, 0, None) for name in choice.names]
        if choice.segments is not None:
            _check_rows(x, choice)
            # A segment counts rows of the leading dimension, a term rows of the flattened input.
            rows = math.prod(x.shape[1:-1])
            chosen = [(s.adapter, s.start * rows, s.stop * rows) for s in choice.segments]
        terms = []
        for name, start, stop in chosen:
            if name in self.settings and start != stop:
                A, B, settings = self.lora_A[name], self.lora_B[name], self.settings[name]
                if A.device != x.device:  # PyTorch would compute with meta tensors without an error
                    where = f"adapter {name!r} lies on {A.device}, its input on {x.device}"
                    raise UserError(f"{where} (if the model is offloaded, call inject after that)")
                p = settings.dropout if self.training else 0.0
                # A layer's adapter draws the same masks whichever others act in the same call.
                terms.append(Term(A, B, settings.scale, p, self.streams[name], start, stop, column))
        return terms, choice.seed

    def _check_merged(self, x: Tensor, choice: Choice) -> None:
        merged = " and ".join(self.merged)
        wanted = {name for name in choice.names if name in self.settings}
        ranges = {(start, stop) for _, start, stop in choice.segments or ()}
        if wanted != set(self.merged) or ranges - {(0, x.shape[0])}:
            found = " and ".join(sorted(wanted)) or "none"
            raise UserError(f"adapter {found} is chosen, but {merged} is merged: unmerge first")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            rest[-1].append(f"{prefix}weight has an adapter merged into it: unmerge before loading")
            return
        if prefix + "base_weight" in state_dict:  # written while an adapter was merged
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "base_weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The sizes, and each adapter's settings."""
        each = self.settings.items()
        adapters = [f"{n}(r={s.r}, alpha={s.alpha:g}, dropout={s.dropout:g})" for n, s in each]
        merged = f", merged={self.merged}" if self.merged else ""
        return f"{super().extra_repr()}, adapters=[{', '.join(adapters)}]{merged}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find the class of an adapted subclass by name.
        make, arguments, *rest = tuple(super().__reduce_ex__(protocol))
        if "base_class" in vars(type(self)):
            make, arguments = _new, (self.base_class,)
        return (make, arguments, *rest)


# The attributes that LoRALinear adds to `nn.Linear`; a subclass with one of them is refused.
ADDED = {*vars(LoRALinear), *LoRALinear.__annotations__, "lora_A", "lora_B", "packed"}
ADDED -= {*dir(nn.Linear)}


@cache
def adapted_class(base: Any) -> type[LoRALinear]:
    """LoRALinear, or a subclass of it and of `base`."""
    if base is nn.Linear:
        return LoRALinear
    contents = {"__module__": base.__module__, "base_class": base}
    return type(f"LoRA{base.__name__}", (LoRALinear, base), contents)


def _new(base: Any) -> LoRALinear:
    cls = adapted_class(base)
    return cls.__new__(cls)


def _nothing(*_: Any) -> None:
    pass


def _check_rows(x: Tensor, choice: Choice) -> None:
    found = x.shape[0] if x.dim() > 1 else 1
    last = max((s.stop for s in choice.segments or ()), default=0)
    if found < last or (choice.rows is not None and found != choice.rows):
        chosen = choice.rows or last
        raise UserError(f"adapters are chosen for {chosen} rows, the leading dimension is {found}")


def draw_number() -> int:
    """A random number from PyTorch's generator, to seed other generators with."""
    return int(torch.randint(2**62, (), device="cpu"))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The factors of all adapters of a model."""
    sides = [s for layer in lora_layers(model).values() for s in (layer.lora_A, layer.lora_B)]
    return {factor for side in sides for factor in side.values()}
