"""Which layers of a model an adapter targets, and whether it can be added; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import nn

from fastlora.errors import UserError
from fastlora.kernels import Linear
from fastlora.lora.config import ALL, FAMILIES, TARGETS, LoraConfig, check, is_target
from fastlora.lora.layer import ADDED, LoRALinear

# Names of heads; transformers adds the first ones to an encoder, with random weights.
NEW_HEADS = ("classifier", "pre_classifier", "score", "qa_outputs")
HEADS = (*NEW_HEADS, "lm_head", "cls", "heads")
Train = Sequence[str | nn.Parameter]  # parameters, or (ends of) names of modules and parameters


def check_model(model: nn.Module, configs: Mapping[str, LoraConfig]) -> None:
    """Raise UserError if this is no model or a distributed one, or a setting or name is invalid."""
    check(isinstance(model, nn.Module), "the model", type(model).__name__, "an nn.Module")
    check(len(configs) > 0, "config", configs, "the settings of one adapter or more")
    for name, settings in configs.items():
        kind = f"{type(settings).__module__}.{type(settings).__name__}"
        ours = "fastlora.LoraConfig, which has PEFT's spellings; accelerate takes PEFT's models"
        check(isinstance(settings, LoraConfig), "config", kind, ours)
        ok = isinstance(name, str) and name != "" and "." not in name
        check(ok, "adapter name", name, "a non-empty string without dots")
        if hasattr(nn.ParameterDict(), name):
            raise UserError(f"adapter {name!r}: PyTorch's modules use this name; choose another")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise UserError("the model has lazy layers without shapes (expected a forward pass first)")
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    if wrapped or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UserError("the model is distributed already; inject first, then wrap or shard it")


def check_layer(model: nn.Module, name: str, adapter: str, settings: LoraConfig) -> None:
    """Raise UserError where a linear layer cannot get this adapter."""
    layer: Any = model.get_submodule(name)
    parent, kind, problem = model.get_submodule(name.rpartition(".")[0]), type(layer), ""
    if isinstance(parent, nn.MultiheadAttention):
        problem = "nn.MultiheadAttention reads its weight and never calls it"
    elif not isinstance(layer, LoRALinear):
        own = {*vars(layer), *layer._modules, *layer._parameters, *layer._buffers, *dir(kind)}
        if clash := ADDED & own - {*dir(Linear)}:
            problem = f"{kind.__name__} already has {min(clash)!r}, which LoRALinear needs"
    elif layer.merged:
        problem = f"adapter {' and '.join(layer.merged)} is merged into it; unmerge first"
    elif not layer.settings.get(adapter, settings).same_adapter(settings):
        problem = f"it has an adapter {adapter!r} with other settings"
    if problem:
        raise UserError(f"layer {name!r} cannot be adapted: {problem}")


def is_untrained(head: nn.Module) -> bool:
    """Whether all of a head is frozen and looks random, because its biases are zero."""
    own = [*head.parameters()]
    used = any(p.requires_grad or p.is_meta or (p.ndim < 2 and p.any()) for p in own)
    return len(own) > 0 and not used


def trained_parameters(model: nn.Module, names: Train) -> set[nn.Parameter]:
    """The parameters given, or with these names (or ends of names), or in modules with such."""
    kept = {given for given in names if isinstance(given, nn.Parameter)}
    every = model.named_parameters(remove_duplicate=False)  # tied ones by all names
    parameters = [(n, p) for n, p in every if p.is_floating_point() or p.is_complex()]
    for end in (names,) if isinstance(names, str) else [n for n in names if n not in kept]:
        # A parameter's name contains the names of the modules around it.
        found = {p for name, p in parameters if f".{end}." in f".{name}."}
        if not found:
            raise UserError(f"train has {end!r}, which names nothing that can be trained")
        kept |= found
    return kept


def target_names(model: nn.Module, config: LoraConfig, kept: Set[nn.Parameter]) -> list[str]:
    """The names of the targeted linear layers; a layer with several names is listed once."""
    every = model.named_modules(remove_duplicate=False)
    linears = {name: module for name, module in every if isinstance(module, nn.Linear)}
    families = (f for f in FAMILIES if all(any(is_target(n, t) for n in linears) for t in f))
    meant: set[nn.Module] = set()
    for target in config.targets or next(families, FAMILIES[0]):
        matches = [n for n in linears if is_target(n, target)]
        if target in ALL:
            matches = [n for n in linears if not _is_head(model, n, kept)]
        if not matches:
            listed = ", ".join(list(linears)[:24]) + (", ..." if len(linears) > 24 else "")
            what = f"LoRA target {target!r} matches no linear layer of {type(model).__name__}"
            ends = f"the end of a name, one of {', '.join(TARGETS)}, or all"
            raise UserError(f"{what} (expected {ends}; its linear layers are {listed or 'none'})")
        meant |= {linears[name] for name in matches}
    return [name for name, module in model.named_modules() if module in meant]


def _is_head(model: nn.Module, name: str, kept: Set[nn.Parameter]) -> bool:
    """Whether "all" skips a linear layer: it is in a head, fully trainable, or never called."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        bool({*name.split(".")} & {*HEADS})
        or layer is outputs
        or isinstance(parent, nn.MultiheadAttention)
        or not kept.isdisjoint(layer.parameters())
    )
