"""minBERT: a BERT encoder under Hugging Face's parameter names, computed on real tokens only.

Inside, a padded batch [B, S] becomes its T real tokens [T, H] (Zeng et al. 2022, "Boosting
distributed training performance of the unpadded BERT model"): every GEMM, LayerNorm, GELU and
dropout runs on tokens, and only attention sees the padded square. Shapes at line ends:
B batch, S sequence, T real tokens, H hidden, h heads, d head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.bert.attention import LONG, cpu_attention
from fastlora.bert.config import BertConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, "tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, "tanh"),
    "relu": nn.ReLU,
}
_LAYING = Lock()  # held while parameters move together, since threads may share a model


class Dropout(nn.Dropout):
    """`nn.Dropout` that adds a residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Drop elements of `input`, then add `residual` of the same shape."""
        dropped = super().forward(input)
        return dropped if residual is None else dropped + residual


@dataclass(frozen=True)
class Parts:
    """The kinds of modules that an encoder is built of: faster ones compute the same functions."""

    linear: type[nn.Linear] = nn.Linear
    dropout: type[nn.Dropout] = Dropout


@dataclass(frozen=True)
class BertOutput:
    """What `BertModel.forward` returns; hidden_states[0] is the embeddings' output."""

    last_hidden_state: Tensor  # [B, S, H]
    pooler_output: Tensor  # [B, H]
    hidden_states: tuple[Tensor, ...]  # layers + 1 of [B, S, H]


@dataclass(frozen=True)
class Layout:
    """Where the T real tokens of a padded batch lie; tensors are None when nothing is padded."""

    batch: int  # B
    length: int  # S
    index: Tensor | None = None  # int64 [T], their positions in the flattened [B * S]
    mask: Tensor | None = None  # bool [B, 1, 1, S], True at real keys
    derived: dict[tuple, Tensor] = field(default_factory=dict, compare=False)  # by any layer

    @classmethod
    def of(cls, attention_mask: Tensor | None, shape: torch.Size, tokens: int = 0) -> Layout:
        """From a [B, S] mask of 1 and 0 (or booleans); None means that all tokens are real.

        Padding makes up for fewer real tokens than `tokens`, where there is some beside a real
        token: last of all, and computed like the others.
        """
        batch, length = shape
        if attention_mask is None:
            return cls(batch, length)
        real = attention_mask.bool()
        index = real.flatten().nonzero().squeeze(1)
        if len(index) == real.numel():
            return cls(batch, length)
        if missing := max(0, tokens - len(index)):
            spare = real.any(1, keepdim=True).logical_and(real.logical_not())
            index = torch.cat((index, spare.flatten().nonzero()[:missing, 0]))
        return cls(batch, length, index, real[:, None, None, :])

    def to(self, device: torch.device | str) -> Layout:
        """Copy it to a device, without waiting for the copy where that is possible."""
        if self.index is None or self.mask is None:
            return Layout(self.batch, self.length)
        index, mask = (t.to(device, non_blocking=True) for t in (self.index, self.mask))
        return Layout(self.batch, self.length, index, mask)

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, C] -> [B, S, C], zeros at padding."""
        if self.index is not None:
            square = tokens.new_zeros(self.batch * self.length, tokens.shape[1])
            tokens = square.index_copy(0, self.index, tokens)
        return tokens.view(self.batch, self.length, tokens.shape[1])

    def unpad(self, square: Tensor) -> Tensor:
        """[B, S, C] -> [T, C]."""
        rows = square.flatten(0, 1)
        return rows if self.index is None else _Unpad.apply(rows, self.index)


class _Unpad(torch.autograd.Function):
    """`index_select` of distinct rows: backward is a copy, where PyTorch's adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.rows = len(rows)
        ctx.save_for_backward(index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = parts.dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        """Three int64 [T] -> [T, H]."""
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """Multi-head attention whose query, key and value share one packed [3H, H] storage.

    `projection` computes [T, H] -> [T, 3H]; whoever adapts the projections replaces it.
    """

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = parts.linear(width, width)
        self.key = parts.linear(width, width)
        self.value = parts.linear(width, width)
        self.dropout = parts.dropout(config.attention_probs_dropout_prob)
        self.projection: Callable[[SelfAttention, Tensor], Tensor] = packed_projection
        self.plain = {nn.Linear, parts.linear}  # not their subclasses, which may do anything

    def is_plain(self, layer: nn.Module) -> bool:
        """Whether calling `layer` gives x W^T + b of its own parameters, and does nothing else."""
        return (
            type(layer) in self.plain
            and type(layer.weight) is type(layer.bias) is nn.Parameter
            and "forward" not in vars(layer)
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            and not (layer._backward_hooks or layer._backward_pre_hooks)
            and not nn.modules.module._has_any_global_hook()
        )

    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight [3H, H] and bias [3H] of query, key and value."""
        layers = (self.query, self.key, self.value)
        return together([one.weight for one in layers]), together([one.bias for one in layers])

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, H] -> [T, H]."""
        qkv = self.projection(self, x)  # [T, 3H]
        p = self.dropout.p if self.training else 0.0
        # The compiler understands PyTorch's attention, which does not mind having no tokens either.
        own = not torch.compiler.is_compiling() and qkv.device.type == "cpu" and len(qkv) > 0
        if own and (p or layout.length < LONG):
            return cpu_attention(qkv, self.dropout, layout, self.heads)
        qkv = layout.pad(qkv).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, h, S, d]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, dropout_p=p)
        return layout.unpad(context.transpose(1, 2).flatten(2))


def packed_projection(attention: SelfAttention, x: Tensor) -> Tensor:
    """Query, key and value of [T, H] in one GEMM where they are plain: [T, 3H]."""
    layers = (attention.query, attention.key, attention.value)
    if not all(map(attention.is_plain, layers)):
        return torch.cat([layer(x) for layer in layers], 1)
    return F.linear(x, *attention.packed())


def together(parts: Sequence[Tensor]) -> Tensor:
    """Parameters of one shape, one after the other: without a copy while they are frozen.

    For that they share a storage, and are moved to one where they do not: moving a module, copying
    it or giving it new parameters takes them apart, so this looks each time.
    """
    if torch.compiler.is_compiling() or any(part.requires_grad for part in parts):
        return torch.cat([*parts])  # the compiler knows no storage
    with _LAYING:
        first, shape = parts[0].detach(), (len(parts) * len(parts[0]), *parts[0].shape[1:])
        fits = first.untyped_storage().nbytes() == len(parts) * first.nbytes
        whole = first.as_strided(shape, first.stride(), 0) if fits else first
        if not (fits and all(map(Tensor.is_set_to, parts, whole.chunk(len(parts))))):
            # What is made in inference mode can never be trained, and shows no writes.
            with torch.inference_mode(any(part.is_inference() for part in parts)):
                whole = torch.cat([part.detach() for part in parts])
                for part, block in zip(parts, whole.chunk(len(parts)), strict=True):
                    part.data = block
        return whole


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, width: int, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        self.dense = parts.linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = parts.dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, width], [T, H] -> [T, H]."""
        return self.LayerNorm(self.dropout(self.dense(x), residual))


class Layer(nn.Module):
    """One Transformer layer (post-LayerNorm, as in BERT)."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        attention, output = SelfAttention(config, parts), ResidualOutput(width, config, parts)
        self.attention = nn.ModuleDict({"self": attention, "output": output})
        self.intermediate = dense(parts.linear(width, wide), ACTIVATIONS[config.hidden_act]())
        self.output = ResidualOutput(wide, config, parts)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, H] -> [T, H]."""
        x = self.attention["output"](self.attention["self"](x, layout), x)
        return self.output(self.intermediate(x), x)


def dense(linear: nn.Linear, activation: nn.Module) -> nn.Sequential:
    """A linear layer, under the name "dense", and its activation."""
    return nn.Sequential(OrderedDict(dense=linear, activation=activation))


class Encoder(nn.Module):
    """The stack of layers.

    With `recompute`, only each layer's input is kept for backward, which computes the layer again
    (Chen et al. 2016) with the same random numbers; what it reads must not change in between.
    """

    recompute = False

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, parts) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, layout: Layout) -> list[Tensor]:
        """[T, H] -> the input and every layer's output, each [T, H]."""
        states = [x]
        for layer in self.layer:
            call = partial(checkpoint, layer, use_reentrant=False) if self.recompute else layer
            states.append(call(states[-1], layout))
        return states


class BertModel(nn.Module):
    """The encoder, with the names and numbers of `transformers.BertModel`, built of `parts`."""

    def __init__(self, config: BertConfig, parts: Parts = Parts()) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, parts)
        self.encoder = Encoder(config, parts)
        # tanh(dense) of the first token.
        self.pooler = dense(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())

    def encode(
        self,
        input_ids: Tensor,  # int64 [B, S]
        layout: Layout,  # made on the host, it spares a wait for the device
        token_type_ids: Tensor | None = None,  # int64 [B, S]; None means zeros
    ) -> list[Tensor]:
        """The real tokens' states after the embeddings and each layer: layers + 1 of [T, H].

        Raises ValueError when S is 0 or exceeds the position embeddings.
        """
        limit = self.config.max_position_embeddings
        if not 1 <= input_ids.shape[1] <= limit:
            raise ValueError(f"input_ids has length {input_ids.shape[1]} (expected 1 to {limit})")
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        real = slice(None) if layout.index is None else layout.index
        flat = [t.flatten()[real] for t in (input_ids, types, positions)]
        return self.encoder(self.embeddings(*flat), layout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,  # [B, S], 1 at real tokens; None means all
        token_type_ids: Tensor | None = None,
    ) -> BertOutput:
        """As `encode`, padded: hidden states are [B, S, H], zeros at padding.

        The pooler reads each row's first token, or zeros if that is padding.
        """
        layout = Layout.of(attention_mask, input_ids.shape)
        states = tuple(layout.pad(t) for t in self.encode(input_ids, layout, token_type_ids))
        return BertOutput(states[-1], self.pooler(states[-1][:, 0]), states)
