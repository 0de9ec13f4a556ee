"""Whether the modules around an encoder read its states at padding, which would be zeros."""

from __future__ import annotations

from torch import nn

from fastlora.interop.encoders import CONTAINERS, kind_of
from fastlora.interop.swap import own_class

# Ends of the class names of transformers' models whose heads read no states at padding. Token
# classification is not among them: its loss counts padding unless its label is -100.
_SAFE = ("Model", "ForSequenceClassification", "ForNextSentencePrediction", "ForMultipleChoice")
# Classes that a head may consist of, besides those of transformers and PEFT.
_HEADS = {nn.Linear, nn.Dropout, nn.LayerNorm, nn.Tanh, *CONTAINERS}
# sentence-transformers' models, and its modules that read the encoder's states with the mask.
_SENTENCES = {"SentenceTransformer", "CrossEncoder", "SparseEncoder", "Transformer", "Router"}
_SENTENCES |= {"Pooling", "Normalize", "Dense", "Dropout", "LayerNorm", "SpladePooling"}
_SENTENCES |= {"WeightedLayerPooling", "LogitScore"}
_PASSING_ON = {"_old_forward", "_original_forward"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def why_padding_read(root: nn.Module, name: str) -> str:
    """Why modules around the encoder of this name might read states at padding, or ""."""
    if not name:
        return ""
    around = _around(root, name)
    readers = [i for i, module in enumerate(around) if _ignores_padding(module)]
    if not readers:
        return _may_read(around[0])
    for module in around:
        # Except those of Hugging Face accelerate, which pass on what they get.
        patched = "forward" in vars(module) and not {*vars(module)} & _PASSING_ON
        if patched or module._forward_hooks:
            return f"a hook or a forward of yours on {_may_read(module)}"
    for module in around[: readers[0]]:
        if _library(module) == "sentence_transformers":
            unknown = (m for m in (module, *module.children()) if not _reads_with_mask(m))
            if (found := next(unknown, None)) is not None:
                return _may_read(found)
        elif _library(module) != "peft" and type(module) not in _WRAPPERS:
            return _may_read(module)
    reader, inside = around[readers[0]], {*root.get_submodule(name).modules()}
    for place, module in reader.named_modules():
        known = own_class(type(module)) in _HEADS or _library(module) in ("transformers", "peft")
        if not (known or module in inside or "lora_" in place):
            return _may_read(module)
    return ""


def is_bare_encoder(root: nn.Module, name: str) -> bool:
    """Whether the model of this encoder has no head, so that its caller gets the states."""
    around = _around(root, name)
    first = next((module for module in around if _library(module) == "transformers"), root)
    heads = any(_library(module) == "sentence_transformers" for module in around)
    return not heads and type(first).__name__.endswith("Model")


def _around(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the one of this name, the outermost first."""
    parents = name.split(".")[:-1]
    return [root.get_submodule(".".join(parents[:i])) for i in range(len(parents) + 1)]


def _ignores_padding(module: nn.Module) -> bool:
    kind = kind_of(type(module))
    return kind.endswith(_SAFE) and not kind.endswith("LMHeadModel")


def _reads_with_mask(module: nn.Module) -> bool:
    """Whether it is of transformers, or a module of sentence-transformers that uses the mask."""
    library = _library(module)
    known = library == "sentence_transformers" and type(module).__name__ in _SENTENCES
    return known or library in ("transformers", "peft", "torch")


def _library(module: nn.Module) -> str:
    return own_class(type(module)).__module__.split(".")[0]


def _may_read(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} may read states at padding, which would become zeros; if it does "
        "not, call accelerate(model, real_tokens=True)"
    )
