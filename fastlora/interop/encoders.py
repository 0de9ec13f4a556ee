"""transformers' encoders on the real tokens of a padded batch.

The encoder's states are packed to [1, T, H], its own layers run on them, and its result is padded
again, with zeros at padding. The layers hand the attention mask down to attention untouched, so a
`Layout` travels in its place: attention, which knows it, is the one part that sees the square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bert.attention import attention
from fastlora.bert.layout import Layout
from fastlora.interop.swap import Swapped
from fastlora.kernels import is_ordinary
from fastlora.lora.together import project_together

# What a call may ask for that needs the square.
_SQUARE = {"encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"}
_SQUARE |= {"output_attentions", "output_hidden_states"}
FEW = 48  # tokens of a batch without padding, from which packing them pays
# Where hooks come from that do nothing here: transformers' act only where a call asks for hidden
# states or attentions, and ours only keeps PyTorch off a fast path.
_HARMLESS = ("transformers.utils.output_capturing", "fastlora.lora.layer")


class SelfAttention(Swapped):
    """The attention of BERT, RoBERTa, XLM-R, ELECTRA and CamemBERT."""

    names = ("query", "key", "value")
    output = ""  # a last layer that is part of the module
    dropout: nn.Dropout
    num_attention_heads: int
    n_heads: int  # DistilBERT's

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """[1, T, H] and a `Layout` -> ([1, T, H], None); anything else as before."""
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layers = [getattr(self, name) for name in self.names]
        qkv = project_together(layers, hidden_states)[0]  # [T, 3H]
        heads = self.num_attention_heads if hasattr(self, "num_attention_heads") else self.n_heads
        p = self.dropout.p if self.training else 0.0
        bias = args[0] if args else None  # MPNet's
        context = attention(qkv, attention_mask, heads, self.dropout, p, bias).unsqueeze(0)
        return (getattr(self, self.output)(context) if self.output else context), None


class DistilBertAttention(SelfAttention):
    """The attention of DistilBERT."""

    names = ("q_lin", "k_lin", "v_lin")
    output = "out_lin"


class MPNetAttention(SelfAttention):
    """The attention of MPNet, which gets a bias of its scores by position."""

    names = ("q", "k", "v")
    output = "o"


class Encoder(Swapped):
    """The stack of layers, given the padded batch."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the encoder's own forward, with zeros at padding."""
        few = attention_mask is None and hidden_states.shape[:2].numel() < FEW
        if torch.compiler.is_compiling() or few:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        layout = self._layout(hidden_states, attention_mask, args, kwargs)
        if isinstance(layout, str):
            self.step_aside(layout)
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return self._run(hidden_states, layout, kwargs)

    def _run(self, square: Tensor, layout: Layout, kwargs: dict) -> Any:
        tokens = layout.unpad(square).unsqueeze(0)
        found = super().forward(tokens, layout, **kwargs)
        found.last_hidden_state = layout.pad(found.last_hidden_state[0])
        return found

    def _layout(self, x: Tensor, mask: Any, args: tuple, kwargs: dict) -> Layout | str:
        """Where the real tokens are, or why this call needs the square."""
        config = next(m.config for m in self.modules() if hasattr(m, "config"))
        asked = {name for name in _SQUARE if kwargs.get(name) not in (None, False)}
        asked |= {n for n in ("output_attentions", "output_hidden_states") if getattr(config, n, 0)}
        if args or asked:
            return (
                f"a call with {', '.join(sorted(asked)) or 'more inputs'} needs the padded square"
            )
        if why := why_square(config):
            return why
        if not is_ordinary(x):
            return "a tensor that is empty, on another device, or under a transformation"
        if _is_watched(self):
            return "hooks on modules of the encoder expect the padded square"
        return layout_of(mask, x)


class MPNetEncoder(Encoder):
    """MPNet's stack, which makes the bias of the scores from the size of the square."""

    layer: nn.ModuleList
    compute_position_bias: Any

    def _run(self, square: Tensor, layout: Layout, kwargs: dict) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        bias = self.compute_position_bias(square[:1])  # [1, heads, S, S]
        tokens = layout.unpad(square).unsqueeze(0)
        for layer in self.layer:
            tokens = layer(tokens, layout, bias)[0]
        last = layout.pad(tokens[0])
        return BaseModelOutput(last_hidden_state=last) if kwargs.get("return_dict") else (last,)


# By the class's module and name in transformers: what replaces it.
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


def kind_of(module: nn.Module) -> str:
    """The family and name of a class of transformers, as "bert.BertEncoder"; "" of others."""
    kind = module.swapped_from if isinstance(module, Swapped) else type(module)
    root, _, family, *_ = (*kind.__module__.split("."), "", "", "")
    return f"{family}.{kind.__name__}" if root == "transformers" else ""


def why_square(config: Any) -> str:
    """Why an encoder of this configuration is not run on real tokens, or ""."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward cuts the padded square into pieces"
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        return f"position_embedding_type is {config.position_embedding_type!r}"
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation not in ("eager", "sdpa", None):
        return f"the attention implementation {implementation!r} has a form of its own"
    return ""


def layout_of(mask: Any, x: Tensor) -> Layout | str:
    """The layout that transformers' mask of scores says, or why it is more than padding.

    `mask` is None, or [B, 1, S or 1, S]: booleans, True where a key is seen, or numbers that are
    added to the scores. `x` are the states [B, S, H].
    """
    batch, length, _ = x.shape
    if mask is None:
        return Layout.of(None, x.shape[:2])
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != length:
        return "a mask of an unknown form"
    seen = mask if mask.dtype == torch.bool else mask == 0
    keys = seen[:, 0, 0].expand(batch, length)
    alike = (seen == keys[:, None, None]).all()
    if mask.dtype != torch.bool:
        alike = alike & (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    if not alike:
        return "a mask that is more than padding"
    if not keys.any(1).all():
        return "a row without a real token"
    return Layout.of(keys, x.shape[:2], first=True)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks inside would see the states of tokens in place of the square."""
    for child in module._modules.values():
        if child is None:
            continue
        # Mostly empty: this runs at every call.
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
            hooks = {**child._forward_hooks, **child._forward_pre_hooks, **child._backward_hooks}
            if any(getattr(hook, "__module__", "") not in _HARMLESS for hook in hooks.values()):
                return True
        if child._modules and _is_watched(child):
            return True
    return False
