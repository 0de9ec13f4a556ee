"""LoRA on any `nn.Linear`: the layer, its injection into a model, merging, and the report.

Hu et al. 2021: W = W0 + scale B A with W0 frozen, A Kaiming-uniform and B zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn

from fastlora.bert.model import SelfAttention
from fastlora.config import TARGETS, LoraConfig
from fastlora.errors import UserError
from fastlora.kernels import Term, lora_grouped

DEFAULT = "default"
VARIANT = "@"


def plain(name: str) -> str:
    """The adapter or task that `name` is a variant of: "sts@2" has the random numbers of "sts"."""
    return name.partition(VARIANT)[0]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the leading dimension that use one adapter."""

    adapter: str
    start: int
    stop: int


@dataclass
class Routing:
    """Which rows use which adapter, and the mask seed: one object for all layers of a model.

    Without segments, every row uses the adapter "default". Without a seed, each layer draws its
    own at each forward.
    """

    segments: Sequence[Segment] | None = None
    seed: Tensor | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer with any number of named low-rank adapters.

    A drop-in for `nn.Linear(in_features, out_features, bias)`: the base parameters keep the
    names `weight` and `bias`; adapter `name` has `lora_A[name]` [r, in] and `lora_B[name]`
    [out, r], fp32 whatever the base is. Raises UserError when a setting is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.1,
        rslora: bool = False,
        bias: bool = True,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias)
        self._adopt(linear, {DEFAULT: LoraConfig(r, alpha, dropout, rslora)}, stream=0)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        settings: Mapping[str, LoraConfig],
        stream: int = 0,
        seed: int | None = None,
    ) -> LoRALinear:
        """Adopt the parameters of `linear` (shared, frozen from now on), one adapter a setting.

        An adapter's start is a function of (seed, stream, its name); by default PyTorch's
        generator gives the seed.
        """
        layer = cls.__new__(cls)
        layer._adopt(linear, settings, stream, seed)
        return layer

    def _adopt(
        self,
        linear: nn.Linear,
        settings: Mapping[str, LoraConfig],
        stream: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.settings = dict(settings)
        seed = draw_number() if seed is None else seed
        for name, setting in settings.items():
            own = torch.Generator().manual_seed(seed ^ crc32(plain(name).encode(), stream))
            A = torch.empty(setting.r, self.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=own)
            A = A.to(self.weight.device)
            self.lora_A[name] = nn.Parameter(A)
            self.lora_B[name] = nn.Parameter(A.new_zeros(self.out_features, setting.r))
        self.stream = stream
        self.routing = Routing()
        self.merged: tuple[str, ...] = ()
        self.unmerged: Tensor | None = None  # W0, while an adapter is merged
        self.train(linear.training)

    def terms(self, x: Tensor, column: int = 0) -> list[Term]:
        """The low-rank terms that the routing puts on input x [leading, ..., in]."""
        if self.merged:
            return []
        segments = self.routing.segments
        if segments is None:
            segments = (Segment(DEFAULT, 0, x.shape[0]),)
        # A segment counts in the leading dimension; a term counts in flattened rows.
        rows = x[0].numel() // self.in_features if x.dim() > 1 and len(x) else 1
        return [
            Term(
                lora_A=self.lora_A[s.adapter],
                lora_B=self.lora_B[s.adapter],
                scale=self.settings[s.adapter].scale,
                dropout_p=self.settings[s.adapter].dropout if self.training else 0.0,
                # Each layer and adapter has its own masks, whoever is in company.
                stream=crc32(plain(s.adapter).encode(), self.stream),
                start=s.start * rows,
                stop=s.stop * rows,
                column=column,
            )
            for s in segments
            if s.adapter in self.settings and s.start < s.stop
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return lora_grouped(x, self.weight, self.bias, self.terms(x), self.routing.seed)


def lora_projection(attention: SelfAttention, x: Tensor) -> Tensor:
    """minBERT's packed projection with LoRA on any of query, key and value: [T, H] -> [T, 3H]."""
    weight, bias = attention.packed()
    terms, seed, column = [], None, 0
    for layer in (attention.query, attention.key, attention.value):
        if isinstance(layer, LoRALinear):
            terms += layer.terms(x, column)
            seed = layer.routing.seed
        column += layer.weight.shape[0]
    return lora_grouped(x, weight, bias, terms, seed)


def draw_number() -> int:
    """A number from PyTorch's generator, for seeds of generators that more depends on."""
    return int(torch.randint(2**62, ()))


def is_target(name: str, target: str) -> bool:
    """Whether module `name` is meant by `target`: a name of TARGETS or any suffix of a path."""
    suffix = TARGETS.get(target, target)
    if target == "ffn_output" and name.endswith(TARGETS["output"]):
        return False
    return name == suffix or name.endswith("." + suffix)


def inject(
    model: nn.Module, settings: LoraConfig | Mapping[str, LoraConfig]
) -> dict[str, LoRALinear]:
    """Freeze `model` and put LoRA on its target linear layers, in place.

    `model` is any module with `nn.Linear` layers (minBERT, Hugging Face BERT, ...); `settings` are
    one adapter's, or {adapter name: settings}. Returns the new layers by module name, which share
    one `Routing`. Raises UserError when a target matches no linear layer.
    """
    adapters = {DEFAULT: settings} if isinstance(settings, LoraConfig) else dict(settings)
    model.requires_grad_(False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in {t: None for s in adapters.values() for t in s.targets}:
        if not any(is_target(name, target) for name in linears):
            raise UserError(
                f"LoRA target {target!r} matches no linear layer of {type(model).__name__} "
                f"(expected one of {', '.join(TARGETS)}, or the end of a module's name)"
            )
    routing, layers, seed = Routing(), {}, draw_number()
    for name, linear in linears.items():
        own = {a: s for a, s in adapters.items() if any(is_target(name, t) for t in s.targets)}
        if own:
            layers[name] = LoRALinear.from_linear(linear, own, crc32(name.encode()), seed)
            layers[name].routing = routing
            path, _, attribute = name.rpartition(".")
            parent = model.get_submodule(path)
            setattr(parent, attribute, layers[name])
            if isinstance(parent, SelfAttention):
                parent.projection = lora_projection
    return layers


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge(model: nn.Module, *adapters: str) -> None:
    """Fold adapters (by default the shared one) into the LoRA layers that have them, in fp32.

    Raises RuntimeError when a layer has something merged already.
    """
    layers, wanted = lora_layers(model).values(), adapters or (DEFAULT,)
    for layer in layers:
        if layer.merged and any(name in layer.settings for name in wanted):
            names = " and ".join(layer.merged)
            raise RuntimeError(f"adapter {names} is merged already: unmerge it first")
    for layer in layers:
        if own := tuple(name for name in wanted if name in layer.settings):
            terms = [layer.settings[n].scale * layer.lora_B[n] @ layer.lora_A[n] for n in own]
            layer.unmerged = layer.weight.clone()
            layer.weight.copy_(layer.weight.float() + sum(terms))
            layer.merged = own


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge`: put W0 back, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.unmerged is not None:
            layer.weight.copy_(layer.unmerged)
            layer.merged, layer.unmerged = (), None


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Number of parameters by bucket: "lora", "other trainable", "frozen"."""
    report = {"lora": 0, "other trainable": 0, "frozen": 0}
    for name, parameter in model.named_parameters():
        bucket = "lora" if ".lora_" in name else "other trainable"
        report[bucket if parameter.requires_grad else "frozen"] += parameter.numel()
    return report
