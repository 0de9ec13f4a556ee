"""Runs encoders of transformers on the real tokens of a padded batch.

The encoder's states are packed to [1, T, H], its own layers run on them, and its result is padded
again, with zeros at padding. The layers pass the attention mask on to attention unchanged, so a
`Layout` can take its place; only attention sees the padded batch. Each call checks that no other
module needs it: see `_why_not_packed`.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.bert.attention import attention
from fastlora.bert.layout import Layout
from fastlora.interop.swap import Swapped, own_class, warn
from fastlora.kernels import drop, is_ordinary
from fastlora.lora.layer import LoRALinear
from fastlora.lora.together import project_together

MIN_PADDING = 16, 6  # in evaluation and in training: tokens of padding from which packing pays
MIN_TOKENS = 1 << 40, 96  # and tokens from which it pays without: ours is the faster dropout
# Arguments that no layer reads; any other argument needs the padded batch.
_UNREAD = {"position_ids", "return_dict", "num_items_in_batch"}
# Modules whose hooks are harmless here: those of transformers act only if a call asks for hidden
# states or attentions, and ours only keeps PyTorch from a fast path.
_CAPTURING = "transformers.utils.output_capturing"
_HARMLESS = (_CAPTURING, "fastlora.lora.layer")
# Modules of PyTorch that treat each token by itself.
_BY_TOKEN = (nn.Dropout, nn.Identity, nn.LayerNorm, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.ParameterList, nn.Embedding)


class SelfAttention(Swapped):
    """The attention of BERT, RoBERTa, XLM-R, ELECTRA and CamemBERT."""

    names = ("query", "key", "value")
    output = ""  # name of the output layer, if it is part of the module
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """[1, T, H] and a `Layout` -> ([1, T, H], None); for other masks, as before."""
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layers = [getattr(self, name) for name in self.names]
        qkv = project_together(layers, hidden_states)[0]  # [T, 3H]
        heads = qkv.shape[1] // 3 // self.attention_head_size
        p = self.dropout.p if self._drops() else 0.0
        bias = args[0] if args else None  # MPNet's
        scale = getattr(self, "scaling", None)
        found = attention(qkv, attention_mask, heads, partial(drop, p=p), p, scale, bias)
        context = found.unsqueeze(0)
        return (getattr(self, self.output)(context) if self.output else context), None

    def _drops(self) -> bool:
        return self.training


class DistilBertAttention(SelfAttention):
    """The attention of DistilBERT."""

    names = ("q_lin", "k_lin", "v_lin")
    output = "out_lin"


class MPNetAttention(SelfAttention):
    """The attention of MPNet, whose scores get a bias by relative position."""

    names = ("q", "k", "v")
    output = "o"

    def _drops(self) -> bool:
        return self.dropout.training


class Encoder(Swapped):
    """The stack of layers; it gets a padded batch and runs on its real tokens.

    Double backward, and batched gradients (`is_grads_batched`), through it raise RuntimeError.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the encoder's own forward, with zeros at padding where it runs on real tokens."""
        layout: Layout | str = ""
        if torch.compiler.is_compiling():
            warn(type(self).__name__)
        else:
            layout = self._layout(hidden_states, attention_mask, args, kwargs)
        if isinstance(layout, Layout):
            return self._run(hidden_states, layout, kwargs)
        if layout:
            self.warn_fallback(layout)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _run(self, padded: Tensor, layout: Layout, kwargs: dict) -> Any:
        tokens = layout.unpad(padded).unsqueeze(0)
        found = super().forward(tokens, layout, **kwargs)
        found.last_hidden_state = layout.pad(found.last_hidden_state[0])
        return found

    def _layout(self, x: Tensor, mask: Any, args: tuple, kwargs: dict) -> Layout | str:
        """Where the real tokens are, or why this call takes the padded batch ("": it is faster)."""
        asked = {k for k, v in kwargs.items() if v is not None and v is not False}
        given = sorted(asked - _UNREAD)
        if args or given:
            return f"a call with {', '.join(given) or 'more inputs'} needs the padded batch"
        config = config_of(self)
        if why := why_padded(config):
            return why
        if nn.modules.module._has_any_global_hook():
            return "hooks on all modules expect the padded batch"
        if not is_ordinary(x):
            return "the input is empty, on neither CPU nor CUDA, or under a function transform"
        layout = layout_of(mask, x, getattr(config, "_attn_implementation", None))
        if isinstance(layout, str):
            return layout
        size = layout.batch * layout.length
        tokens = size if layout.index is None else len(layout.index)
        if size - tokens < MIN_PADDING[self.training] and tokens < MIN_TOKENS[self.training]:
            return ""
        return _why_not_packed(self) or layout


class MPNetEncoder(Encoder):
    """MPNet's stack, which computes the bias of the scores from the padded batch's shape."""

    layer: nn.ModuleList
    compute_position_bias: Any

    def _run(self, padded: Tensor, layout: Layout, kwargs: dict) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        bias = self.compute_position_bias(padded[:1])  # [1, heads, S, S]
        tokens = layout.unpad(padded).unsqueeze(0)
        for layer in self.layer:
            tokens = layer(tokens, layout, bias)[0]
        last = layout.pad(tokens[0])
        return BaseModelOutput(last_hidden_state=last) if kwargs.get("return_dict") else (last,)


# What replaces a class of transformers, by family and class name.
ENCODERS: dict[str, type[Encoder]] = {
    "bert.BertEncoder": Encoder,
    "roberta.RobertaEncoder": Encoder,
    "xlm_roberta.XLMRobertaEncoder": Encoder,
    "electra.ElectraEncoder": Encoder,
    "camembert.CamembertEncoder": Encoder,
    "distilbert.Transformer": Encoder,
    "mpnet.MPNetEncoder": MPNetEncoder,
}
ATTENTIONS: dict[str, type[SelfAttention]] = {
    "bert.BertSelfAttention": SelfAttention,
    "roberta.RobertaSelfAttention": SelfAttention,
    "xlm_roberta.XLMRobertaSelfAttention": SelfAttention,
    "electra.ElectraSelfAttention": SelfAttention,
    "camembert.CamembertSelfAttention": SelfAttention,
    "distilbert.DistilBertSelfAttention": DistilBertAttention,
    "mpnet.MPNetSelfAttention": MPNetAttention,
}


def kind_of(kind: Any) -> str:
    """Family and name of a class of transformers, such as "bert.BertEncoder"; "" for others."""
    kind = own_class(kind)
    root, *path = kind.__module__.split(".")
    return f"{path[1]}.{kind.__name__}" if root == "transformers" and len(path) > 1 else ""


def config_of(encoder: nn.Module) -> Any:
    """The configuration that an encoder, or a module in it, has."""
    return next(m.config for m in encoder.modules() if hasattr(m, "config"))


def why_padded(config: Any) -> str:
    """Why an encoder of this configuration is not run on real tokens, or ""."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        return f"position_embedding_type is {config.position_embedding_type!r}"
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation not in ("eager", "sdpa", None):
        return f"the attention implementation {implementation!r} takes masks of its own form"
    return ""


def layout_of(mask: Any, x: Tensor, implementation: str | None) -> Layout | str:
    """The layout that a mask of transformers describes, or why it is more than padding.

    `mask` is None, or [B, 1, S or 1, S]: numbers that are added to the scores, or, with PyTorch's
    attention ("sdpa"), booleans, True where a key is seen. `x` are the states [B, S, H].
    """
    batch, length, _ = x.shape
    if mask is None:
        return Layout.of(None, x.shape[:2])
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != length:
        return "a mask of an unknown form"
    boolean = mask.dtype == torch.bool and implementation == "sdpa"
    if not (boolean or mask.is_floating_point()):
        return f"a mask of {mask.dtype}"
    seen = mask if boolean else mask == 0
    keys = seen[:, 0, 0].expand(batch, length)
    alike = (seen == keys[:, None, None]).all()
    if not boolean:
        alike = alike & (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    if not alike:
        return "a mask that is more than padding"
    if not keys.any(1).all():
        return "a row without a real token"
    return Layout.of(keys, x.shape[:2], first=True)


def _why_not_packed(module: nn.Module) -> str:
    """Why the modules inside an encoder need the padded batch, or "".

    A module may mix tokens, or may have hooks. Asked at each call, because modules may change.
    """
    for child in module._modules.values():
        if child is None:
            continue
        own, kind = vars(child), cast(Any, type(child))
        if not _is_trusted(kind):
            return f"a {kind.__name__} inside the encoder may need the padded batch"
        if "forward" in own or child._backward_pre_hooks or _is_watched(child):
            return "hooks on modules of the encoder expect the padded batch"
        if own.get("is_causal") or own.get("chunk_size_feed_forward"):
            return "causal attention, or a feed-forward part in chunks, needs the padded batch"
        if child._modules and (why := _why_not_packed(child)):
            return why
    return ""


@cache
def _is_trusted(kind: Any) -> bool:
    """Whether modules of this class treat each token alone, or are attention that we know."""
    if issubclass(kind, (nn.Linear, LoRALinear)) or own_class(kind) in _BY_TOKEN + CONTAINERS:
        return True
    if kind_of(kind) in ATTENTIONS:
        return issubclass(kind, Swapped)
    return own_class(kind).__module__.split(".")[0] in ("transformers", "peft")


def _is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks that would see packed tokens in place of the padded batch."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return False  # the common case, answered quickly
    hooks = {**module._forward_hooks, **module._forward_pre_hooks, **module._backward_hooks}
    modules = {getattr(hook, "__module__", "") for hook in hooks.values()}
    if _CAPTURING in modules and sys.modules[_CAPTURING]._active_collector.get():  # type: ignore
        return True
    return not modules.issubset(_HARMLESS)
