"""LoRA on a whole model: which layers get it, which adapters act, merging, and the report.

`inject` turns linear layers into LoRALinear where they stand, so that hooks, ties and other
references to them stay as they are. It checks everything first: one that is refused changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from fastlora.errors import UserError
from fastlora.kernels import Linear, Packed
from fastlora.lora.config import ALL, FAMILIES, TARGETS, LoraConfig, is_target
from fastlora.lora.layer import DEFAULT, LoRALinear, draw_number
from fastlora.lora.routing import Choice, Segment, by_rows, scope

# Parts of a name that say that a linear layer belongs to a head.
HEADS = ("classifier", "pre_classifier", "score", "lm_head", "qa_outputs", "cls", "heads")
_FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)
_GUARDED = "_before_inject"  # a module's attributes that `_guard_parents` changed


def inject(
    model: nn.Module,
    config: LoraConfig | Mapping[str, LoraConfig],
    *,
    train: Sequence[str] = (),
    draws_as: Mapping[str, str] | None = None,
) -> dict[str, LoRALinear]:
    """Freeze `model` and put LoRA on its target linear layers, in place.

    `model` is any module; `config` are one adapter's settings, or {adapter name: settings}. Modules
    or parameters named in `train` (or by the end of their names) stay trainable. A model that has
    adapters gets more of them: a layer keeps an adapter that it has with the same settings, and what
    trained goes on training. A sole adapter is active; several must be chosen from by `set_adapter`
    or `use_adapter`. Adapters in `draws_as` draw the random numbers of the one that it names.

    Returns the layers of these adapters by module name. Raises UserError, with nothing changed, for
    a target that matches nothing or cannot be adapted, and for a model whose parameters are
    distributed already.
    """
    configs = {DEFAULT: config} if isinstance(config, LoraConfig) else dict(config)
    _check_model(model, configs)
    kept = _named(model, train, "train")
    plan = {name: _targets(model, settings, kept) for name, settings in configs.items()}
    for adapter, names in plan.items():
        for name in names:
            _check_layer(model, name, adapter, configs[adapter].of_layer(name))
    layers = lora_layers(model)
    known, seed = adapter_names(layers.values()), draw_number()
    if not layers:
        model._frozen_by_inject = [p for p in model.parameters() if p.requires_grad]  # type: ignore
        model.requires_grad_(False)
    injected: dict[str, LoRALinear] = {}
    for name in dict.fromkeys(name for names in plan.values() for name in names):
        layer = LoRALinear.from_linear(model.get_submodule(name), crc32(name.encode()))  # type: ignore
        if name not in layers:
            layer.requires_grad_(False)
        injected[name] = layer
        for adapter, names in plan.items():
            if name in names and adapter not in layer.settings:
                settings = configs[adapter].of_layer(name)
                layer.add_adapter(adapter, settings, seed, (draws_as or {}).get(adapter))
    for parameter in kept:
        parameter.requires_grad_(True)
    now = adapter_names(lora_layers(model).values())
    choice = now if len(now) == 1 else None
    if now == known:
        choice = next(iter(layers.values())).active
    for name, layer in lora_layers(model).items():
        if now != known or name not in layers:
            layer.active = choice
    _guard_parents(model)
    return injected


def eject(model: nn.Module) -> nn.Module:
    """Undo `inject`: the original layers, bit for bit, and what trained before trains again."""
    unmerge(model)
    return _without_lora(model)


def merge_and_unload(model: nn.Module, *adapters: str) -> nn.Module:
    """Merge adapters (by default the active ones) and leave plain layers; returns the model.

    Raises UserError as `merge`, and for a tied weight that the model's `save_pretrained` would lose.
    """
    if _merged(model) and adapters:
        unmerge(model)
    if not _merged(model):
        merge(model, *adapters)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            _check_tied(module)
    return _without_lora(model)


def set_adapter(model: nn.Module, *adapters: str) -> None:
    """Let these adapters act from now on, added up; without a name, none. UserError if unknown."""
    layers = lora_layers(model).values()
    _check_names(layers, adapters)
    for layer in layers:
        layer.was_scoped |= layer.active not in (None, adapters)
        layer.active = adapters


@contextmanager
def use_adapter(
    model: nn.Module | Iterable[LoRALinear],
    *adapters: str,
    rows: Sequence[str | None | Segment] | None = None,
    seed: Tensor | None = None,
) -> Iterator[None]:
    """Let these adapters act in a block of code, in this thread: added up; without a name, none.

    `rows` says instead which adapter each row of the leading dimension uses (None for none), or
    lists segments of rows. `seed`, int64 [], is that of all dropout masks. What the block computed
    under a non-reentrant checkpoint is computed again under the same choice. UserError if unknown.
    """
    layers = lora_layers(model).values() if isinstance(model, nn.Module) else model
    choice = Choice(adapters) if rows is None else by_rows(rows)
    _check_names(layers, choice.names)
    with scope(layers, choice._replace(seed=seed)):
        yield


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_names(layers: Iterable[LoRALinear]) -> tuple[str, ...]:
    """The adapters of some layers, each once."""
    return tuple(dict.fromkeys(name for layer in layers for name in layer.settings))


@torch.no_grad()
def merge(model: nn.Module, *adapters: str) -> None:
    """Fold adapters (by default the active ones) into the weights of the layers that have them.

    The sum is taken in fp32 or wider and rounded once. The state dict of a merged model has the
    merged `weight` and W0 as `base_weight`, and loads into an unmerged one as what it is.

    Raises UserError, with nothing changed, for an unknown name, where something is merged already,
    where a layer's forward is not that of `nn.Linear`, and where a sum is not finite.
    """
    layers = lora_layers(model)
    if not adapters and layers:
        adapters = next(iter(layers.values())).own_choice().names
    _check_names(layers.values(), adapters)
    if not adapters or not layers:
        raise UserError(f"{type(model).__name__} has no active adapter to merge")
    weights = {}
    for name, layer in layers.items():
        own = [adapter for adapter in adapters if adapter in layer.settings]
        if own and layer.merged:
            merged = " and ".join(layer.merged)
            raise UserError(f"adapter {merged} is merged already: unmerge it first")
        if own and not (layer.is_plain and type(layer._parameters.get("weight")) is nn.Parameter):
            raise UserError(
                f"layer {name!r} cannot be merged: {layer.base_class.__name__} does not compute "
                "x W^T + b on a weight of its own"
            )
        if own:
            weights[name] = own, layer.merged_weight(own)
            if not weights[name][1].isfinite().all() and layer.weight.isfinite().all():
                raise UserError(f"layer {name!r}: W0 + BA is not finite in {layer.weight.dtype}")
    for name, (own, weight) in weights.items():
        layers[name].put_merged(weight, own)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: put W0 back, bit for bit."""
    for layer in _merged(model):
        layer.put_back()


def pack(model: nn.Module) -> None:
    """Let a model's frozen linear layers keep packed copies of their weights.

    For an owner who knows when weights change: after a write that PyTorch does not count (through
    `.data`, NumPy or a collective operation), call `pack` again.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.packed = Packed()


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Number of parameters by bucket: "lora", "other trainable", "frozen"."""
    adapters = {id(p) for m in lora_layers(model).values() for p in _lora_parameters(m)}
    report = {"lora": 0, "other trainable": 0, "frozen": 0}
    for parameter in model.parameters():
        bucket = "lora" if id(parameter) in adapters else "other trainable"
        report[bucket if parameter.requires_grad else "frozen"] += parameter.numel()
    return report


def _lora_parameters(layer: LoRALinear) -> list[nn.Parameter]:
    return [*layer.lora_A.values(), *layer.lora_B.values()]


def _merged(model: nn.Module) -> list[LoRALinear]:
    return [layer for layer in lora_layers(model).values() if layer.merged]


def _without_lora(model: nn.Module) -> nn.Module:
    for layer in lora_layers(model).values():
        layer.to_linear()
    for module in model.modules():
        vars(module).update(vars(module).pop(_GUARDED, {}))
        if isinstance(vars(module).get("save_pretrained"), partial):
            del module.save_pretrained
    for parameter in vars(model).pop("_frozen_by_inject", ()):
        parameter.requires_grad_(True)
    return model


def _guard_parents(model: nn.Module) -> None:
    """See to it that nothing around the LoRA layers passes them by."""
    for module in model.modules():
        if not lora_layers(module) or isinstance(module, LoRALinear):
            continue
        # Their fast paths read their children's weights.
        for kind, switch in _FAST_PATHS:
            if isinstance(module, kind) and _GUARDED not in vars(module):
                vars(module)[_GUARDED] = {switch: getattr(module, switch)}
                setattr(module, switch, False)
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = partial(_save_pretrained, module)  # type: ignore


def _save_pretrained(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """transformers' `save_pretrained` with the active adapters merged into what is written.

    So any reader of the folder has what was trained; a model with adapters that loads it, as a
    resumed Trainer does, gets W0 and the adapters back.
    """
    if keywords.get("state_dict") is not None:
        raise UserError("save_pretrained got a state_dict, into which no adapter can be merged")
    active = not _merged(module) and next(iter(lora_layers(module).values())).own_choice().names
    if active:
        merge(module)
    try:
        _check_tied(module)
        return type(module).save_pretrained(module, *arguments, **keywords)  # type: ignore
    finally:
        if active:
            unmerge(module)


def _check_tied(module: nn.Module) -> None:
    """Raise a UserError where a merged weight is tied to another one, as which it would be saved."""
    tied = {id(p) for p in module.parameters()}
    for name, layer in lora_layers(module).items():
        if layer.merged and id(layer._parameter[0]) in tied:
            raise UserError(
                f"the weight of {name!r} is tied to another, and merged it is not: it would be "
                "saved as the other (expected save_adapter, or another target)"
            )


def _check_model(model: nn.Module, configs: Mapping[str, LoraConfig]) -> None:
    for name in configs:
        if not name or "." in name or hasattr(nn.ParameterDict(), name):
            raise UserError(f"adapter {name!r}: PyTorch's modules use this name; choose another")
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    sharded = [p for p in model.parameters() if hasattr(p, "device_mesh")]
    if wrapped or sharded:
        raise UserError("the model is distributed already; inject first, then wrap or shard it")


def _check_layer(model: nn.Module, name: str, adapter: str, settings: LoraConfig) -> None:
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    problem = ""
    if isinstance(parent, nn.MultiheadAttention):
        problem = "nn.MultiheadAttention reads its weight and never calls it"
    elif nn.parameter.is_lazy(getattr(layer, "weight", None)):
        problem = "it has no sizes yet; run a batch first"
    elif isinstance(layer, LoRALinear):
        if layer.merged:
            problem = f"adapter {' and '.join(layer.merged)} is merged into it; unmerge first"
        elif not layer.settings.get(adapter, settings).is_like(settings):
            problem = f"it has an adapter {adapter!r} with other settings"
    if problem:
        raise UserError(f"layer {name!r} cannot be adapted: {problem}")


def _check_names(layers: Iterable[LoRALinear], adapters: Sequence[str]) -> None:
    known = adapter_names(layers)
    for name in adapters:
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise UserError(f"adapter {name!r} is unknown (the model's adapters: {there})")


def _named(model: nn.Module, wanted: Sequence[str], what: str) -> list[nn.Parameter]:
    """The parameters of the modules, and the parameters, of these names or ends of names."""
    kept: list[nn.Parameter] = []
    for end in (wanted,) if isinstance(wanted, str) else wanted:
        found = [
            parameter
            for name, owner in (*model.named_modules(), *model.named_parameters())
            if name == end or name.endswith("." + end)
            for parameter in ([owner] if isinstance(owner, nn.Parameter) else owner.parameters())
        ]
        if not found:
            raise UserError(f"{what} has {end!r}, which names no module or parameter of the model")
        kept += found
    return kept


def _targets(model: nn.Module, config: LoraConfig, kept: Collection[nn.Parameter]) -> list[str]:
    """The names of the linear layers that are meant; each layer has its first name only."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}  # every name of a linear layer, and its first one
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names[name] = first.setdefault(id(module), name)
    wanted = config.targets
    if wanted is None:
        family = (f for f in FAMILIES if all(any(is_target(n, t) for n in names) for t in f))
        wanted = next(family, FAMILIES[0])
    found: dict[str, None] = {}
    for target in wanted:
        matches = [n for n in names if is_target(n, target)]
        if target in ALL:
            matches = [n for n in names if not _is_head(model, n, kept)]
        if not matches:
            listed = ", ".join(list(names)[:24]) + (", ..." if len(names) > 24 else "")
            raise UserError(
                f"LoRA target {target!r} matches no linear layer of {type(model).__name__} "
                f"(expected the end of a name, one of {', '.join(TARGETS)}, or all; its linear "
                f"layers are {listed or 'none'})"
            )
        found.update(dict.fromkeys(names[n] for n in matches))
    return [name for name in dict.fromkeys(names.values()) if name in found]


def _is_head(model: nn.Module, name: str, kept: Collection[nn.Parameter]) -> bool:
    """Whether "all" leaves a linear layer out: in a head, trained whole, or never called."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        bool({*name.split(".")} & {*HEADS})
        or layer is outputs
        or isinstance(parent, nn.MultiheadAttention)
        or any(own is other for own in layer.parameters() for other in kept)
    )
